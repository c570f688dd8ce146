"""Losses that shape an energy such that the true answer has a lower energy than all other answers.

Most of them take energies ``(B,)`` of the true answers and of the answers that the energy prefers, and return one value per
sample, ``(B,)``; take the mean over a batch. The answers are usually computed without a graph, by `energynet.minimize` under
``torch.no_grad()`` or by a few descent steps, and their energies are then evaluated with a graph: the derivative of a minimum
with respect to parameters does not contain that of the minimizer. A loss of the answer itself, such as a squared error, does not
need these functions, because it is differentiated through the solve. `denoising_score_matching` needs no answers either: it
shapes the gradient of an energy from clean samples.
"""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from energynet.energy import Energy, EnergyLike, encode, evaluate, gradient

__all__ = [
    "CostAugmented",
    "denoising_score_matching",
    "hinge",
    "logistic",
    "perceptron",
    "soft_f1",
    "square_square",
    "value_regression",
]


def perceptron(truth: Tensor, lowest: Tensor) -> Tensor:  # (B,), (B,) -> (B,)
    """E(y) − min E, the difference between the energy of the true answer and the lowest energy.

    It is zero if the true answer is the minimizer, and it requires no margin: a constant energy has zero loss.

    Example:
        >>> perceptron(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 1.0]))
        tensor([1.5000, 0.0000])

    Args:
        truth: energies of the true answers.
        lowest: energies of the minimizers.

    Returns:
        ``(B,)``; negative where ``lowest`` is not the lowest energy.

    Raises:
        ValueError: if the shapes differ.

    Source: LeCun et al. (2006), A tutorial on energy-based learning.
    """
    _refuse_shapes("perceptron", truth, lowest)
    return truth - lowest


def hinge(truth: Tensor, wrong: Tensor, margin: float | Tensor = 1.0) -> Tensor:  # (B,), (B,) -> (B,)
    """max(0, margin + E(y) − E(ŷ)): the energy of the true answer should be lower than that of a wrong one by a margin.

    If the margin is the cost Δ(ŷ, y) of the wrong answer, and the wrong answer is the minimizer of E − Δ (see
    `CostAugmented`), this is the structured hinge loss: an upper bound of the cost of the minimizer of E.

    Example:
        >>> hinge(torch.tensor([2.0, 0.0]), torch.tensor([2.5, 3.0]))
        tensor([0.5000, 0.0000])
        >>> hinge(torch.tensor([2.0, 0.0]), torch.tensor([2.5, 3.0]), margin=torch.tensor([0.5, 4.0]))
        tensor([0., 1.])

    Args:
        truth: energies of the true answers.
        wrong: energies of wrong answers: of the one with the lowest energy, or of the most violating one.
        margin: a float, or one value per sample.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: if the shapes differ.

    Source: LeCun et al. (2006), A tutorial on energy-based learning; Tsochantaridis et al. (2005), Large margin methods for
    structured and interdependent output variables.
    """
    _refuse_shapes("hinge", truth, wrong, margin)
    return (margin + truth - wrong).relu()


def logistic(truth: Tensor, wrong: Tensor) -> Tensor:  # (B,), (B,) -> (B,)
    """log(1 + exp(E(y) − E(ŷ))): a smooth hinge loss with an infinite margin.

    Example:
        >>> logistic(torch.tensor([1.0]), torch.tensor([1.0]))
        tensor([0.6931])

    Args:
        truth: energies of the true answers.
        wrong: energies of wrong answers.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: if the shapes differ.

    Source: LeCun et al. (2006), A tutorial on energy-based learning, where it is called the log loss.
    """
    _refuse_shapes("logistic", truth, wrong)
    return nn.functional.softplus(truth - wrong)


def square_square(truth: Tensor, wrong: Tensor, margin: float | Tensor = 1.0) -> Tensor:  # (B,), (B,) -> (B,)
    """E(y)² + max(0, margin − E(ŷ))²: zero energy for true answers, energies above the margin for wrong ones; for E ≥ 0.

    Example:
        >>> square_square(torch.tensor([2.0, 0.0]), torch.tensor([0.5, 3.0]))
        tensor([4.2500, 0.0000])

    Args:
        truth: energies of the true answers.
        wrong: energies of wrong answers.
        margin: a float, or one value per sample.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: if the shapes differ.

    Source: LeCun et al. (2006), A tutorial on energy-based learning.
    """
    _refuse_shapes("square_square", truth, wrong, margin)
    return truth.square() + (margin - wrong).relu().square()


def value_regression(energy: Tensor, quality: Tensor) -> Tensor:  # (B,), (B,) -> (B,)
    """Cross-entropy between the value σ(−E) of an answer, good or bad, and its known quality.

    An energy that is trained by this loss predicts the quality of any answer, and its minimizer has the highest predicted
    quality. The loss is minimal, and equal to the entropy of the quality, if σ(−E) is the quality; for the true answer, whose
    quality is 1, this is the limit E → −∞.

    Example:
        >>> value_regression(torch.tensor([0.0, -5.0]), torch.tensor([0.5, 1.0]))
        tensor([0.6931, 0.0067])

    Args:
        energy: energies of answers.
        quality: their quality, between 0 and 1, such as their `soft_f1`.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: if the shapes differ.

    Source: Gygli, Norouzi and Angelova (2017), Deep value networks learn to evaluate and iteratively refine structured outputs.
    """
    _refuse_shapes("value_regression", energy, quality)
    return nn.functional.binary_cross_entropy_with_logits(-energy, quality, reduction="none")


def soft_f1(predicted: Tensor, labels: Tensor) -> Tensor:  # (B, L), (B, L) -> (B,)
    """The F1 score for labels with fractional membership: 2 Σ min(p, y) / Σ (p + y).

    If p contains only zeros and ones, this is the usual F1 score. Two empty sets have the score 1.

    Example:
        >>> soft_f1(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([1.0000, 0.5000])

    Args:
        predicted: between 0 and 1.
        labels: 0 or 1, or between.

    Returns:
        ``(B,)``, between 0 and 1.

    Raises:
        ValueError: if the shapes differ.

    Source: Gygli, Norouzi and Angelova (2017), Deep value networks learn to evaluate and iteratively refine structured outputs.
    """
    _refuse_shapes("soft_f1", predicted, labels)
    total = (predicted + labels).sum(-1)
    nothing = total == 0
    shared = 2 * torch.minimum(predicted, labels).sum(-1)
    return torch.where(nothing, 1, shared / torch.where(nothing, 1, total))


def denoising_score_matching(energy: EnergyLike, x: Tensor, *context: Any, sigma: float | Tensor, noise: Tensor | None = None
                             ) -> Tensor:  # (B, ...) -> (B,)  # fmt: skip
    r"""½‖σ ∇E(x + σε) − ε‖²: the negative gradient of E should point from a noisy sample to the clean one; no solve is needed.

    The mean over samples and noise ε is minimal if exp(−E) is proportional to the density of noisy samples; then one gradient
    step x − σ²∇E(x) is the best estimate of the clean sample.

    Example:
        >>> x, variance = 2 * torch.randn(1000, 3), torch.tensor(4.0 + 1.0)
        >>> energy = lambda x, variance: 0.5 * (x.square() / variance).sum(-1)      # of N(0, 4), noise of variance 1 added
        >>> denoising_score_matching(energy, x, variance, sigma=1.0).shape
        torch.Size([1000])

    Args:
        energy: E(x, \\*context) -> ``(B,)``, a negative log-density up to a constant.
        x: clean samples ``(B, ...)``.
        context: the energy's other arguments.
        sigma: the standard deviation of the noise, a number or one per sample ``(B,)``.
        noise: ε, like x; pass it if the context depends on it. None: it is drawn at random.

    Returns:
        ``(B,)``, to be differentiated with respect to the parameters of E.

    Raises:
        ValueError: if sigma is neither a number nor ``(B,)``, or the noise is not like x.

    Source: Vincent (2011), A connection between score matching and denoising autoencoders.
    """
    noise = torch.randn_like(x) if noise is None else noise
    sizes = tuple(sigma.shape) if isinstance(sigma, Tensor) else ()
    if sizes not in ((), x.shape[:1]) or noise.shape != x.shape:
        raise ValueError(
            f"sigma must be a number or one per sample, and noise like x, got x {tuple(x.shape)}, sigma {sizes} and noise "
            f"{tuple(noise.shape)}."
        )
    level = sigma.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(sigma, Tensor) and sigma.ndim else sigma
    error = level * gradient(energy, x + level * noise, *context) - noise
    return 0.5 * error.flatten(1).square().sum(1)


@final
class CostAugmented(Energy):
    """E(x, \\*context) − Δ(x, y), whose minimizer is the answer that violates the margin most, for use in `hinge`.

    Example:
        >>> from energynet import minimize
        >>> energy = lambda x, z: 2 * (x - z).square().sum(-1)
        >>> cost = lambda x, y: (x - y).square().sum(-1)
        >>> y, z = torch.zeros(3, 2), torch.ones(3, 2)
        >>> worst = minimize(CostAugmented(energy, cost), y, y, z).value        # 2 (x − 1)² − x² is lowest at 2
        >>> worst[0].round(decimals=3)
        tensor([2., 2.])
        >>> hinge(energy(y, z), energy(worst, z), cost(worst, y))
        tensor([8., 8., 8.])

    Args:
        energy: E(x, \\*context) -> ``(B,)``.
        cost: Δ(x, y) -> ``(B,)``, zero at x = y. E − Δ must have a minimizer.

    Source: Tsochantaridis et al. (2005), Large margin methods for structured and interdependent output variables.
    """

    def __init__(self, energy: EnergyLike, cost: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.energy, self.cost = energy, cost

    def encode(self, y: Any, *context: Any) -> tuple[Any, ...]:
        """The true answer, and the code of the energy's own context."""
        return y, *encode(self.energy, context)

    def evaluate(self, x: Any, y: Any, *code: Any) -> Tensor:
        return evaluate(self.energy, x, code) - self.cost(x, y)


def _refuse_shapes(name: str, first: Tensor, second: Tensor, margin: float | Tensor = 0.0) -> None:
    shapes = [t.shape for t in (first, second, margin) if isinstance(t, Tensor) and (t is not margin or t.ndim)]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"{name} compares sample by sample, but got shapes {', '.join(str(tuple(shape)) for shape in shapes)}, which would "
            "broadcast. Likely cause: one of them lacks the batch dimension, or has a trailing dimension of one."
        )

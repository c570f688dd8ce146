"""Multi-label classification: energies over label logits, and a contracting network to compare them with."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from energynet.energy import Energy


class BoundedNorm(nn.Module):
    """A parametrization that keeps the largest singular value of a matrix at or below a bound.

    It divides by the Schatten 8-norm ``tr((W Wᵀ)⁴)^(1/8)``. This norm is never below the largest singular value, exceeds it
    at most by a factor of ``rank^(1/8)``, and is differentiable to any order. None of this holds exactly for a power
    iteration.

    Args:
        bound: the bound.

    Raises:
        ValueError: when the bound is not positive.

    >>> W = 3 * torch.eye(2)
    >>> bool(torch.linalg.matrix_norm(BoundedNorm(1.0)(W), 2) <= 1)
    True
    """

    def __init__(self, bound: float = 1.0) -> None:
        super().__init__()
        if not bound > 0:
            raise ValueError(f"bound must be positive, got {bound}.")
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:  # (K, L) -> (K, L)
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        return self.bound * weight / (gram @ gram).square().sum().pow(1 / 8)

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


class LabelFeatures(nn.Module):
    """The network that reads the input: M perceptrons D → hidden → L with dropout on input and hidden units, each of which
    scores all labels.

    Args:
        num_features: D.
        num_labels: L.
        num_experts: M.
        hidden: hidden units of each perceptron.

    Example:
        >>> LabelFeatures(6, 3, num_experts=2, hidden=4)(torch.ones(5, 6)).shape
        torch.Size([5, 2, 3])
    """

    def __init__(self, num_features: int, num_labels: int, *, num_experts: int = 5, hidden: int = 512) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_perceptron(num_features, num_labels, hidden) for _ in range(num_experts))

    def forward(self, z: Tensor) -> Tensor:  # (B, D) -> (B, M, L)
        return torch.stack([expert(z) for expert in self.experts], dim=1)


class MultiLabelEnergy(Energy):
    r"""An energy over the logits u of L labels, whose minimizer is the answer on which M experts and the labels agree:

    .. math::
        E(u; s) = \frac1M \sum_m \tfrac12 \|u - s_m\|^2 - c \sum_k a_k \log\cosh(w_k^\top u + b_k).

    The experts' scores s come from any network of the input, such as `LabelFeatures`. Energies add where probabilities
    multiply, so the first term is a product of experts. Each ridge k depends on a learned combination of labels, and rewards
    (:math:`a_k > 0`) or penalizes (:math:`a_k < 0`) that it is decided, one way or the other.

    It has exactly one minimizer for every s: :math:`0 \le (\log\cosh)'' \le 1`, :math:`|a_k| \le 1` and :math:`\|W\|_2 \le
    1` bound the Hessian by :math:`(1 - c) I \preceq \nabla^2 E \preceq (1 + c) I` for all weights, and c < 1. So E is (1 −
    c)-strongly convex, and gradient steps of size 2/(μ + L) = 1 contract by a factor of at most c.

    Args:
        num_labels: L, length of u.
        num_ridges: number of ridges.
        coupling: c, between 0 and 1: how strongly labels may act on each other.

    Raises:
        ValueError: when coupling is not between 0 and 1.

    Example:
        >>> MultiLabelEnergy(3, num_ridges=4)(torch.zeros(5, 3), torch.ones(5, 2, 3)).shape
        torch.Size([5])

    Source: the ridges follow SPEN (Belanger and McCallum 2016), made strongly convex.
    """

    def __init__(self, num_labels: int, *, num_ridges: int = 32, coupling: float = 0.9) -> None:
        super().__init__()
        _check_coupling(coupling)
        self.coupling = coupling
        self.amplitude = nn.Parameter(0.1 * torch.randn(num_ridges))
        self.shift = nn.Parameter(torch.zeros(num_ridges))
        self.weight = nn.Parameter(torch.randn(num_ridges, num_labels))
        register_parametrization(self, "weight", BoundedNorm())

    @property
    def step_size(self) -> float:
        """2/(μ + L), the best constant step size for the bounds of the Hessian."""
        return 1.0

    def encode(self, scores: Tensor) -> tuple[Tensor, Tensor]:  # (B, M, L) -> (B, L), (B,)
        """The experts' mean and half their spread: all that the energy needs of them."""
        mean = scores.mean(1)
        return mean, 0.5 * (scores - mean[:, None]).square().sum(-1).mean(1)

    def start(self, scores: Tensor) -> Tensor:  # (B, M, L) -> (B, L)
        """The experts' mean, which would be the minimizer without the ridges."""
        return scores.mean(1)

    def evaluate(self, u: Tensor, mean: Tensor, spread: Tensor) -> Tensor:  # (B, L), (B, L), (B,) -> (B,)
        ridges = (torch.tanh(self.amplitude) * _log_cosh(u @ self.weight.T + self.shift)).sum(-1)
        return 0.5 * (u - mean).square().sum(-1) + spread - self.coupling * ridges


class StructuredEnergy(Energy):
    r"""A network's energy over label probabilities σ(u) and features z, with a ridge so that it has a minimizer:

    .. math::
        E(u; z) = \frac1K \sum_k \mathrm{softplus}\bigl((V z + W σ(u) + b)_k\bigr)^2 + \tfrac{μ}{2} \|u\|^2.

    The weight on [z; σ(u)] is kept in two parts, because V z + b does not depend on u: it is computed once per solve, which
    for many features is most of the work (``python -m tests.benchmarks.hoisting``). Without the ridge some logits would go
    to −∞. E need not be convex: with a small μ it may have several minima, and a solve finds the one to which the start
    leads.

    Example:
        >>> from energynet import minimize
        >>> minimize(StructuredEnergy(6, 3, hidden=8), None, torch.ones(5, 6)).value.shape      # z (B, D) -> u* (B, L)
        torch.Size([5, 3])

    Args:
        num_features: D, length of z.
        num_labels: L, length of u.
        hidden: K, number of hidden units.
        ridge: μ, added to every curvature.

    Raises:
        ValueError: if the ridge is not positive and finite.

    Source: the energies of Belanger and McCallum (2016), Structured prediction energy networks; the ridge is added.
    """

    def __init__(self, num_features: int, num_labels: int, *, hidden: int = 512, ridge: float = 0.01) -> None:
        super().__init__()
        if not 0 < ridge < math.inf:
            raise ValueError(f"ridge must be positive and finite, got {ridge}: without one, logits run to infinity.")
        self.ridge, self.num_labels = ridge, num_labels
        self.features = nn.Linear(num_features, hidden)
        self.labels = nn.Linear(num_labels, hidden, bias=False)

    def start(self, z: Tensor) -> Tensor:  # (B, D) -> (B, L)
        """Zero: each label is as likely as not."""
        return z.new_zeros(z.shape[0], self.num_labels)

    def encode(self, z: Tensor) -> Tensor:  # (B, D) -> (B, K)
        """V z + b."""
        return self.features(z)

    def evaluate(self, u: Tensor, shift: Tensor) -> Tensor:  # (B, L), (B, K) -> (B,)
        hidden = nn.functional.softplus(self.labels(torch.sigmoid(u)) + shift)
        return hidden.square().mean(-1) + 0.5 * self.ridge * u.square().sum(-1)


class LabelContraction(nn.Module):
    r"""A network whose fixed point is the answer: :math:`g(u; s) = \bar s + V \tanh(W u + b)`, with
    :math:`\bar s` the experts' mean, :math:`\|V\|_2 \le c` and :math:`\|W\|_2 \le 1`, so that it contracts in u
    by c whatever the weights.

    Args:
        num_labels: L.
        num_units: K, number of recurrent units.
        coupling: c, between 0 and 1.

    Raises:
        ValueError: when coupling is not between 0 and 1.

    Example:
        >>> LabelContraction(3, num_units=4)(torch.zeros(5, 3), torch.ones(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, num_labels: int, *, num_units: int = 32, coupling: float = 0.9) -> None:
        super().__init__()
        _check_coupling(coupling)
        self.gain = nn.Parameter(0.1 * torch.randn(num_units))
        self.shift = nn.Parameter(torch.zeros(num_units))
        self.inward = nn.Parameter(torch.randn(num_units, num_labels))
        self.outward = nn.Parameter(torch.randn(num_labels, num_units))
        register_parametrization(self, "inward", BoundedNorm())
        register_parametrization(self, "outward", BoundedNorm(coupling))

    def forward(self, u: Tensor, mean: Tensor) -> Tensor:  # (B, L), (B, L) -> (B, L)
        return mean + (torch.tanh(self.gain) * torch.tanh(u @ self.inward.T + self.shift)) @ self.outward.T


def _perceptron(num_features: int, num_labels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(0.2), nn.Linear(num_features, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, num_labels)
    )


def _check_coupling(coupling: float) -> None:
    if not 0 < coupling < 1:
        raise ValueError(f"coupling must lie between 0 and 1 for the answer to be unique, got {coupling}.")


def _log_cosh(y: Tensor) -> Tensor:
    # Smooth everywhere, at 0 too, where |y| + softplus(-2|y|) would have the wrong second derivative.
    return nn.functional.softplus(2 * y) - y - math.log(2)

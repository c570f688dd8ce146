"""An energy whose minimizer is the threshold of a row: the one that makes the expected F1 of its labels largest."""

import torch
from torch import Tensor, nn

from energynet import FPI_GD, Energy, ImplicitAdjoint, Newton, Solution, Termination
from energynet.experiments.models import Experts, Size
from energynet.experiments.solves import SolveLog
from energynet.losses import soft_f1

from .base import Loss

SOLVE = Termination(atol=1e-6, rtol=1e-5, max_steps=50)


class ThresholdEnergy(Energy):
    r"""An energy over the threshold λ of a row, given the probabilities p of its labels:

    .. math::
        E(λ; p) = \tfrac12 λ^2 \textstyle\sum_i p_i + \tfrac12 \sum_i \max(0, p_i - λ)^2.

    It is strongly convex, with curvature at least Σ p. The labels with p > λ* are the set y for which
    2 pᵀy / Σ (p + y), the F1 that is to be expected if labels are independent, is largest, and 2 λ* is that largest value: the
    set maximizes 2 pᵀy − F Σ (p + y), whose maximum Σ max(0, 2 p − F) − F Σ p is zero for the best F = 2 λ*.

    Example:
        >>> from energynet import minimize
        >>> p = torch.tensor([[0.9, 0.6, 0.1]])
        >>> minimize(ThresholdEnergy(), None, p).value.round(decimals=3)      # two labels: 2 (0.9 + 0.6) / (1.6 + 2) / 2
        tensor([[0.4170]])

    Source: Dinkelbach (1967), On nonlinear fractional programming; Dembczyński et al. (2011), An exact algorithm for F-measure
    maximization, without its assumption of independence.
    """

    def start(self, p: Tensor) -> Tensor:  # (B, L) -> (B, 1)
        """Half the largest probability: the answer for a row with one label."""
        return 0.5 * p.amax(-1, keepdim=True)

    def evaluate(self, threshold: Tensor, p: Tensor) -> Tensor:  # (B, 1), (B, L) -> (B,)
        return 0.5 * (threshold.square().squeeze(-1) * p.sum(-1) + (p - threshold).relu().square().sum(-1))


class RowThreshold(Experts):
    """The experts' mean score minus the logit of the row's threshold, which minimizes an energy by `FPI_GD`.

    So all labels of a row act on each other: how many are chosen depends on how sure the others are. The probabilities that
    the energy sees are σ(a s + b); temperature a and shift b learn through the solve, by the soft F1 of the answer.

    Args:
        size: sizes.
    """

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.scale, self.shift, self.solves = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(())), SolveLog()
        self.layer = FPI_GD(ThresholdEnergy(), solver=Newton(), termination=SOLVE, on_failure="warn",
                            adjoint=ImplicitAdjoint(report=self.solves.report))  # fmt: skip

    def combine(self, experts: Tensor) -> Tensor:  # (B, M, L) -> (B, L)
        logits = self.scale * experts.mean(1) + self.shift
        return logits - self.solve(logits.sigmoid()).value.logit()

    def solve(self, p: Tensor) -> Solution:
        """The thresholds (B, 1) of rows of probabilities, and how the solve went."""
        return self.solves.add(self.layer.solve(p))


def threshold_loss(model: RowThreshold, z: Tensor, labels: Tensor, loss: Loss) -> Tensor:  # (B, D), (B, L) -> ()
    """The loss of each expert, and 1 − soft F1 of the answer, which trains what combines them."""
    experts = model.features(z)
    answer = model.combine(experts.detach())
    own = torch.stack([loss(expert, labels) for expert in experts.unbind(1)])
    return own.sum() + (1 - soft_f1(answer.sigmoid(), labels)).mean()

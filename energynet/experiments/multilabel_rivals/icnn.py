"""ICNN: a network that is convex in the labels, minimized with an entropy, and differentiated through the minimizer."""

import torch
from torch import Tensor, nn

from energynet import Anderson, ImplicitAdjoint, Solution, Termination, fixed_point
from energynet.diagnostics import contraction_factor
from energynet.experiments.models import Size
from energynet.experiments.solves import SolveLog

from .base import FeatureNetwork, LabelModel

FORWARD = Termination(atol=0.0, rtol=1e-4, max_steps=200)
BACKWARD = Termination(rtol=1e-3, max_steps=200)


class ConvexLabelNetwork(nn.Module):
    r"""A partially input-convex network: convex in y whatever its weights, not in the input's features h.

    .. math::
        v_1 = \mathrm{softplus}(A (y \circ a(h)) + B h + b), \quad
        v_2 = \mathrm{softplus}(W^+ (v_1 \circ a_1(h)^+) + D y + d), \quad
        f = w^{+\top} v_2 - s^\top y.

    Example:
        >>> ConvexLabelNetwork(Size(6, 3, hidden=4))(torch.rand(5, 3), torch.ones(5, 3), torch.ones(5, 4)).shape
        torch.Size([5])

    Source: Amos, Xu and Kolter (2017), Input convex neural networks, the partially convex architecture.
    """

    def __init__(self, size: Size, *, num_units: int = 64) -> None:
        super().__init__()
        self.gate, self.unit_gate = nn.Linear(size.hidden, size.num_labels), nn.Linear(size.hidden, num_units)
        self.labels = nn.Linear(size.num_labels, num_units, bias=False)
        self.inputs = nn.Linear(size.hidden, num_units)
        self.skip = nn.Linear(size.num_labels, num_units)
        self.mixing = nn.Parameter(torch.randn(num_units, num_units) - 4)  # its softplus counts
        self.weight = nn.Parameter(torch.full((num_units,), -3.0))  # likewise

    def forward(self, y: Tensor, scores: Tensor, hidden: Tensor) -> Tensor:  # (B, L), (B, L), (B, hidden) -> (B,)
        softplus = nn.functional.softplus
        first = softplus(self.labels(y * self.gate(hidden)) + self.inputs(hidden))
        second = softplus((first * softplus(self.unit_gate(hidden))) @ softplus(self.mixing).T + self.skip(y))
        return second @ softplus(self.weight) - (scores * y).sum(-1)


class ICNN(LabelModel):
    """The minimizer over [0, 1]^L of a convex network minus the entropy of y.

    Taken: the partially convex network, the entropy that keeps the minimizer inside, and exact gradients through it.

    What differs: the minimizer is found as a fixed point of entropic descent with Anderson's acceleration, to a tolerance and
    for each sample, in place of a few steps of the bundle method; the loss is the experiment's.

    Args:
        size: sizes.
        damping: γ of the descent step whose fixed point is sought.

    Source: Amos, Xu and Kolter (2017), Input convex neural networks.
    """

    def __init__(self, size: Size, *, damping: float = 0.5) -> None:
        super().__init__()
        self.features, self.energy, self.damping = FeatureNetwork(size), ConvexLabelNetwork(size), damping
        self.solves = SolveLog()

    def forward(self, z: Tensor) -> Tensor:
        return self.solve(z).value

    def solve(self, z: Tensor) -> Solution:
        """The logits of the minimizer, and how the solve went."""
        hidden, scores = self.features(z)
        adjoint = ImplicitAdjoint(termination=BACKWARD, report=self.solves.report)
        step = _Descent(self.energy, self.damping)
        return self.solves.add(fixed_point(step, scores.detach(), scores, hidden, solver=Anderson(), termination=FORWARD,
                                           adjoint=adjoint, on_failure="warn"))  # fmt: skip

    def spectral_radius(self, z: Tensor) -> Tensor:
        hidden, scores = (t.detach() for t in self.features(z))
        return contraction_factor(_Descent(self.energy, self.damping), self.solve(z), scores, hidden)


class _Descent(nn.Module):
    """u ← u − γ (∇f(σ(u)) + u), at rest where f − H has its minimum."""

    def __init__(self, energy: ConvexLabelNetwork, step_size: float) -> None:
        super().__init__()
        self.energy, self.step_size = energy, step_size

    def forward(self, u: Tensor, scores: Tensor, hidden: Tensor) -> Tensor:  # (B, L), (B, L), (B, hidden) -> (B, L)
        slope = torch.func.grad(lambda y: self.energy(y, scores, hidden).sum())(u.sigmoid())
        return u - self.step_size * (slope + u)

"""FPI_GD as its authors ran it on Bibtex, with the traps of that setting."""

import torch
from torch import Tensor, nn

from energynet.diagnostics import contraction_factor
from energynet.experiments.models import Size
from energynet.experiments.solves import SolveLog

from .base import LabelModel

TERMS = 3


class PaperFPI(LabelModel):
    """FPI_GD in the paper's own setting: E(x; z) = mean of relu(W [z; σ(x)] + b)² over the hidden units.

    Taken: the energy, without dropout; logits that start at 0; step size 1; one stopping rule for the whole batch, on the last
    move, ‖x_new − x‖² < 10⁻⁴, not divided by anything; a backward iteration that in this setting always stops after three
    terms of the Neumann series.

    What differs: at most `max_steps` steps forward, since the energy has no finite minimizer for some logits and takes more
    than 10,000 steps a batch once trained; W is kept in two parts, so that W z is computed once per solve; epoch and threshold
    are chosen on held-out rows and not on the test set.

    Args:
        size: sizes; `hidden` units of the energy.
        max_steps: of the forward iteration.
        tolerance: of the squared length of the last move of the whole batch.

    Source: arXiv 2002.02868, section on multi-label classification, and the released experiment's settings.
    """

    def __init__(self, size: Size, *, max_steps: int = 500, tolerance: float = 1e-4) -> None:
        super().__init__()
        self.inputs = nn.Linear(size.num_features, size.hidden)
        self.labels = nn.Linear(size.num_labels, size.hidden, bias=False)
        self.max_steps, self.tolerance, self.solves = max_steps, tolerance, SolveLog()

    def forward(self, z: Tensor) -> Tensor:
        code = self.inputs(z)
        x = self.solve(code.detach())
        if not torch.is_grad_enabled():
            return x
        x.requires_grad_()
        again = self.step(x, code.detach())  # (∂g/∂x)ᵀ is read off this graph
        answer = self.step(x.detach(), code)
        answer.register_hook(lambda gradient: _neumann(again, x, gradient))
        return answer

    @torch.no_grad()
    def solve(self, code: Tensor) -> Tensor:  # (B, hidden) -> (B, L)
        """Iterate from 0 until the whole batch moves little."""
        x = code.new_zeros(len(code), self.labels.in_features)
        steps, moved = 0, torch.inf
        while moved >= self.tolerance and steps < self.max_steps:
            before, x, steps = x, self.step(x, code), steps + 1
            moved = float((x - before).square().sum())
        self.solves.add_steps(steps, float(moved < self.tolerance))
        return x.detach()

    def spectral_radius(self, z: Tensor) -> Tensor:
        code = self.inputs(z).detach()
        return contraction_factor(self.step, self.solve(code), code)

    def step(self, x: Tensor, code: Tensor) -> Tensor:  # (B, L), (B, hidden) -> (B, L)
        """x − ∇E(x), the gradient written out."""
        y = x.sigmoid()
        units = (self.labels(y) + code).relu()
        return x - 2 / units.shape[-1] * (units @ self.labels.weight) * y * (1 - y)


def _neumann(again: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Σ_k<3 (Jᵀ)ᵏ v."""
    total = term = gradient
    for _ in range(TERMS - 1):
        (term,) = torch.autograd.grad(again, x, term, retain_graph=True)
        total = total + term
    return total

"""Measurements at the points where a failed solve began and ended, on which the error message is based.

They are evaluated after a failure, on plain tensors, so they cost a successful solve nothing.
"""

import dataclasses
import itertools
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from energynet._torch.autodiff import linearize
from energynet.engine.equation import Equation, Linear
from energynet.engine.loop import loop
from energynet.engine.tasks import Outcome
from energynet.solvers import Solver
from energynet.solvers.problem import Descent, Proximal
from energynet.solvers.spectrum import arnoldi, ritz_values, some_direction
from energynet.termination import Termination

PRODUCTS = 20  # Jacobian products from which eigenvalues are estimated
MORE_STEPS = 8  # additional steps from the last iterate, which show the rate of progress
PARTS = (1e-3, 1e-2, 1e-1, 1.0)  # fractions of the distance to the solution at which the energy is evaluated downhill
FARTHER = (1.0, 10.0, 1000.0)  # multiples of the distance between x0 and the last iterate


@dataclasses.dataclass(frozen=True, eq=False)
class PostMortem:
    """A solve that failed for some samples; every mask is ``(*batch)``."""

    equation: Equation
    solver: Solver
    termination: Termination
    outcome: Outcome
    start: Tensor  # (*batch, n)
    inputs: tuple[Tensor, ...]

    @cached_property
    def problem(self) -> Any:
        """The `Problem` that was solved."""
        return self.equation.problem(self.inputs, self.start)

    @property
    def end(self) -> Tensor:
        return self.outcome.value

    @property
    def nobody(self) -> Tensor:
        """A mask that is False for every sample."""
        return torch.zeros_like(self.outcome.status, dtype=torch.bool)

    # ------------------------------------------------------------------------------------------------- values

    def own_input_is_nonfinite(self) -> Tensor:
        """Samples whose row of the context (for an adjoint equation, of the incoming gradient) contains NaN or Inf."""
        bad = self.nobody
        for t in self.inputs[:1] if isinstance(self.equation, Linear) else self.inputs[self.equation.num_shared :]:
            if t.is_floating_point() and t.ndim >= bad.ndim and t.shape[: bad.ndim] == bad.shape:
                bad = bad | ~torch.isfinite(t).flatten(bad.ndim).all(-1) if t.ndim > bad.ndim else bad | ~torch.isfinite(t)
        return bad

    def shared_input_is_nonfinite(self) -> Tensor:
        """Every sample, if a parameter or another shared tensor contains NaN or Inf."""
        skipped = 2 if isinstance(self.equation, Linear) else 0
        shared = [t for t in self.inputs[skipped:] if t.is_floating_point() and t.shape[: self.nobody.ndim] != self.nobody.shape]
        bad = any(not bool(torch.isfinite(t).all()) for t in shared)
        return torch.full_like(self.nobody, bad)

    def start_is_nonfinite(self) -> Tensor:
        return ~torch.isfinite(self.start).all(-1)

    @cached_property
    def _first(self) -> tuple[Tensor, Tensor]:
        """The energy (zero for a map) and the optimality condition at x0."""
        if isinstance(self.problem, Descent):
            return self.problem.value_and_gradient(self.start)
        residual = self.problem.residual(self.start)
        return torch.zeros_like(residual.sum(-1)), residual

    def value_at_start_is_nonfinite(self) -> Tensor:
        """Whether g(x0), for a map, or E(x0), for an energy, is not finite."""
        value, residual = self._first
        return ~torch.isfinite(value) if isinstance(self.problem, Descent) else ~torch.isfinite(residual).all(-1)

    def slope_at_start_is_nonfinite(self) -> Tensor:
        return ~torch.isfinite(self._first[1]).all(-1)

    # ------------------------------------------------------------------------------------------------- energies

    def falls_for_ever(self) -> Tensor:
        """Whether the energy keeps decreasing in the direction from x0 to the last iterate, as far as it is evaluated."""
        value, slope = self.problem.value_and_gradient(self.end)
        size = torch.linalg.vector_norm(slope, dim=-1, keepdim=True)
        length = 1 + torch.linalg.vector_norm(self.end, dim=-1, keepdim=True)
        way = torch.where(self.end == self.start, -length * slope / torch.where(size > 0, size, 1), self.end - self.start)
        before = value
        falls = (way != 0).any(-1)
        for k, far in enumerate(FARTHER):
            energy = self.problem.energy(self.end + far * way)
            falls = falls & ((energy < before) if k == 0 else (energy <= before))
            before = energy
        return falls

    def fall_per_step(self) -> tuple[Tensor, Tensor]:  # (*batch) twice
        """The decrease of the energy per step over a few more steps, and the part of it that may be a rounding error."""
        limits = dataclasses.replace(self.termination, atol=0.0, rtol=0.0, max_steps=MORE_STEPS, budget=None)
        state = loop(self.problem, self.solver, limits, self.end)
        before = self.problem.energy(self.end)
        noise = 8 * torch.finfo(before.dtype).eps * before.abs()
        return (before - self.problem.energy(state.x)) / torch.clamp(state.steps, min=1), noise / MORE_STEPS

    @cached_property
    def _ways(self) -> tuple[Tensor, list[Tensor]]:
        """∇E at the end, and ways along F, which is ∇E too without a prox: within the estimated distance, and farther."""
        _, slope = self.problem.value_and_gradient(self.end)
        uphill = self.problem.residual(self.end) if isinstance(self.problem, Proximal) else slope
        size = torch.linalg.vector_norm(uphill, dim=-1, keepdim=True)
        unit = uphill / torch.where(size > 0, size, 1)
        length = 1 + torch.linalg.vector_norm(self.end, dim=-1, keepdim=True)
        error = self.outcome.error.unsqueeze(-1).to(length.dtype)
        error = torch.where(error > 0, torch.minimum(error, length), length)
        ways = [*(part * error for part in PARTS), torch.finfo(self.end.dtype).eps ** 0.125 * length]
        return slope, [way * unit for way in ways]

    @cached_property
    def _downhill(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """∇E at the end, and the energy and ∇E downhill."""
        slope, ways = self._ways
        return slope, [self.problem.value_and_gradient(self.end - way) for way in ways]

    def beside_a_wall(self) -> Tensor:
        """Whether the energy is not finite at points a little farther uphill: its gradient may seem to jump from there on."""
        return torch.stack([~torch.isfinite(self.problem.energy(self.end + way)) for way in self._ways[1]]).any(0)

    def at_a_wall(self) -> Tensor:
        """Whether the energy is not finite at points a little farther downhill."""
        return torch.stack([~torch.isfinite(energy) for energy, _ in self._downhill[1]]).any(0)

    def at_a_kink(self) -> Tensor:
        """Whether the gradient jumps: farther downhill it has changed no more than nearby, or far more than proportionally."""
        slope, there = self._downhill
        *change, most = [torch.linalg.vector_norm(other - slope, dim=-1) for _, other in there]
        least = torch.maximum(0.1 * torch.linalg.vector_norm(slope, dim=-1), 0.01 * most)  # smaller changes may be rounding
        pairs = list(itertools.pairwise(change))
        saturated = [(near > least) & (far < 3 * near) for near, far in pairs]
        jumped = [(far > least) & (far > 30 * near) for near, far in pairs]
        return torch.stack(saturated + jumped).any(0) & (least > 0)

    def step_size_limit(self, x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
        """2/L for the largest curvature L at a point; infinite where no positive curvature was found."""
        largest = ritz_values(self.problem.jacobian(x), some_direction(torch.zeros_like(x)), PRODUCTS).amax(-1)
        return torch.where(largest > 0, 2 / largest, torch.inf)

    def step_size(self) -> Tensor:  # (*batch)
        """γ as it was passed; NaN if it was not."""
        size = self.problem.step_size
        size = torch.nan if size is None else size.squeeze(-1) if isinstance(size, Tensor) else size
        return torch.zeros_like(self.outcome.error) + size

    # ------------------------------------------------------------------------------------------------- maps

    @cached_property
    def eigenvalues(self) -> Tensor:  # (*batch, m), complex
        """Eigenvalues of ∂g/∂x at the end, or at x0 where the end is too far away; of the map of an adjoint equation."""
        if isinstance(self.equation, Linear):
            product, like = self.problem.jacobian(self.end), self.end
        else:
            lost = ~torch.isfinite(self.end).all(-1, keepdim=True) | (self.end.abs() > 1e3 * (1 + self.start.abs())).any(-1, True)
            like = torch.where(lost, self.start, self.end)
            product = linearize(self.problem.residual, like, transposed=False)
        return 1 - arnoldi(product, some_direction(torch.zeros_like(like)), PRODUCTS)

    def contraction_factor(self) -> Tensor:  # (*batch)
        """The spectral radius of ∂g/∂x."""
        return self.eigenvalues.abs().amax(-1)

    def damping(self) -> Tensor:  # (*batch)
        """The damping factor that would make the map contract; NaN where an eigenvalue shows that none does."""
        values = self.eigenvalues
        limit = (2 * (1 - values.real) / (1 - values).abs().square()).amin(-1)
        return torch.where((values.real < 1).all(-1), 0.5 * torch.clamp(limit, max=1.6), torch.nan)

    # ------------------------------------------------------------------------------------------------- linear equations

    def spectrum(self) -> tuple[Tensor, Tensor]:  # (*batch) twice
        """Estimates of the extreme eigenvalues of a symmetric matrix."""
        right = self.problem.right
        values = ritz_values(self.problem.jacobian(right), some_direction(right), PRODUCTS)
        return values.amin(-1), values.amax(-1)

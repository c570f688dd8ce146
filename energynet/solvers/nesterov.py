"""Nesterov's method: the fixed-point iteration with momentum."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet.solvers.base import Solver
from energynet.solvers.guard import Guarded, attempt, look
from energynet.solvers.problem import Descent, Problem
from energynet.step import Kind


class NesterovState(NamedTuple):
    residual: Tensor  # F(y), (*batch, n), at the current, extrapolated point y
    previous: Tensor  # the last g(y), (*batch, n)
    age: Tensor  # t of Nesterov's sequence 1, 1.62, 2.19, ..., (*batch)


class GuardedNesterovState(NamedTuple):
    residual: Tensor
    previous: Tensor
    age: Tensor
    guarded: Guarded


@dataclasses.dataclass(frozen=True)
class Nesterov(Solver):
    """Accelerated descent, x ← g(y) with y ← x + β (x − x_before), restarted for each sample whose momentum points uphill.

    It takes one evaluation per step; on a `ProximalStep` it is FISTA. It returns y, where F is known. Bounds and zeros that
    hold at two consecutive x also hold at y; other constraints may be violated by up to the tolerance. If γ is estimated and
    turns out too large, it is halved.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> valley = lambda x: 0.5 * (torch.tensor([1.0, 100.0]) * (x - 1).square()).sum(-1)
        >>> int(minimize(valley, torch.zeros(1, 2), step_size=0.01, solver=Nesterov()).num_steps) < 100
        True

    Args:
        restart: whether to reset the momentum when it forms an obtuse angle with the move of g.

    Source: Nesterov (1983); Beck and Teboulle (2009), FISTA; O'Donoghue and Candès (2015), the gradient restart scheme.
    """

    restart: bool = True
    contracts: ClassVar[bool] = True
    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.MAP, Kind.ENERGY, Kind.BOUNDED})

    def __post_init__(self) -> None:
        if not isinstance(self.restart, bool):
            raise TypeError(f"Nesterov needs True or False as restart, got {self.restart!r}.")

    def init(self, problem: Problem, x0: Tensor) -> NesterovState | GuardedNesterovState:
        age = torch.ones_like(x0.detach().sum(-1))
        if isinstance(problem, Descent) and problem.guessed:
            residual, guarded = look(problem, x0, problem.each_gamma(x0))
            return GuardedNesterovState(residual, x0, age, guarded)
        return NesterovState(problem.residual(x0), x0, age)

    def update(self, problem: Problem, x: Tensor, state: NesterovState | GuardedNesterovState) -> tuple[Tensor, NamedTuple]:
        if isinstance(state, GuardedNesterovState) and isinstance(problem, Descent):
            return self._guarded_update(problem, x, state)
        moved = problem.move(x, state.residual)
        y, older = self._extrapolated(x, moved, state.previous, state.age)
        return y, NesterovState(problem.residual(y), moved, older)

    def _guarded_update(self, problem: Descent, x: Tensor, state: GuardedNesterovState) -> tuple[Tensor, GuardedNesterovState]:
        moved = x - state.guarded.gamma * state.residual
        trial, older = self._extrapolated(x, moved, state.previous, state.age)
        x, taken, residual, guarded = attempt(problem, x, trial, state.guarded)
        # The momentum may have caused the rejection; without it, a sufficiently short step is always accepted.
        age = torch.where(taken.squeeze(-1), older, 1)
        return x, GuardedNesterovState(residual, torch.where(taken, moved, state.previous), age, guarded)

    def _extrapolated(self, x: Tensor, moved: Tensor, previous: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        """The extrapolated point, and the new age of the momentum."""
        change = moved - previous
        if self.restart:
            uphill = ((x - moved) * change).detach().sum(-1) > 0
            age = torch.where(uphill, 1, age)
        older = 0.5 + (0.25 + age.square()).sqrt()
        return moved + ((age - 1) / older).unsqueeze(-1) * change, older

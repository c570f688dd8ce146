"""Nesterov: Picard with momentum."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet.problem import Problem
from energynet.solvers.base import Solver
from energynet.step import Kind


class NesterovState(NamedTuple):
    residual: Tensor  # F(y), (*batch, n), at the current, extrapolated point y
    previous: Tensor  # the last g(y), (*batch, n)
    age: Tensor  # t of Nesterov's sequence 1, 1.62, 2.19, ..., (*batch)


@dataclasses.dataclass(frozen=True)
class Nesterov(Solver):
    """Accelerated descent, x ← g(y) with y ← x + β (x − x_before), restarted sample by sample where momentum points uphill.

    One evaluation a step; on a `ProximalStep` it is FISTA. What it returns is y, where F is known. Bounds and zeros that
    have held for two steps hold there as they do at x; another constraint may be exceeded by the tolerance.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> valley = lambda x: 0.5 * (torch.tensor([1.0, 100.0]) * (x - 1).square()).sum(-1)
        >>> int(minimize(valley, torch.zeros(1, 2), step_size=0.01, solver=Nesterov()).num_steps) < 100
        True

    Args:
        restart: whether to drop the momentum where it makes an obtuse angle with the move that g proposes.

    Source: Nesterov (1983); Beck and Teboulle (2009), FISTA; O'Donoghue and Candès (2015), the gradient restart scheme.
    """

    restart: bool = True
    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.MAP, Kind.ENERGY})

    def init(self, problem: Problem, x0: Tensor) -> NesterovState:
        return NesterovState(problem.residual(x0), x0, torch.ones_like(x0.detach().sum(-1)))

    def update(self, problem: Problem, x: Tensor, state: NesterovState) -> tuple[Tensor, NesterovState]:
        moved = problem.move(x, state.residual)
        change = moved - state.previous
        age = state.age
        if self.restart:
            uphill = ((x - moved) * change).detach().sum(-1) > 0
            age = torch.where(uphill, 1, age)
        older = 0.5 + (0.25 + age.square()).sqrt()
        y = moved + ((age - 1) / older).unsqueeze(-1) * change
        return y, NesterovState(problem.residual(y), moved, older)

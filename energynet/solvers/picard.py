"""Picard iteration, which takes the map's own step."""

import dataclasses
from typing import ClassVar, NamedTuple

from torch import Tensor

from energynet.solvers.base import Solver
from energynet.solvers.guard import Guarded, attempt, look
from energynet.solvers.problem import Descent, Problem


class PicardState(NamedTuple):
    residual: Tensor  # F(x), (*batch, n)


class GuardedPicardState(NamedTuple):
    residual: Tensor  # F(x), (*batch, n)
    guarded: Guarded


@dataclasses.dataclass(frozen=True)
class Picard(Solver):
    """The plain fixed-point iteration x ← g(x); for a gradient step, this is gradient descent.

    It converges linearly at the contraction factor of g, with one evaluation per step. If γ is estimated and turns out too
    large, it is halved.

    Example:
        >>> import torch
        >>> from energynet import fixed_point
        >>> fixed_point(torch.cos, torch.zeros(1, 1), solver=Picard()).value.round(decimals=2)
        tensor([[0.7400]])

    Source: Banach (1922); the forward and the backward iteration of arXiv 2002.02868.
    """

    follows: ClassVar[bool] = True
    sees_saddles: ClassVar[bool] = True  # it diverges at saddles
    contracts: ClassVar[bool] = True

    def init(self, problem: Problem, x0: Tensor) -> PicardState | GuardedPicardState:
        if isinstance(problem, Descent) and problem.guessed:
            return GuardedPicardState(*look(problem, x0, problem.each_gamma(x0)))
        return PicardState(problem.residual(x0))

    def update(self, problem: Problem, x: Tensor, state: PicardState | GuardedPicardState) -> tuple[Tensor, NamedTuple]:
        if isinstance(state, GuardedPicardState) and isinstance(problem, Descent):
            x, _, residual, guarded = attempt(problem, x, x - state.guarded.gamma * state.residual, state.guarded)
            return x, GuardedPicardState(residual, guarded)
        x = problem.move(x, state.residual)
        return x, PicardState(problem.residual(x))

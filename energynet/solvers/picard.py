"""Picard: take the map's own step."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from energynet.problem import Problem
from energynet.solvers.base import Solver


class PicardState(NamedTuple):
    residual: Tensor  # F(x), (*batch, n)


@dataclasses.dataclass(frozen=True)
class Picard(Solver):
    """Plain fixed-point iteration x ← g(x); on a gradient step, gradient descent.

    Converges linearly at the contraction factor of g, one evaluation a step.

    Example:
        >>> import torch
        >>> from energynet import fixed_point
        >>> fixed_point(torch.cos, torch.zeros(1, 1), solver=Picard()).value.round(decimals=2)
        tensor([[0.7400]])

    Source: Banach (1922); the forward and the backward iteration of arXiv 2002.02868.
    """

    def init(self, problem: Problem, x0: Tensor) -> PicardState:
        return PicardState(problem.residual(x0))

    def update(self, problem: Problem, x: Tensor, state: PicardState) -> tuple[Tensor, PicardState]:
        x = problem.move(x, state.residual)
        return x, PicardState(problem.residual(x))

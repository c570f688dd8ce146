"""Conjugate gradients for H u = v, batched per sample."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet.solvers.base import Solver
from energynet.solvers.problem import Linear
from energynet.solvers.vectors import dot
from energynet.step import Kind


class ConjugateGradientState(NamedTuple):
    residual: Tensor  # H u − v, (*batch, n), by recurrence
    direction: Tensor  # p, (*batch, n)
    curvature: Tensor  # (*batch), the largest pᵀHp / pᵀp so far
    broken: Tensor  # (*batch) bool, whether a direction without positive curvature was found


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients for a symmetric positive definite H: exact after n steps, accurate after about √κ steps for a
    condition number κ.

    If the curvature in some direction is not positive, the point is not a strict minimum, and the sample is reported as
    DIVERGED.

    Example:
        >>> import torch
        >>> from energynet import FPI_GD, ImplicitAdjoint
        >>> layer = FPI_GD(lambda x, z: 0.5 * (x - z).square().sum(-1), 1.0, adjoint=ImplicitAdjoint(ConjugateGradient()))
        >>> z = torch.ones(1, 2, requires_grad=True)
        >>> torch.autograd.grad(layer(z, x0=torch.zeros(1, 2)).sum(), z)[0].round(decimals=4)
        tensor([[1., 1.]])

    Source: Hestenes and Stiefel (1952).
    """

    sees_saddles: ClassVar[bool] = True
    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.SYMMETRIC})
    exact_residual: ClassVar[bool] = False

    def init(self, problem: Linear, x0: Tensor) -> ConjugateGradientState:
        residual = problem.residual(x0)
        none = torch.zeros_like(dot(residual, residual))
        return ConjugateGradientState(residual, -residual, none, none.bool())

    def update(self, problem: Linear, x: Tensor, state: ConjugateGradientState) -> tuple[Tensor, ConjugateGradientState]:
        residual, p = state.residual, state.direction
        hp = problem.hvp(x, p)
        before, along, length = dot(residual, residual), dot(p, hp), dot(p, p)
        curvature = torch.maximum(state.curvature, torch.where(length > 0, along / length, 0))
        broken = (length > 0) & ~(along > torch.finfo(x.dtype).eps * curvature * length) & torch.isfinite(along)
        alpha = torch.where(broken | (length == 0), 0, before / along)
        x = x + alpha * p
        residual = residual + alpha * hp
        p = torch.where(before > 0, dot(residual, residual) / before, 0) * p - residual
        return x, ConjugateGradientState(residual, p, curvature, broken)

    def breakdown(self, state: ConjugateGradientState) -> Tensor:
        return state.broken.squeeze(-1)

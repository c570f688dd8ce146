"""Conjugate gradients for H u = v, batched per sample."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet.solvers.base import Solver
from energynet.solvers.preconditioner import Preconditioner, check_preconditioner
from energynet.solvers.problem import Linear
from energynet.solvers.vectors import dot
from energynet.step import Kind


class ConjugateGradientState(NamedTuple):
    """Scalars are ``(*batch, 1)``; M is the preconditioner."""

    residual: Tensor  # r = H u − v, (*batch, n), by recurrence
    direction: Tensor  # p, (*batch, n)
    product: Tensor  # rᵀM⁻¹r
    length: Tensor  # pᵀM p, by recurrence
    curvature: Tensor  # the largest pᵀHp / pᵀMp so far
    broken: Tensor  # bool, whether a direction without positive curvature was found


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(Solver):
    """Conjugate gradients for a symmetric positive definite H: exact after n steps, accurate after about √κ steps for a
    condition number κ, which is that of M⁻¹H with a preconditioner M.

    If the curvature in some direction is not positive, the point is not a strict minimum, and the sample is reported as
    DIVERGED.

    Example:
        >>> import torch
        >>> from energynet import FPI_GD, ImplicitAdjoint
        >>> layer = FPI_GD(lambda x, z: 0.5 * (x - z).square().sum(-1), 1.0, adjoint=ImplicitAdjoint(ConjugateGradient()))
        >>> z = torch.ones(1, 2, requires_grad=True)
        >>> torch.autograd.grad(layer(z, x0=torch.zeros(1, 2)).sum(), z)[0].round(decimals=4)
        tensor([[1., 1.]])

    Args:
        preconditioner: `HessianDiagonal`, `HessianBlocks`, or a function of the solution and the context that returns
            p -> M⁻¹ p, both in the shape of x, with M symmetric and positive definite. If the energy has an ``encode``, the
            function receives its result in place of the context. It is called once per solve, and changes the speed but not
            the result.

    Raises:
        TypeError: if the preconditioner is not valid.

    Source: Hestenes and Stiefel (1952); Golub and Van Loan (2013), Matrix computations, section 11.5.
    """

    sees_saddles: ClassVar[bool] = True
    measures_first: ClassVar[bool] = True
    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.SYMMETRIC})
    exact_residual: ClassVar[bool] = False
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_preconditioner(self.preconditioner, "preconditioner")

    def init(self, problem: Linear, x0: Tensor) -> ConjugateGradientState:
        residual = problem.residual(x0)
        z = problem.first_inverse(self.preconditioner)(residual)
        product = dot(residual, z)
        none = torch.zeros_like(product)
        return ConjugateGradientState(residual, -z, product, product, none, none.bool())

    def update(self, problem: Linear, x: Tensor, state: ConjugateGradientState) -> tuple[Tensor, ConjugateGradientState]:
        p, before, length = state.direction, state.product, state.length
        hp = problem.hvp(x, p)
        along = dot(p, hp)
        curvature = torch.maximum(state.curvature, torch.where(length > 0, along / length, 0))
        flat = torch.as_tensor(problem.flat, dtype=x.dtype, device=x.device).unsqueeze(-1)
        lost = torch.maximum(torch.finfo(x.dtype).eps * curvature, flat)
        broken = (length > 0) & ~(along > lost * length) & torch.isfinite(along)
        alpha = torch.where(broken | (length == 0), 0, before / along)
        x = x + alpha * p
        residual = state.residual + alpha * hp
        z = problem.first_inverse(self.preconditioner)(residual)
        product = dot(residual, z)
        beta = torch.where(before > 0, product / before, 0)
        length = product + beta.square() * length
        return x, ConjugateGradientState(residual, beta * p - z, product, length, curvature, broken)

    def breakdown(self, state: ConjugateGradientState) -> Tensor:
        return state.broken.squeeze(-1)

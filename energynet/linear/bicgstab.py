"""BiCGSTAB for A u = v, batched per sample."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet.linear._arithmetic import divide, singular, working_residual
from energynet.solvers.base import Solver
from energynet.solvers.problem import Linear
from energynet.solvers.vectors import dot, length
from energynet.step import Kind


class BiCGSTABState(NamedTuple):
    """Vectors are ``(*batch, n)`` and scalars ``(*batch, 1)``, all in float32 or better."""

    residual: Tensor  # r = A u − v, by recurrence
    shadow: Tensor  # r̃, approximately the residual at the last restart
    direction: Tensor  # p
    rho: Tensor  # r̃ᵀr, from which p was computed
    norm: Tensor  # the largest ‖A p‖ / ‖p‖ so far
    lost: Tensor  # bool, whether the sample has just broken down and restarts here
    broken: Tensor  # bool


@dataclasses.dataclass(frozen=True)
class BiCGSTAB(Solver):
    """Stabilized biconjugate gradients for any square A: two products per step, and memory that does not grow.

    If a denominator vanishes, the method restarts from the current point. If this happens again immediately, as for a
    singular or a skew-symmetric A, the sample is reported as DIVERGED.

    Example:
        >>> import torch
        >>> from energynet import FPI_NN, ImplicitAdjoint
        >>> from energynet.linear import BiCGSTAB
        >>> turn = torch.tensor([[0.0, 0.9], [-0.9, 0.0]])
        >>> layer = FPI_NN(lambda x, z: x @ turn + z, start=torch.zeros_like, adjoint=ImplicitAdjoint(BiCGSTAB()))
        >>> z = torch.ones(1, 2, requires_grad=True)
        >>> torch.autograd.grad(layer(z)[:, 0].sum(), z)[0].round(decimals=3)
        tensor([[ 0.5520, -0.4970]])

    Source: van der Vorst (1992).
    """

    measures_first: ClassVar[bool] = True
    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.LINEAR, Kind.SYMMETRIC})
    exact_residual: ClassVar[bool] = False

    def init(self, problem: Linear, x0: Tensor) -> BiCGSTABState:
        residual = working_residual(problem, x0)
        rho = dot(residual, residual)
        none = torch.zeros_like(rho)
        return BiCGSTABState(residual, residual, residual, rho, none, none.bool(), none.bool())

    def update(self, problem: Linear, x: Tensor, state: BiCGSTABState) -> tuple[Tensor, BiCGSTABState]:
        p, shadow, eps = state.direction, state.shadow, torch.finfo(state.rho.dtype).eps
        ap = problem.hvp(x, p.to(x.dtype)).to(p.dtype)
        norm = torch.maximum(state.norm, divide(length(ap), length(p)))
        along = dot(shadow, ap)
        alpha = torch.where(along.abs() > eps * norm * length(shadow) * length(p), divide(state.rho, along), 0)
        half = state.residual - alpha * ap
        image = problem.hvp(x, half.to(x.dtype)).to(p.dtype)
        across, size = dot(image, half), length(image)
        omega = torch.where(across.abs() > eps * norm * length(half) * size, divide(across, size**2), 0)
        x = x - (alpha * p + omega * half).to(x.dtype)
        residual = half - omega * image
        rho = dot(shadow, residual)
        lost = (alpha == 0) | (omega == 0) | (rho.abs() <= eps * length(shadow) * length(residual))
        lost = lost & (half != 0).any(-1, keepdim=True) & torch.isfinite(size)
        p = residual + divide(rho * alpha, state.rho * omega) * (p - omega * ap)
        # If rᵀA r = 0, r itself cannot serve as the shadow residual; adding the direction of A r solves this.
        turned = residual + torch.where(omega == 0, divide(image * length(residual), size), 0)
        p, shadow = torch.where(lost, residual, p), torch.where(lost, turned, shadow)
        rho = torch.where(lost, dot(shadow, residual), rho)
        broken = (lost & state.lost) | singular(problem, x, norm)
        return x, BiCGSTABState(residual, shadow, p, rho, norm, lost, broken)

    def breakdown(self, state: BiCGSTABState) -> Tensor:
        return state.broken.squeeze(-1)

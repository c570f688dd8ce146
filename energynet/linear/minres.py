"""MINRES for H u = v with a symmetric H, definite or not, batched per sample."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet.linear._arithmetic import divide, singular, working_residual
from energynet.solvers.base import Solver
from energynet.solvers.problem import Linear
from energynet.solvers.vectors import length
from energynet.step import Kind


class MINRESState(NamedTuple):
    """Vectors are ``(*batch, n)`` and scalars ``(*batch, 1)``, all in float32 or better."""

    residual: Tensor  # H u − v, by recurrence
    lanczos: Tensor  # q, unit, the newest Lanczos vector
    last_lanczos: Tensor
    direction: Tensor  # d, the newest column of Q R⁻¹
    last_direction: Tensor
    beta: Tensor  # off-diagonal entry of the Lanczos matrix T that links the two Lanczos vectors
    cosine: Tensor  # the cosine of the last rotation
    sine: Tensor
    above: Tensor  # entry of R above the next diagonal one, before the last rotation
    corner: Tensor  # entry of R two above the next diagonal one
    size: Tensor  # ‖residual‖, with the sign from the rotations
    norm: Tensor  # the largest column of T so far, a lower bound of ‖H‖
    broken: Tensor  # bool


@dataclasses.dataclass(frozen=True)
class MINRES(Solver):
    """Minimizes the residual over the Krylov space of a symmetric H, which may be indefinite, by short recurrences.

    A saddle is not the solution of a minimization, so `minimize` and `FPI_GD` report it; `implicit` with ``symmetric=True``
    gives the exact derivative of the stationary point. A singular H for which no u exists is reported as DIVERGED.

    Example:
        >>> import torch
        >>> from energynet import ImplicitAdjoint, implicit
        >>> from energynet.linear import MINRES
        >>> slope = lambda x, z: torch.stack([x[0], -x[1]]) + z                       # of ½ x₀² − ½ x₁² + xᵀz
        >>> saddle = implicit(lambda z: torch.stack([-z[0], z[1]]), slope, symmetric=True, adjoint=ImplicitAdjoint(MINRES()))
        >>> torch.func.jacrev(saddle)(torch.ones(2)).diagonal()
        tensor([-1.,  1.])

    Source: Paige and Saunders (1975); the stopping rule for singular systems is that of Choi, Paige and Saunders (2011).
    """

    measures_first: ClassVar[bool] = True
    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.SYMMETRIC})
    exact_residual: ClassVar[bool] = False

    def init(self, problem: Linear, x0: Tensor) -> MINRESState:
        residual = working_residual(problem, x0)
        size = length(residual)
        q, zero, none = -divide(residual, size), torch.zeros_like(residual), torch.zeros_like(size)
        return MINRESState(residual, q, zero, zero, zero, none, none - 1, none, none, none, size, none, none.bool())

    def update(self, problem: Linear, x: Tensor, state: MINRESState) -> tuple[Tensor, MINRESState]:
        q, c, s = state.lanczos, state.cosine, state.sine
        w = problem.hvp(x, q.to(x.dtype)).to(q.dtype) - state.beta * state.last_lanczos
        alpha = (w * q).sum(-1, keepdim=True)
        w = w - alpha * q
        beta = length(w)
        next_q = divide(w, beta)
        # Apply the last rotation to the new column of T, then a new one that annihilates beta.
        beside, before = c * state.above + s * alpha, s * state.above - c * alpha
        above, corner = -c * beta, s * beta
        diagonal = torch.hypot(before, beta)
        cosine, sine = divide(before, diagonal), divide(beta, diagonal)
        norm = torch.maximum(state.norm, torch.hypot(torch.hypot(alpha, beta), state.beta))
        d = divide(q - beside * state.direction - state.corner * state.last_direction, diagonal)
        # The next step can reduce r only if ‖H r‖ > 0; where that is below rounding errors, no u makes r smaller.
        stuck = (state.size != 0) & (torch.hypot(before, above) <= 10 * torch.finfo(norm.dtype).eps * norm)
        x = x + torch.where(stuck, 0, cosine * state.size * d).to(x.dtype)
        size = sine * state.size
        residual = torch.where(stuck, state.residual, sine**2 * state.residual + size * cosine * next_q)
        broken = stuck | singular(problem, x, norm)
        return x, MINRESState(residual, next_q, q, d, state.direction, beta, cosine, sine, above, corner, size, norm, broken)

    def breakdown(self, state: MINRESState) -> Tensor:
        return state.broken.squeeze(-1)

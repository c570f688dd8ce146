"""Restarted GMRES for A u = v, batched per sample."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet._torch.numbers import check_whole
from energynet.linear._arithmetic import divide, singular, working_residual
from energynet.solvers.base import Solver
from energynet.solvers.problem import Linear
from energynet.solvers.vectors import dot, length
from energynet.step import Kind


class GMRESState(NamedTuple):
    """All tensors are in float32 or better. The first ``filled`` rows of ``images`` are orthonormal; the others are unused."""

    residual: Tensor  # A u − v, (*batch, n), by recurrence
    direction: Tensor  # the unit vector for the next product, (*batch, n)
    directions: Tensor  # P, (*batch, m, n)
    images: Tensor  # Q = A P, (*batch, m, n)
    filled: Tensor  # (*batch, 1) int, the number of products in this cycle
    before: Tensor  # (*batch, 1), ‖residual‖ at the start of the cycle
    norm: Tensor  # (*batch, 1), the largest ‖A d‖ for a unit direction d
    broken: Tensor  # (*batch, 1) bool


@dataclasses.dataclass(frozen=True)
class GMRES(Solver):
    """Minimizes the residual over the Krylov space of any square A, and restarts after ``restart`` products.

    The images A p are kept orthonormal, so each of them removes its own component of the residual, and the point and residual
    are known after every product. The next direction is the residual, or the newest image if the residual stagnates, as for
    a skew-symmetric A, where the residual adds nothing to the space. In both cases the directions span the Krylov space, so
    the residuals are those of GMRES. The memory is 2 · restart vectors per sample.

    If the Krylov space cannot grow and does not contain u, A is singular, and the sample is reported as DIVERGED. So is a
    sample for which a whole cycle does not reduce the residual; a larger ``restart`` may help.

    Example:
        >>> import torch
        >>> from energynet import FPI_NN, ImplicitAdjoint
        >>> from energynet.linear import GMRES
        >>> turn = torch.tensor([[0.0, 0.9], [-0.9, 0.0]])
        >>> layer = FPI_NN(lambda x, z: x @ turn + z, start=torch.zeros_like, adjoint=ImplicitAdjoint(GMRES()))
        >>> z = torch.ones(1, 2, requires_grad=True)
        >>> torch.autograd.grad(layer(z)[:, 0].sum(), z)[0].round(decimals=3)
        tensor([[ 0.5520, -0.4970]])

    Args:
        restart: m, the number of products before the Krylov space is discarded.

    Raises:
        ValueError: if restart < 1.

    Source: Saad and Schultz (1986); in the form of Jiránek and Rozložník (2010), Adaptive version of simpler GMRES.
    """

    restart: int = 20
    measures_first: ClassVar[bool] = True
    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.LINEAR, Kind.SYMMETRIC})
    exact_residual: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole(self, "restart")

    def init(self, problem: Linear, x0: Tensor) -> GMRESState:
        residual = working_residual(problem, x0)
        size = length(residual)
        empty = torch.zeros_like(residual).unsqueeze(-2).expand(*x0.shape[:-1], self.restart, x0.shape[-1])
        none = torch.zeros_like(size)
        return GMRESState(residual, divide(residual, size), empty, empty, none.int(), size, none, none.bool())

    def update(self, problem: Linear, x: Tensor, state: GMRESState) -> tuple[Tensor, GMRESState]:
        direction = state.direction.to(x.dtype)
        image = problem.hvp(x, direction).to(state.residual.dtype)
        p, q = _orthogonal(direction.to(image.dtype), image, state)
        norm, size = torch.maximum(state.norm, length(image)), length(q)
        exhausted = (size <= 10 * torch.finfo(norm.dtype).eps * norm) & (state.residual != 0).any(-1, keepdim=True)
        size = torch.where(exhausted, 0, size)
        p, q = divide(p, size), divide(q, size)
        along = dot(q, state.residual)
        x = x - (along * p).to(x.dtype)
        state = self._grown(state, p, q, state.residual - along * q)
        return x, state._replace(norm=norm, broken=state.broken | exhausted | singular(problem, x, norm))

    def _grown(self, state: GMRESState, p: Tensor, q: Tensor, residual: Tensor) -> GMRESState:
        """The state with one more direction, or at the start of the next cycle."""
        here = (torch.arange(self.restart, device=p.device) == state.filled).unsqueeze(-1)
        directions = torch.where(here, p.unsqueeze(-2), state.directions)
        images = torch.where(here, q.unsqueeze(-2), state.images)
        full, size = state.filled + 1 == self.restart, length(residual)
        new = full | (size <= STAGNATION * length(state.residual))
        direction = torch.where(new, divide(residual, size), q)
        # If a cycle does not reduce the residual, the next one starts from the same point and repeats it.
        stuck = full & (size > (1 - torch.finfo(size.dtype).eps ** 0.5) * state.before)
        filled, before = torch.where(full, 0, state.filled + 1), torch.where(full, size, state.before)
        return GMRESState(residual, direction, directions, images, filled, before, state.norm, stuck)

    def breakdown(self, state: GMRESState) -> Tensor:
        return state.broken.squeeze(-1)


STAGNATION = 0.9  # if the residual keeps this fraction of its norm, it adds too little to the Krylov space


def _orthogonal(p: Tensor, q: Tensor, state: GMRESState) -> tuple[Tensor, Tensor]:
    """A direction and its image without their components along the earlier images."""
    used = torch.arange(state.images.shape[-2], device=p.device) < state.filled  # (*batch, m)
    total = torch.zeros_like(used, dtype=p.dtype)
    for _ in range(2):  # one pass leaves a rounding error that grows with the condition number; two are enough
        weights = torch.where(used, (state.images @ q.unsqueeze(-1)).squeeze(-1), 0)
        q = q - (weights.unsqueeze(-2) @ state.images).squeeze(-2)
        total = total + weights
    return p - (total.unsqueeze(-2) @ state.directions).squeeze(-2), q

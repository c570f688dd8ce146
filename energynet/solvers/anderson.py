"""Anderson acceleration (type II), batched per sample."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from energynet._torch.numbers import check_number, check_whole
from energynet.solvers.base import Solver
from energynet.solvers.problem import Problem


class AndersonState(NamedTuple):
    residual: Tensor  # F(x), (*batch, n)
    move: Tensor  # g(x) − x, (*batch, n)
    dx: Tensor  # differences of the iterates, (*batch, m, n); a zero row is still unused
    dmove: Tensor  # differences of their moves, (*batch, m, n)


@dataclasses.dataclass(frozen=True)
class Anderson(Solver):
    """Accelerates the fixed-point iteration by the linear combination of the last ``memory`` moves that has the smallest norm.

    Example:
        >>> import torch
        >>> from energynet import fixed_point
        >>> slow = lambda x: 0.99 * x + 0.01
        >>> int(fixed_point(slow, torch.zeros(1, 1), solver=Anderson()).num_steps)
        2

    Args:
        memory: m, the number of stored differences; at most the number of unknowns is used.
        mixing: β in (0, 1], the fraction of the combined move that is taken.
        regularization: the ridge of the least-squares problem, relative to its unit-length columns; default: 10 ε of the
            dtype. For a singular system, the map's own step is taken.

    Raises:
        ValueError: if memory < 1, or mixing or regularization is out of range.

    Source: Anderson (1965); Walker and Ni (2011), Anderson acceleration for fixed-point iterations.
    """

    memory: int = 5
    mixing: float = 1.0
    regularization: float | None = None

    def __post_init__(self) -> None:
        check_whole(self, "memory")
        check_number(self, "mixing", "in (0, 1]", lambda v: 0 < v <= 1)
        check_number(self, "regularization", "≥ 0 that is finite", lambda v: 0 <= v < float("inf"), optional=True)

    def init(self, problem: Problem, x0: Tensor) -> AndersonState:
        residual = problem.residual(x0)
        move = problem.move(x0, residual) - x0
        rows = min(self.memory, max(1, x0.shape[-1]))  # more differences than unknowns are linearly dependent
        empty = torch.zeros_like(x0).unsqueeze(-2).expand(*x0.shape[:-1], rows, x0.shape[-1])
        return AndersonState(residual, move, empty, empty)

    def update(self, problem: Problem, x: Tensor, state: AndersonState) -> tuple[Tensor, AndersonState]:
        target = x + self._combined(state)
        residual = problem.residual(target)
        move = problem.move(target, residual) - target
        dx = _push(state.dx, target - x)
        dmove = _push(state.dmove, move - state.move)
        return target, AndersonState(residual, move, dx, dmove)

    def _combined(self, state: AndersonState) -> Tensor:
        """The accelerated move; the plain move if the accelerated one is not finite."""
        weights = self._weights(state.dmove, state.move)  # (*batch, m)
        correction = ((state.dx + self.mixing * state.dmove) * weights.to(state.dx.dtype).unsqueeze(-1)).sum(-2)
        plain = self.mixing * state.move
        usable = torch.isfinite(correction).all(-1, keepdim=True)
        return plain - torch.where(usable, correction, 0)

    def _weights(self, dmove: Tensor, move: Tensor) -> Tensor:
        """Least squares min ‖move − Σ w_i dmove_i‖ by normal equations on unit-length columns; empty rows get weight 0."""
        working = torch.promote_types(move.dtype, torch.float32)  # no half-precision factorizations exist
        dmove, move = dmove.to(working), move.to(working)
        length = torch.linalg.vector_norm(dmove, dim=-1)  # its derivative at 0 is 0, unlike that of a square root
        empty = length == 0
        inverse_length = torch.where(empty, 0, 1 / torch.where(empty, 1, length))
        unit = dmove * inverse_length.unsqueeze(-1)
        ridge = 10 * torch.finfo(working).eps if self.regularization is None else self.regularization
        gram = unit @ unit.mT + torch.diag_embed(ridge + empty.to(working))
        factor, info = torch.linalg.cholesky_ex(gram)
        singular = (info != 0).unsqueeze(-1)
        factor = torch.where(singular.unsqueeze(-1), torch.eye(gram.shape[-1], dtype=working, device=move.device), factor)
        weights = torch.cholesky_solve(unit @ move.unsqueeze(-1), factor).squeeze(-1) * inverse_length
        return torch.where(singular, 0, weights)


def _push(history: Tensor, row: Tensor) -> Tensor:
    """Drop the oldest row, append the newest."""
    return torch.cat([history[..., 1:, :], row.unsqueeze(-2)], dim=-2)

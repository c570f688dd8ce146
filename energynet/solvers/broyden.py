"""Limited-memory Broyden, batched per sample."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from energynet._torch.numbers import check_whole
from energynet.solvers.base import Solver
from energynet.solvers.problem import Problem
from energynet.solvers.vectors import dot


class BroydenState(NamedTuple):
    """The estimate of the inverse Jacobian of x − g(x) is I + Σ left_i right_iᵀ over the first ``filled`` rows."""

    residual: Tensor  # F(x), (*batch, n)
    move: Tensor  # g(x) − x, (*batch, n)
    left: Tensor  # (*batch, m, n), in float32 or better
    right: Tensor  # (*batch, m, n)
    filled: Tensor  # (*batch, 1) int


@dataclasses.dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method for x − g(x) = 0: each step corrects the estimate of the inverse Jacobian by the observed change.

    It starts with the map's own step, and restarts when the memory is full, because the corrections depend on the earlier
    ones. If a step makes the move ``TOO_LONG`` times longer, or not finite, the step is undone and the memory is cleared.

    Example:
        >>> import torch
        >>> from energynet import fixed_point
        >>> from energynet.solvers import Broyden
        >>> slow = lambda x: 0.8 * x + 0.2
        >>> int(fixed_point(slow, torch.zeros(1, 1), solver=Broyden()).num_steps)
        2

    Args:
        memory: m, the number of stored corrections.

    Raises:
        ValueError: if memory < 1.

    Source: Broyden (1965); damped as by Moré and Trangenstein (1976); Bai, Kolter and Koltun (2019) for fixed-point layers.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        check_whole(self, "memory")

    def init(self, problem: Problem, x0: Tensor) -> BroydenState:
        residual = problem.residual(x0)
        working = torch.promote_types(x0.dtype, torch.float32)
        empty = torch.zeros_like(x0, dtype=working).unsqueeze(-2).expand(*x0.shape[:-1], self.memory, x0.shape[-1])
        filled = torch.zeros_like(residual.sum(-1, keepdim=True), dtype=torch.int32)
        return BroydenState(residual, problem.move(x0, residual) - x0, empty, empty, filled)

    def update(self, problem: Problem, x: Tensor, state: BroydenState) -> tuple[Tensor, BroydenState]:
        target = x + _product(state.left, state.right, state.filled, state.move).to(x.dtype)
        residual = problem.residual(target)
        move = problem.move(target, residual) - target
        back = _worse(state, move)
        target, move = torch.where(back, x, target), torch.where(back, state.move, move)
        left, right, filled = self._corrected(state, move, target - x)
        residual, filled = torch.where(back, state.residual, residual), torch.where(back, 0, filled)
        return target, BroydenState(residual, move, left, right, filled)

    def _corrected(self, state: BroydenState, move: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The memory with a correction that maps the change of the move to the step, or an empty one if it was full."""
        left, right, filled = state.left, state.right, state.filled
        step = step.to(left.dtype)
        predicted = _product(left, right, filled, state.move - move)
        along, length = dot(step, predicted), dot(step, step)
        damping = _damping(along, length)
        denominator = length + damping * (along - length)
        correction = damping * (step - predicted) / torch.where(denominator == 0, 1, denominator)
        here = (torch.arange(self.memory, device=step.device) == filled).unsqueeze(-1)  # (*batch, m, 1)
        new_right = torch.where(here, _product(right, left, filled, step).unsqueeze(-2), right)
        return torch.where(here, correction.unsqueeze(-2), left), new_right, torch.where(filled == self.memory, 0, filled + 1)


TOO_LONG = 10.0  # the corrections are discarded if a move is longer than the previous one by this factor


def _worse(state: BroydenState, move: Tensor) -> Tensor:  # (*batch, 1)
    """Whether the corrections, if there are any, have led to a much longer move."""
    before, after = (torch.linalg.vector_norm(m, dim=-1, keepdim=True, dtype=state.left.dtype) for m in (state.move, move))
    return (state.filled > 0) & ~(after <= TOO_LONG * before)


def _damping(along: Tensor, length: Tensor) -> Tensor:  # (*batch, 1)
    """θ, the fraction of the correction that keeps the estimate regular: 1, or less if sᵀH y is close to 0."""
    cosine = along / torch.where(length == 0, 1, length)
    small = cosine.abs() < 0.1
    least = torch.where(cosine < 0, -0.1, torch.full_like(cosine, 0.1))  # two Python scalars would have the default dtype
    return torch.where(small, (1 - least) / torch.where(small, 1 - cosine, 1), 1)


def _product(left: Tensor, right: Tensor, filled: Tensor, vector: Tensor) -> Tensor:
    """(I + Σ left_i right_iᵀ) vector."""
    vector = vector.to(left.dtype)
    used = torch.arange(left.shape[-2], device=left.device) < filled  # (*batch, m)
    weights = torch.where(used, (right @ vector.unsqueeze(-1)).squeeze(-1), 0)
    return vector + (weights.unsqueeze(-2) @ left).squeeze(-2)

"""Limited-memory BFGS, batched sample by sample."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet.problem import Problem
from energynet.solvers.base import Solver
from energynet.solvers.line_search import LineSearch, Search, StrongWolfe, begin
from energynet.step import Kind


class LBFGSState(NamedTuple):
    residual: Tensor  # ∇E(x), (*batch, n)
    energy: Tensor  # E(x), (*batch)
    direction: Tensor  # (*batch, n)
    search: Search
    moves: Tensor  # differences of the iterates, oldest first, (*batch, m, n); a zero row is not yet filled
    changes: Tensor  # differences of their gradients, (*batch, m, n)
    failures: Tensor  # searches without result in a row, (*batch) int32
    unbounded: Tensor  # (*batch) bool: however far, the energy falls


@dataclasses.dataclass(frozen=True)
class LBFGS(Solver):
    """Quasi-Newton descent by the last ``memory`` changes of the gradient; robust also where an energy is not convex.

    One evaluation of the energy and its gradient a step. A search that fails drops the memory and goes downhill.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> banana = lambda x: 100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (1 - x[:, 0]) ** 2
        >>> minimize(banana, torch.tensor([[-1.2, 1.0]]), solver=LBFGS()).value.round(decimals=2)
        tensor([[1., 1.]])

    Args:
        memory: m, how many changes are kept.
        search: how far to go in a direction; `StrongWolfe` or `Backtracking`.

    Raises:
        ValueError: if memory < 1.
        TypeError: if the search is neither, such as a rule of `GradientDescent`.

    Source: Liu and Nocedal (1989); the compact form of Byrd, Nocedal and Schnabel (1994), theorem 2.2.
    """

    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.ENERGY})
    descends: ClassVar[bool] = True
    memory: int = 10
    search: LineSearch = dataclasses.field(default_factory=StrongWolfe)

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"LBFGS needs memory ≥ 1, got {self.memory}.")
        if not isinstance(self.search, LineSearch):
            raise TypeError(f"LBFGS needs StrongWolfe() or Backtracking() as its search, got {self.search!r}.")

    def merit(self, state: LBFGSState, size: Tensor) -> Tensor:
        return state.energy

    def init(self, problem: Problem, x0: Tensor) -> LBFGSState:
        assert problem.value_and_gradient is not None
        energy, gradient = problem.value_and_gradient(x0)
        empty = torch.zeros_like(x0).unsqueeze(-2).expand(*x0.shape[:-1], self.memory, x0.shape[-1])
        search = begin(energy, -_dot(gradient, gradient), first_length(problem, x0, gradient))
        none = torch.zeros_like(search.trials)
        return LBFGSState(gradient, energy, -gradient, search, empty, empty, none, none.bool())

    def stalled(self, state: LBFGSState) -> Tensor:
        return state.failures > 1

    def breakdown(self, state: LBFGSState) -> Tensor:
        return state.unbounded

    def update(self, problem: Problem, x: Tensor, state: LBFGSState) -> tuple[Tensor, LBFGSState]:
        assert problem.value_and_gradient is not None
        trial = x + state.search.length.to(x.dtype).unsqueeze(-1) * state.direction
        energy, gradient = problem.value_and_gradient(trial)
        taken, search = self.search.judge(state.search, energy, _dot(gradient, state.direction))
        failed = search.failed & ~taken
        failures = torch.where(taken, 0, state.failures + failed.to(torch.int32))
        unbounded = failed & torch.isinf(search.high)
        moves, changes = _remember(state, taken, trial - x, gradient - state.residual)
        moves, changes = (torch.where(failed.unsqueeze(-1).unsqueeze(-1), 0, t) for t in (moves, changes))
        x = torch.where(taken.unsqueeze(-1), trial, x)
        energy = torch.where(taken, energy, state.energy)
        gradient = torch.where(taken.unsqueeze(-1), gradient, state.residual)
        direction, fresh = _begin_search(energy, gradient, moves, changes, _tiny(x, gradient))
        anew = taken | failed
        search = Search(*(torch.where(anew, new, old) for new, old in zip(fresh, search, strict=True)))
        direction = torch.where(anew.unsqueeze(-1), direction, state.direction)
        return x, LBFGSState(gradient, energy, direction, search, moves, changes, failures, unbounded)


def first_length(problem: Problem, x: Tensor, gradient: Tensor) -> Tensor:  # -> (*batch)
    """How far to go along −∇E: γ where it is given, else to the minimum of the parabola that the curvature tells."""
    if problem.step_size is not None:
        step_size = problem.step_size.squeeze(-1) if isinstance(problem.step_size, Tensor) else problem.step_size
        return torch.zeros_like(gradient.sum(-1)) + step_size
    with torch.no_grad():
        squared = _dot(gradient, gradient)
        parabola = squared / _dot(gradient, problem.hvp(x, gradient))
        unit = 1 / torch.clamp(squared.sqrt(), min=1)
        far = 10 * (1 + _dot(x, x).sqrt()) / squared.sqrt()  # a parabola of little curvature would lead to another country
        return torch.where((parabola > 0) & torch.isfinite(parabola), torch.minimum(parabola, far), unit)


def _remember(state: LBFGSState, taken: Tensor, move: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Push the newest pair where the step was taken and the energy is curved along it."""
    along = _dot(move, change)
    size = _dot(move, move).sqrt() * _dot(change, change).sqrt()
    keep = (taken & (along > 10 * torch.finfo(move.dtype).eps * size)).unsqueeze(-1).unsqueeze(-1)
    pushed = (torch.cat([old[..., 1:, :], new.unsqueeze(-2)], -2)
              for old, new in ((state.moves, move), (state.changes, change)))  # fmt: skip
    moves, changes = (torch.where(keep, new, old) for new, old in zip(pushed, (state.moves, state.changes), strict=True))
    return moves, changes


def _tiny(x: Tensor, gradient: Tensor) -> Tensor:  # -> (*batch)
    """A length along −∇E that moves x by a thousandth: where nothing is known, a search soon goes on from there."""
    return 1e-3 * (1 + _dot(x, x).sqrt()) / _dot(gradient, gradient).sqrt()


def _begin_search(energy: Tensor, gradient: Tensor, moves: Tensor, changes: Tensor, length: Tensor) -> tuple[Tensor, Search]:
    """A quasi-Newton direction with length one; straight downhill where there is no memory, or it does not descend."""
    direction = -quasi_newton(gradient, moves, changes)
    slope, squared = _dot(gradient, direction), _dot(gradient, gradient)
    empty = (moves[..., -1, :] == 0).all(-1)
    downhill = empty | ~(slope < 0) | ~torch.isfinite(slope)
    direction = torch.where(downhill.unsqueeze(-1), -gradient, direction)
    length = torch.where(downhill, length, 1)
    return direction, begin(energy, torch.where(downhill, -squared, slope), length)


def quasi_newton(gradient: Tensor, moves: Tensor, changes: Tensor) -> Tensor:  # (*batch, n), (*batch, m, n) twice
    """The inverse BFGS matrix, made of the pairs, times the gradient; empty rows count for nothing."""
    working = torch.promote_types(gradient.dtype, torch.float32)
    length = torch.linalg.vector_norm(moves.to(working), dim=-1, keepdim=True)
    empty = length == 0
    scale = 1 / torch.where(empty, 1, length)  # pairs of unit length: their products neither under- nor overflow
    S, Y, g = moves.to(working) * scale, changes.to(working) * scale, gradient.to(working).unsqueeze(-1)
    SY, YY = S @ Y.mT, Y @ Y.mT
    R = torch.triu(SY) + torch.diag_embed(empty.squeeze(-1).to(working))
    newest_sy, newest_yy = SY[..., -1:, -1:], YY[..., -1:, -1:]
    theta = torch.where(newest_yy > 0, newest_sy / torch.where(newest_yy > 0, newest_yy, 1), 1)
    Sg, Yg = S @ g, theta * (Y @ g)
    a = torch.linalg.solve_triangular(R, Sg, upper=True)
    diagonal = torch.diagonal(SY, dim1=-2, dim2=-1).unsqueeze(-1)
    b = torch.linalg.solve_triangular(R.mT, diagonal * a + theta * (YY @ a) - Yg, upper=False)
    return (theta * g + S.mT @ b - theta * (Y.mT @ a)).squeeze(-1).to(gradient.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:  # (*batch, n) twice -> (*batch)
    return (a * b).sum(-1)

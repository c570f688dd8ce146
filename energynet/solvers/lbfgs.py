"""Limited-memory BFGS, batched per sample."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet._torch.autodiff import readable
from energynet._torch.numbers import check_whole
from energynet.solvers.base import Solver
from energynet.solvers.line_search import LineSearch, Search, StrongWolfe, begin
from energynet.solvers.preconditioner import Preconditioner, check_preconditioner
from energynet.solvers.problem import Minimization
from energynet.solvers.vectors import inner
from energynet.step import Kind


class Memory(NamedTuple):
    """The last pairs, oldest first, divided by the lengths of their moves; a zero row is still unused."""

    moves: Tensor  # S, differences of the iterates, (*batch, m, n)
    changes: Tensor  # Y, differences of their gradients, (*batch, m, n)
    inverse: Tensor  # the inverse of the upper triangle of S Yᵀ, (*batch, m, m); the identity for unused rows
    products: Tensor  # Y Yᵀ, (*batch, m, m)


class LBFGSState(NamedTuple):
    residual: Tensor  # ∇E(x), (*batch, n)
    energy: Tensor  # E(x), (*batch)
    direction: Tensor  # (*batch, n)
    search: Search
    memory: Memory
    failures: Tensor  # consecutive failed searches, (*batch) int32
    unbounded: Tensor  # (*batch) bool: the energy decreases however long the step is


@dataclasses.dataclass(frozen=True)
class LBFGS(Solver):
    """Quasi-Newton descent based on the last ``memory`` changes of the gradient; robust also for energies that are not convex.

    It takes one evaluation of the energy and its gradient per step. If a line search fails, it clears the memory and follows
    the negative gradient.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> banana = lambda x: 100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (1 - x[:, 0]) ** 2
        >>> minimize(banana, torch.tensor([[-1.2, 1.0]]), solver=LBFGS()).value.round(decimals=2)
        tensor([[1., 1.]])

    Args:
        memory: m, the number of changes that are kept.
        search: how far to go in a direction; `StrongWolfe` or `Backtracking`.
        initial_inverse: an approximation of the inverse Hessian before the first step: `HessianDiagonal`, `HessianBlocks`, or a
            function of x and the context that returns p -> M⁻¹ p, as for `ConjugateGradient`. It is computed once, at the
            initial point; its scale does not matter.

    Raises:
        ValueError: if memory < 1.
        TypeError: if the search is neither, such as a rule of `GradientDescent`, or if the initial inverse is not valid.

    Source: Liu and Nocedal (1989); the compact form of Byrd, Nocedal and Schnabel (1994), theorem 2.2.
    """

    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.ENERGY})
    descends: ClassVar[bool] = True
    measures_first: ClassVar[bool] = True
    memory: int = 10
    search: LineSearch = dataclasses.field(default_factory=StrongWolfe)
    initial_inverse: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_whole(self, "memory")
        if not isinstance(self.search, LineSearch):
            raise TypeError(f"LBFGS needs StrongWolfe() or Backtracking() as its search, got {self.search!r}.")
        check_preconditioner(self.initial_inverse, "initial_inverse")

    def merit(self, state: LBFGSState, size: Tensor) -> Tensor:
        return state.energy

    def init(self, problem: Minimization, x0: Tensor) -> LBFGSState:
        energy, gradient = problem.value_and_gradient(x0)
        downhill = problem.first_inverse(self.initial_inverse)(gradient)
        search = begin(energy, -inner(gradient, downhill), first_length(problem, x0, gradient, downhill))
        none = torch.zeros_like(search.trials)
        return LBFGSState(gradient, energy, -downhill, search, nothing(x0, self.memory), none, none.bool())

    def stalled(self, state: LBFGSState) -> Tensor:
        return state.failures > 1

    def breakdown(self, state: LBFGSState) -> Tensor:
        return state.unbounded

    def update(self, problem: Minimization, x: Tensor, state: LBFGSState) -> tuple[Tensor, LBFGSState]:
        trial = x + state.search.length.to(x.dtype).unsqueeze(-1) * state.direction
        energy, gradient = problem.value_and_gradient(trial)
        taken, search = self.search.judge(state.search, energy, inner(gradient, state.direction))
        failed = search.failed & ~taken
        failures = torch.where(search.successful(taken), 0, state.failures + search.failed.to(torch.int32))
        unbounded = failed & torch.isinf(search.high)
        memory = remember(state.memory, taken, trial - x, gradient - state.residual)
        memory = _either(failed, nothing(x, self.memory), memory)
        x = torch.where(taken.unsqueeze(-1), trial, x)
        energy = torch.where(taken, energy, state.energy)
        gradient = torch.where(taken.unsqueeze(-1), gradient, state.residual)
        if self.initial_inverse is None:
            direction = -quasi_newton(gradient, memory, torch.isinf(state.search.high_energy))
        else:
            direction = -two_loops(gradient, memory, problem.first_inverse(self.initial_inverse))
        direction, fresh = _begin_search(energy, gradient, direction, memory, _tiny(x, gradient), state)
        anew = taken | failed
        search = Search(*(torch.where(anew, new, old) for new, old in zip(fresh, search, strict=True)))
        direction = torch.where(anew.unsqueeze(-1), direction, state.direction)
        return x, LBFGSState(gradient, energy, direction, search, memory, failures, unbounded)


def first_length(problem: Minimization, x: Tensor, gradient: Tensor, downhill: Tensor) -> Tensor:  # -> (*batch)
    """The first step length along −``downhill``: γ if it was passed, or else the minimum of the parabola along it."""
    if problem.step_size is not None and downhill is gradient:
        step_size = problem.step_size.squeeze(-1) if isinstance(problem.step_size, Tensor) else problem.step_size
        return torch.zeros_like(gradient.sum(-1)) + step_size
    size = torch.linalg.vector_norm(downhill, dim=-1)  # its derivative at 0 is 0, unlike that of a square root
    slope = size.square() if downhill is gradient else inner(gradient, downhill)
    curvature = inner(downhill, problem.hvp(x, downhill))
    bends = curvature > 0
    parabola = slope / torch.where(bends, curvature, 1)
    # The minimum of a parabola with little curvature is too far away to be trusted.
    far = 10 * (1 + torch.linalg.vector_norm(x, dim=-1)) / torch.where(size > 0, size, 1)
    usable = bends & (parabola > 0) & torch.isfinite(parabola)
    return torch.where(usable, torch.minimum(parabola, far), 1 / torch.clamp(size, min=1))


def nothing(x: Tensor, m: int) -> Memory:
    """An empty memory for m pairs, in float32 or better."""
    working = torch.promote_types(x.dtype, torch.float32)
    zero = torch.zeros_like(x.sum(-1), dtype=working)[..., None, None]  # n may be 0
    rows, square = (zero.expand(*x.shape[:-1], m, k) for k in (x.shape[-1], m))
    return Memory(rows, rows, square + torch.eye(m, dtype=working, device=x.device), square)


def remember(memory: Memory, taken: Tensor, move: Tensor, change: Tensor) -> Memory:
    """Append the newest pair where the step was taken and the curvature along it is positive.

    The inverse of the triangle is stored and not the triangle itself. Deleting the first row and column of both keeps them
    inverse to each other, so a new pair costs one column, and a direction needs no triangular solve.
    """
    move, change = move.to(memory.moves.dtype), change.to(memory.moves.dtype)
    length = torch.linalg.vector_norm(move, dim=-1, keepdim=True)
    keep = taken & (inner(move, change) > 10 * torch.finfo(move.dtype).eps * length.squeeze(-1) * inner(change, change).sqrt())
    rows = keep.unsqueeze(-1)
    s, y = (torch.where(rows, t, 0) / torch.where(rows, length, 1) for t in (move, change))  # neither under- nor overflow
    moves = torch.cat([memory.moves[..., 1:, :], s.unsqueeze(-2)], -2)
    changes = torch.cat([memory.changes[..., 1:, :], y.unsqueeze(-2)], -2)
    above, products, left = _times(moves, y), _times(changes, y), memory.inverse[..., 1:, 1:]
    curvature = torch.where(rows, above[..., -1:], 1)
    column = torch.cat([-_times(left, above[..., :-1]), torch.ones_like(curvature)], -1) / curvature
    below = torch.zeros_like(above[..., None, :-1])  # pad would fix the batch size in a compiled program
    inverse = torch.cat([torch.cat([left, below], -2), column.unsqueeze(-1)], -1)
    beside = torch.cat([memory.products[..., 1:, 1:], products[..., :-1].unsqueeze(-2)], -2)
    return _either(keep, Memory(moves, changes, inverse, torch.cat([beside, products.unsqueeze(-1)], -1)), memory)


def _either(condition: Tensor, one: Memory, other: Memory) -> Memory:
    if condition.device.type == "cpu" and readable(condition):  # where a look is cheaper than two copies of the memory
        if bool(condition.all()):
            return one
        if not bool(condition.any()):
            return other
    return Memory(*(torch.where(condition.unsqueeze(-1).unsqueeze(-1), a, b) for a, b in zip(one, other, strict=True)))


def _tiny(x: Tensor, gradient: Tensor) -> Tensor:  # -> (*batch)
    """A length along −∇E that moves x by a thousandth: without other information, the search extrapolates from there."""
    size = torch.linalg.vector_norm(gradient, dim=-1)  # whose derivative at 0 is 0, where that of a root is NaN
    return 1e-3 * (1 + torch.linalg.vector_norm(x, dim=-1)) / torch.where(size > 0, size, 1)


def _begin_search(energy: Tensor, gradient: Tensor, direction: Tensor, memory: Memory, length: Tensor,
                  state: LBFGSState) -> tuple[Tensor, Search]:  # fmt: skip
    """The quasi-Newton direction with length one; straight downhill where there is no memory, or it does not descend.

    After a search that met a wall, the first trial goes at most twice as far as that search did, because the wall is near.
    """
    walled = torch.isinf(state.search.high_energy)
    slope, squared = inner(gradient, direction), inner(gradient, gradient)
    empty = (memory.moves[..., -1, :] == 0).all(-1)
    downhill = empty | ~(slope < 0) | ~torch.isfinite(slope)
    direction = torch.where(downhill.unsqueeze(-1), -gradient, direction)
    length = torch.where(downhill, length, 1)
    before, now = (torch.linalg.vector_norm(d, dim=-1) for d in (state.direction, direction))
    near = walled & (now > 0)
    most = torch.where(near, 2 * state.search.length * before / torch.where(near, now, 1), torch.inf)
    return direction, begin(energy, torch.where(downhill, -squared, slope), torch.minimum(length, most), state.search)


def quasi_newton(gradient: Tensor, memory: Memory, walled: Tensor) -> Tensor:  # (*batch, n)
    """The inverse BFGS matrix of the pairs times the gradient; unused rows have no effect.

    The initial matrix is scaled by the newest pair: by yᵀs/yᵀy, which is close to the inverse of the largest curvature, or by
    sᵀs/sᵀy beside a wall, where the curvature is unbounded.
    """
    S, Y, inverse, YY = memory
    g, diagonal = gradient.to(S.dtype), 1 / torch.diagonal(inverse, dim1=-2, dim2=-1)
    newest = YY[..., -1, -1:]
    curved = torch.where(walled.unsqueeze(-1), 1 / diagonal[..., -1:], diagonal[..., -1:] / torch.where(newest > 0, newest, 1))
    theta = torch.where(newest > 0, curved, 1)
    a = _times(inverse, _times(S, g))
    b = _times(inverse.mT, diagonal * a + theta * (_times(YY, a) - _times(Y, g)))
    return (theta * g + _times(S.mT, b) - theta * _times(Y.mT, a)).to(gradient.dtype)


def two_loops(gradient: Tensor, memory: Memory, solve: Callable[[Tensor], Tensor]) -> Tensor:  # (*batch, n)
    """The direction with the inverse of a matrix M as the initial matrix, scaled by the newest pair.

    Source: Nocedal and Wright (2006), algorithm 7.4.
    """
    S, Y = memory.moves, memory.changes
    left, diagonal = gradient.to(S.dtype), 1 / torch.diagonal(memory.inverse, dim1=-2, dim2=-1)  # sᵀy, 1 where there is no pair
    weights = []
    for k in reversed(range(S.shape[-2])):
        weights.append(inner(S[..., k, :], left) / diagonal[..., k])
        left = left - weights[-1].unsqueeze(-1) * Y[..., k, :]
    bend = inner(Y[..., -1, :], solve(Y[..., -1, :].to(gradient.dtype)).to(S.dtype))
    theta = torch.where(bend > 0, diagonal[..., -1] / torch.where(bend > 0, bend, 1), 1)
    found = theta.unsqueeze(-1) * solve(left.to(gradient.dtype)).to(left.dtype)
    for k, weight in enumerate(reversed(weights)):
        beta = inner(Y[..., k, :], found) / diagonal[..., k]
        found = found + (weight - beta).unsqueeze(-1) * S[..., k, :]
    return found.to(gradient.dtype)


def _times(matrix: Tensor, x: Tensor) -> Tensor:  # (*batch, k, n), (*batch, n) -> (*batch, k)
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)

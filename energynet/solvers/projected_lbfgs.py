"""Limited-memory BFGS within bounds, batched per sample.

Each step minimizes a quadratic model of the energy on the box, in two stages that cost no evaluation. Its first minimum on
the projected path of steepest descent, the Cauchy point, says which coordinates end at a bound, however many change at
once; a quasi-Newton step in the others follows. A line search then goes from x to that point, along a segment that lies in
the box. Coordinates at a bound are at it exactly.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet.solvers.base import Solver
from energynet.solvers.line_search import Search, StrongWolfe, begin
from energynet.solvers.problem import Problem
from energynet.step import Kind


class Memory(NamedTuple):
    """The last pairs, oldest first, divided by the lengths of their moves; a zero row is not yet filled."""

    moves: Tensor  # S, differences of the iterates, (*batch, m, n)
    changes: Tensor  # Y, differences of their gradients, (*batch, m, n)
    between: Tensor  # S Yᵀ, (*batch, m, m)
    products: Tensor  # S Sᵀ, (*batch, m, m)


class Model(NamedTuple):
    """The BFGS matrix B = θ I + Pᵀ P − Qᵀ Q, positive definite."""

    theta: Tensor  # θ, (*batch, 1)
    plus: Tensor  # P, (*batch, m, n)
    minus: Tensor  # Q, (*batch, m, n)

    def times(self, z: Tensor) -> Tensor:
        """B z, ``(*batch, n)``."""
        return self.theta * z + _times(self.plus.mT, _times(self.plus, z)) - _times(self.minus.mT, _times(self.minus, z))


class Bounded(NamedTuple):
    """A point in a box, with the gradient there, in the precision of the model; each ``(*batch, n)``."""

    x: Tensor
    gradient: Tensor
    lower: Tensor
    upper: Tensor


class ProjectedLBFGSState(NamedTuple):
    residual: Tensor  # the prox-gradient mapping F(x), (*batch, n)
    energy: Tensor  # E(x), (*batch)
    gradient: Tensor  # ∇E(x), (*batch, n)
    target: Tensor  # the point that the search goes to, at length 1, (*batch, n)
    search: Search
    memory: Memory
    failures: Tensor  # searches without result in a row, (*batch) int32
    unbounded: Tensor  # (*batch) bool: however far, the energy falls


@dataclasses.dataclass(frozen=True)
class ProjectedLBFGS(Solver):
    """Quasi-Newton descent within bounds, by the last ``memory`` changes of the gradient: the method of L-BFGS-B.

    One evaluation of the energy and its gradient per step, always inside the bounds. A search that fails drops the memory
    and goes downhill. The model is kept in float64 where the device has it.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> from energynet.constraints import Box
        >>> banana = lambda x: 100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (1 - x[:, 0]) ** 2
        >>> x0 = torch.tensor([[-1.2, 1.0]])
        >>> minimize(banana, x0, prox=Box(upper=0.8), solver=ProjectedLBFGS()).value.round(decimals=2)
        tensor([[0.8000, 0.6400]])

    Args:
        memory: m, how many changes are kept.

    Raises:
        ValueError: if memory < 1.

    Source: Byrd, Lu, Nocedal and Zhu (1995), A limited memory algorithm for bound constrained optimization; Morales and
    Nocedal (2011), its projected subspace step.
    """

    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.BOUNDED})
    descends: ClassVar[bool] = True
    unrollable: ClassVar[bool] = False
    memory: int = 10

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"ProjectedLBFGS needs memory ≥ 1, got {self.memory}.")

    def merit(self, state: ProjectedLBFGSState, size: Tensor) -> Tensor:
        return state.energy

    def stalled(self, state: ProjectedLBFGSState) -> Tensor:
        return state.failures > 1

    def breakdown(self, state: ProjectedLBFGSState) -> Tensor:
        return state.unbounded

    def init(self, problem: Problem, x0: Tensor) -> ProjectedLBFGSState:
        assert problem.value_and_gradient is not None
        energy, gradient = problem.value_and_gradient(x0)
        none = torch.zeros_like(energy, dtype=torch.int32)
        memory = nothing(x0, self.memory)
        target, search = _begin_search(problem, x0, energy, gradient, memory, none.bool())
        residual = _prox_gradient(problem, x0, gradient)
        return ProjectedLBFGSState(residual, energy, gradient, target, search, memory, none, none.bool())

    def update(self, problem: Problem, x: Tensor, state: ProjectedLBFGSState) -> tuple[Tensor, ProjectedLBFGSState]:
        assert problem.value_and_gradient is not None
        length, direction = state.search.length, state.target - x
        most = _longest(problem, x, direction)
        trial = _inside(x + length.to(x.dtype).unsqueeze(-1) * direction, *problem.bounds)
        trial = torch.where((length == 1).unsqueeze(-1), state.target, trial)  # to the bounds without rounding
        energy, gradient = problem.value_and_gradient(trial)
        taken, search = SEARCH.judge(state.search, energy, _dot(gradient, direction))
        taken = taken | ((search.low >= length) & (length >= most))  # a longer step would leave the box
        failed = search.failed & ~taken
        failures = torch.where(taken, 0, state.failures + failed.to(torch.int32))
        unbounded = failed & torch.isinf(search.high) & torch.isinf(most)
        memory = remember(state.memory, taken, trial - x, gradient - state.gradient)
        memory = _either(failed, nothing(x, self.memory), memory)
        x = torch.where(taken.unsqueeze(-1), trial, x)
        energy = torch.where(taken, energy, state.energy)
        gradient = torch.where(taken.unsqueeze(-1), gradient, state.gradient)
        target, fresh = _begin_search(problem, x, energy, gradient, memory, failed)
        anew = taken | failed
        search = search._replace(length=torch.minimum(search.length, most))
        search = Search(*(torch.where(anew, new, old) for new, old in zip(fresh, search, strict=True)))
        target = torch.where(anew.unsqueeze(-1), target, state.target)
        residual = _prox_gradient(problem, x, gradient)
        return x, ProjectedLBFGSState(residual, energy, gradient, target, search, memory, failures, unbounded)


SEARCH = StrongWolfe()


def _prox_gradient(problem: Problem, x: Tensor, gradient: Tensor) -> Tensor:  # (*batch, n)
    """(x − P(x − γ ∇E)) / γ, without the rounding of that difference."""
    lower, upper = problem.bounds
    return _inside(gradient, (x - upper) / problem.gamma, (x - lower) / problem.gamma)


def _inside(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, lower), upper)


def _longest(problem: Problem, x: Tensor, direction: Tensor) -> Tensor:  # -> (*batch)
    """The multiple of a direction, at least one, that ends at the first bound; infinite if none is met."""
    lower, upper = problem.bounds
    room = torch.where(direction > 0, upper, lower) - x
    lengths = torch.where(direction == 0, torch.inf, room / torch.where(direction == 0, 1, direction))
    return torch.clamp(_least(lengths), min=1)


def _begin_search(problem: Problem, x: Tensor, energy: Tensor, gradient: Tensor, memory: Memory, failed: Tensor
                  ) -> tuple[Tensor, Search]:  # fmt: skip
    """Towards the minimum of the model; along the projected gradient where a search failed, or the model is of no use."""
    point = Bounded(*(t.to(memory.moves.dtype) for t in (x, gradient, *problem.bounds)))
    model = model_of(memory, 1 / problem.each_gamma(x))
    target = _inside(model_minimum(point, model).to(x.dtype), *problem.bounds)
    slope = _dot(gradient, target - x)
    useless = failed | ~(slope < 0)
    downhill = _inside(x - _tiny(x, gradient) * gradient, *problem.bounds)
    target = torch.where(useless.unsqueeze(-1), downhill, target)
    slope = torch.where(useless, _dot(gradient, downhill - x), slope)
    return target, begin(energy, slope, torch.ones_like(energy))


def _tiny(x: Tensor, gradient: Tensor) -> Tensor:  # -> (*batch, 1)
    """A length along −∇E that moves x by a thousandth: where nothing is known, a search soon goes on from there."""
    size = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return 1e-3 * (1 + torch.linalg.vector_norm(x, dim=-1, keepdim=True)) / torch.where(size > 0, size, 1)


# ------------------------------------------------------------------------------------------------- the model


def nothing(x: Tensor, m: int) -> Memory:
    """A memory of m pairs that holds none."""
    working = torch.float32 if x.device.type == "mps" else torch.float64
    zero = torch.zeros_like(x.sum(-1), dtype=working)[..., None, None]  # n may be 0
    rows, square = (zero.expand(*x.shape[:-1], m, k) for k in (x.shape[-1], m))
    return Memory(rows, rows, square, square)


def remember(memory: Memory, taken: Tensor, move: Tensor, change: Tensor) -> Memory:
    """Push the newest pair where the step was taken and the energy is curved along it."""
    move, change = move.to(memory.moves.dtype), change.to(memory.moves.dtype)
    length = torch.linalg.vector_norm(move, dim=-1, keepdim=True)
    noise = 10 * torch.finfo(move.dtype).eps * length.squeeze(-1) * torch.linalg.vector_norm(change, dim=-1)
    keep = taken & (_dot(move, change) > noise)
    rows = keep.unsqueeze(-1)
    s, y = (torch.where(rows, t, 0) / torch.where(rows, length, 1) for t in (move, change))
    moves = torch.cat([memory.moves[..., 1:, :], s.unsqueeze(-2)], -2)
    changes = torch.cat([memory.changes[..., 1:, :], y.unsqueeze(-2)], -2)
    between = _pushed(memory.between, _times(moves, y), _times(changes, s))
    along = _times(moves, s)
    return _either(keep, Memory(moves, changes, between, _pushed(memory.products, along, along)), memory)


def _pushed(square: Tensor, column: Tensor, row: Tensor) -> Tensor:  # (*batch, m, m), (*batch, m) twice
    """Without its first row and column, and with these as its last."""
    upper = torch.cat([square[..., 1:, 1:], column[..., :-1].unsqueeze(-1)], -1)
    return torch.cat([upper, row.unsqueeze(-2)], -2)


def _either(condition: Tensor, one: Memory, other: Memory) -> Memory:
    return Memory(*(torch.where(condition.unsqueeze(-1).unsqueeze(-1), a, b) for a, b in zip(one, other, strict=True)))


def model_of(memory: Memory, curvature: Tensor) -> Model:
    """The BFGS matrix of the pairs, with S Yᵀ = L + D + …: D^-½ Y is P, C⁻¹(θ S + L D⁻¹ Y) is Q, C Cᵀ = θ S Sᵀ + L D⁻¹ Lᵀ.

    Args:
        memory: the pairs.
        curvature: θ where there are none, ``(*batch, 1)``.
    """
    S, Y, SY, SS = memory
    diagonal = SY.diagonal(dim1=-2, dim2=-1)
    filled = diagonal > 0
    D = torch.where(filled, diagonal, 1)
    theta = torch.where(filled[..., -1:], Y[..., -1, :].square().sum(-1, keepdim=True) / D[..., -1:], curvature)
    P = Y / D.sqrt().unsqueeze(-1)
    J = SY.tril(-1) / D.sqrt().unsqueeze(-2)
    C, _ = torch.linalg.cholesky_ex(theta.unsqueeze(-1) * SS + J @ J.mT + torch.diag_embed((~filled).to(D.dtype)))
    return Model(theta, P, torch.linalg.solve_triangular(C, theta.unsqueeze(-1) * S + J @ P, upper=False))


def model_minimum(point: Bounded, model: Model) -> Tensor:  # (*batch, n)
    """Near the least value of the model in the box: from the Cauchy point a Newton step in the free coordinates, projected.

    Where the projection spoils the descent, the step ends at the first bound instead.
    """
    start, free = cauchy_point(point, model)
    slope = point.gradient + model.times(start - point.x)
    step = _free_newton_step(model, torch.where(free, slope, 0), free)
    step = torch.where(torch.isfinite(step).all(-1, keepdim=True), step, 0)
    target = _inside(start + step, point.lower, point.upper)
    room = torch.where(step > 0, point.upper, point.lower) - start
    part = torch.where(step == 0, torch.inf, room / torch.where(step == 0, 1, step))
    length = torch.clamp(_least(part).unsqueeze(-1), max=1)
    short = torch.where(part <= length, start + room, start + length * step)
    return torch.where(_dot(point.gradient, target - point.x).unsqueeze(-1) < 0, target, _inside(short, point.lower, point.upper))


def cauchy_point(point: Bounded, model: Model) -> tuple[Tensor, Tensor]:
    """The first minimum of the model on the projected path of −∇E, and which coordinates are free there.

    Coordinate i stops at the time when it meets its bound. Between two such times the model is a parabola, and its slope and
    curvature are sums over the coordinates that still move and those that have stopped: all are computed at once.
    """
    g, W = point.gradient, torch.cat([model.plus, model.minus], -2)
    bound = torch.where(g > 0, point.lower, point.upper)
    times = torch.where(g == 0, torch.inf, torch.clamp((point.x - bound) / torch.where(g == 0, 1, g), min=0))
    ordered, order = times.sort(-1)
    zero = torch.zeros_like(ordered.sum(-1, keepdim=True))
    begins, ends = torch.cat([zero, ordered], -1), torch.cat([ordered, zero + torch.inf], -1)
    velocity = -g.gather(-1, order)
    images = W.gather(-1, order.unsqueeze(-2).expand(W.shape)) * velocity.unsqueeze(-2)
    squared, moving = _from_each(velocity.square()), _from_each(images)
    begun = torch.where(torch.isfinite(begins), begins, 0)  # of coordinates that never stop
    displaced = _before_each(images * begun[..., None, 1:]) + begun.unsqueeze(-2) * moving
    slope = -squared + model.theta * begun * squared + _signed(moving * displaced)
    bend = model.theta * squared + _signed(moving.square())
    bend = torch.maximum(bend, torch.finfo(bend.dtype).eps * model.theta * squared)
    found = begins + torch.where(slope < 0, -slope / torch.where(bend > 0, bend, 1), 0)
    first = (found <= ends).to(torch.int8).argmax(-1, keepdim=True)
    time = found.gather(-1, first)
    stopped = times <= time
    x = torch.where(stopped, bound, _inside(point.x - torch.where(stopped, 0, time) * g, point.lower, point.upper))
    return x, ~stopped


def _signed(sums: Tensor) -> Tensor:  # (*batch, 2 m, k) -> (*batch, k)
    """Those of P less those of Q."""
    plus, minus = sums.chunk(2, -2)
    return plus.sum(-2) - minus.sum(-2)


def _from_each(values: Tensor) -> Tensor:  # (..., n) -> (..., n + 1)
    """Sums of the values from each place to the end."""
    sums = values.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, torch.zeros_like(values.sum(-1, keepdim=True))], -1)


def _before_each(values: Tensor) -> Tensor:  # (..., n) -> (..., n + 1)
    """Sums of the values before each place."""
    return torch.cat([torch.zeros_like(values.sum(-1, keepdim=True)), values.cumsum(-1)], -1)


def _free_newton_step(model: Model, slope: Tensor, free: Tensor) -> Tensor:  # (*batch, n) each
    """−B⁻¹ slope with the rows and columns of the free coordinates alone: twice Woodbury's formula, first for θ I + Pᵀ P."""
    theta = model.theta.unsqueeze(-1)
    P, Q = (torch.where(free.unsqueeze(-2), rows, 0) for rows in (model.plus, model.minus))
    identity = theta * torch.eye(P.shape[-2], dtype=P.dtype, device=P.device)
    inner, _ = torch.linalg.cholesky_ex(identity + P @ P.mT)
    across, ps = P @ Q.mT, _times(P, slope).unsqueeze(-1)
    left, a = torch.cholesky_solve(torch.cat([across, ps], -1), inner).split([P.shape[-2], 1], -1)
    outer, _ = torch.linalg.cholesky_ex(identity - Q @ Q.mT + across.mT @ left)
    b = torch.cholesky_solve(across.mT @ a - _times(Q, slope).unsqueeze(-1), outer)
    a = a - left @ b
    return (P.mT @ a + Q.mT @ b).squeeze(-1) / model.theta - slope / model.theta


def _least(values: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    return values.amin(-1) if values.shape[-1] else values.sum(-1) + torch.inf


def _times(matrix: Tensor, x: Tensor) -> Tensor:  # (*batch, k, n), (*batch, n) -> (*batch, k)
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:  # (*batch, n) twice -> (*batch)
    return (a * b).sum(-1)

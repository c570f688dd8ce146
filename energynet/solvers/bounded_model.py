"""The quadratic model of `ProjectedLBFGS` and its minimization within bounds, which needs no evaluation of the energy.

The Cauchy point is the first minimum of the model along the projected path of steepest descent. It determines which
coordinates end at a bound, and any number of them may change at once. A quasi-Newton step in the other coordinates follows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from energynet.solvers.vectors import inner


class Memory(NamedTuple):
    """The last pairs, oldest first, divided by the lengths of their moves; a zero row is still unused."""

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


def nothing(x: Tensor, m: int) -> Memory:
    """An empty memory for m pairs."""
    working = torch.float32 if x.device.type == "mps" else torch.float64
    zero = torch.zeros_like(x.sum(-1), dtype=working)[..., None, None]  # n may be 0
    rows, square = (zero.expand(*x.shape[:-1], m, k) for k in (x.shape[-1], m))
    return Memory(rows, rows, square, square)


def remember(memory: Memory, taken: Tensor, move: Tensor, change: Tensor) -> Memory:
    """Append the newest pair where the step was taken and the curvature along it is positive."""
    move, change = move.to(memory.moves.dtype), change.to(memory.moves.dtype)
    length = torch.linalg.vector_norm(move, dim=-1, keepdim=True)
    noise = 10 * torch.finfo(move.dtype).eps * length.squeeze(-1) * torch.linalg.vector_norm(change, dim=-1)
    keep = taken & (inner(move, change) > noise)
    rows = keep.unsqueeze(-1)
    s, y = (torch.where(rows, t, 0) / torch.where(rows, length, 1) for t in (move, change))
    moves = torch.cat([memory.moves[..., 1:, :], s.unsqueeze(-2)], -2)
    changes = torch.cat([memory.changes[..., 1:, :], y.unsqueeze(-2)], -2)
    between = _pushed(memory.between, _times(moves, y), _times(changes, s))
    along = _times(moves, s)
    return either(keep, Memory(moves, changes, between, _pushed(memory.products, along, along)), memory)


def _pushed(square: Tensor, column: Tensor, row: Tensor) -> Tensor:  # (*batch, m, m), (*batch, m) twice
    """The matrix without its first row and column, and with the given ones as its last."""
    upper = torch.cat([square[..., 1:, 1:], column[..., :-1].unsqueeze(-1)], -1)
    return torch.cat([upper, row.unsqueeze(-2)], -2)


def either(condition: Tensor, one: Memory, other: Memory) -> Memory:
    return Memory(*(torch.where(condition.unsqueeze(-1).unsqueeze(-1), a, b) for a, b in zip(one, other, strict=True)))


def model_of(memory: Memory, curvature: Tensor) -> Model:
    """The BFGS matrix of the pairs: P = D^-½ Y and Q = C⁻¹(θ S + L D⁻¹ Y), with S Yᵀ = L + D + … and C Cᵀ = θ S Sᵀ + L D⁻¹ Lᵀ.

    Args:
        memory: the pairs.
        curvature: θ for samples without pairs, ``(*batch, 1)``.
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
    """An approximate minimizer of the model in the box: the Cauchy point plus a projected Newton step in the free coordinates.

    If the projected step does not descend, the step ends at the first bound instead.
    """
    start, free = cauchy_point(point, model)
    slope = point.gradient + model.times(start - point.x)
    step = _free_newton_step(model, torch.where(free, slope, 0), free)
    step = torch.where(torch.isfinite(step).all(-1, keepdim=True), step, 0)
    target = inside(start + step, point.lower, point.upper)
    multiples, first = first_bound(start, step, point.lower, point.upper)
    length = torch.clamp(first.unsqueeze(-1), max=1)
    short = torch.where(multiples <= length, torch.where(step > 0, point.upper, point.lower), start + length * step)
    descends = inner(point.gradient, target - point.x).unsqueeze(-1) < 0
    return torch.where(descends, target, inside(short, point.lower, point.upper))


def cauchy_point(point: Bounded, model: Model) -> tuple[Tensor, Tensor]:
    """The first minimum of the model along the projected path of −∇E, and which coordinates are free there.

    Each coordinate stops at the time when it reaches its bound. Between two such times the model is a parabola, whose slope
    and curvature are sums over the moving and the stopped coordinates. All intervals are computed at once.
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
    begun = torch.where(torch.isfinite(begins), begins, 0)  # infinite for coordinates that never stop
    displaced = _before_each(images * begun[..., None, 1:]) + begun.unsqueeze(-2) * moving
    slope = -squared + model.theta * begun * squared + _signed(moving * displaced)
    bend = model.theta * squared + _signed(moving.square())
    bend = torch.maximum(bend, torch.finfo(bend.dtype).eps * model.theta * squared)
    found = begins + torch.where(slope < 0, -slope / torch.where(bend > 0, bend, 1), 0)
    first = (found <= ends).to(torch.int8).argmax(-1, keepdim=True)
    time = found.gather(-1, first)
    stopped = times <= time
    x = torch.where(stopped, bound, inside(point.x - torch.where(stopped, 0, time) * g, point.lower, point.upper))
    return x, ~stopped


def _signed(sums: Tensor) -> Tensor:  # (*batch, 2 m, k) -> (*batch, k)
    """Those of P less those of Q."""
    plus, minus = sums.chunk(2, -2)
    return plus.sum(-2) - minus.sum(-2)


def _from_each(values: Tensor) -> Tensor:  # (..., n) -> (..., n + 1)
    """The sums of the values from each index to the end."""
    sums = values.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, torch.zeros_like(values.sum(-1, keepdim=True))], -1)


def _before_each(values: Tensor) -> Tensor:  # (..., n) -> (..., n + 1)
    """The sums of the values before each index."""
    return torch.cat([torch.zeros_like(values.sum(-1, keepdim=True)), values.cumsum(-1)], -1)


def _free_newton_step(model: Model, slope: Tensor, free: Tensor) -> Tensor:  # (*batch, n) each
    """−B⁻¹ slope, with B restricted to the free coordinates, by Woodbury's formula applied twice, first to θ I + Pᵀ P."""
    theta = model.theta.unsqueeze(-1)
    P, Q = (torch.where(free.unsqueeze(-2), rows, 0) for rows in (model.plus, model.minus))
    identity = theta * torch.eye(P.shape[-2], dtype=P.dtype, device=P.device)
    factor, _ = torch.linalg.cholesky_ex(identity + P @ P.mT)
    across, ps = P @ Q.mT, _times(P, slope).unsqueeze(-1)
    left, a = torch.cholesky_solve(torch.cat([across, ps], -1), factor).split([P.shape[-2], 1], -1)
    outer, _ = torch.linalg.cholesky_ex(identity - Q @ Q.mT + across.mT @ left)
    b = torch.cholesky_solve(across.mT @ a - _times(Q, slope).unsqueeze(-1), outer)
    a = a - left @ b
    return (P.mT @ a + Q.mT @ b).squeeze(-1) / model.theta - slope / model.theta


def _times(matrix: Tensor, x: Tensor) -> Tensor:  # (*batch, k, n), (*batch, n) -> (*batch, k)
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def inside(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, lower), upper)


def first_bound(x: Tensor, direction: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The multiple of a direction at which each coordinate reaches its bound, and the smallest of these, ``(*batch)``."""
    room = torch.where(direction > 0, upper, lower) - x
    multiples = torch.where(direction == 0, torch.inf, room / torch.where(direction == 0, 1, direction))
    return multiples, multiples.amin(-1) if x.shape[-1] else x.sum(-1) + torch.inf

"""Newton steps inside a ball around x, in which the parabola that stands for the energy is believed; one ball a sample."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet._torch.while_loop import while_loop
from energynet.solvers.base import Solver
from energynet.solvers.line_search import CANCELLED
from energynet.solvers.problem import Minimization
from energynet.solvers.vectors import dot
from energynet.step import Kind

MOST_REJECTED = 30  # each shortens the ball at least four times


class Ball(NamedTuple):
    """What is known at x, and how far it is believed: the state of such a solver."""

    residual: Tensor  # ∇E(x), (*batch, n)
    energy: Tensor  # E(x), (*batch)
    radius: Tensor  # (*batch); infinite until a step fails
    steepest: Tensor  # largest ‖∇E‖ seen, (*batch)
    rejected: Tensor  # steps in a row that were not taken, (*batch) int32
    part: Tensor  # of the model's step that is tried, (*batch) in (0, 1]: a line search, as walls and Newton's direction need it
    decrement: Tensor  # √(−gᵀp) of the last step p, before it was shortened, (*batch)
    walled: Tensor  # (*batch) bool: a trial point of the last step taken, or of those since, was not finite


class TrustRegion(Solver):
    """What solvers with such a ball share."""

    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.ENERGY})
    descends: ClassVar[bool] = True
    unrollable: ClassVar[bool] = False  # Hessian-vector products keep no graph, and the inner loop ends at 0 / 0
    radius: float
    """Of the first ball, in units of max(1, ‖x‖)."""

    def merit(self, state: Ball, size: Tensor) -> Tensor:
        return state.energy

    def init(self, problem: Minimization, x0: Tensor) -> Ball:
        energy, gradient = problem.value_and_gradient(x0)
        size = norm(gradient)
        none = torch.zeros_like(size, dtype=torch.int32)
        return Ball(gradient, energy, self.radius * unit(x0), size, none, torch.ones_like(size), size, none.bool())

    def stalled(self, state: Ball) -> Tensor:
        return state.rejected > MOST_REJECTED



def attempt(problem: Minimization, x: Tensor, ball: Ball, step: Tensor, image: Tensor, along: Tensor) -> tuple[Tensor, Ball]:
    """The next x and its ball: the step is taken where the energy falls by some of what the parabola promised.

    A step that is not is shortened: beside a wall along its direction, since a smaller ball would turn it away from where the
    parabola leads, and the nearest wall would limit every coordinate; else the ball.

    Args:
        problem: a minimization.
        x: ``(*batch, n)``.
        ball: around x.
        step: p in it.
        image: H p.
        along: ``(*batch)`` bool, where it is always shortened along its direction.
    """
    slope = dot(ball.residual, step).squeeze(-1)
    decrement = torch.clamp(-slope, min=0).sqrt()
    # Of an energy that is a sum of logarithms, steps of the same decrement lead as far towards the wall.
    part = ball.part * torch.clamp(ball.decrement / torch.where(decrement > 0, decrement, 1), min=1)
    part = torch.where(decrement > 0, torch.clamp(part, max=1), 1)
    rows = part.unsqueeze(-1)
    step, image = rows * step, rows * image
    promised = -(part * slope + 0.5 * dot(step, image).squeeze(-1))
    trial = x + step
    energy, gradient = problem.value_and_gradient(trial)
    finite = torch.isfinite(energy) & torch.isfinite(gradient).all(-1)
    slopes = -0.5 * dot(ball.residual + gradient, step).squeeze(-1)
    foretold = norm(gradient - ball.residual - image) <= 0.01 * norm(ball.residual)
    length, size = norm(step), unit(x)
    terms = norm(image) / torch.where(length > 0, length, 1) * size.square()
    kept = _decrease(ball.energy, energy, slopes, foretold, terms) / torch.where(promised > 0, promised, 1)
    kept = torch.where((promised > 0) & torch.isfinite(kept) & finite, kept, -1)
    taken = kept > 1e-4
    walled = ~finite | (ball.walled & ~(taken & (ball.rejected == 0)))
    along = along | walled
    shorter = _shortened(torch.minimum(length, ball.radius), size, torch.where(along, 0.5, 0.25))
    grown = torch.where((kept > 0.75) & (length > 0.9 * ball.radius), 2 * ball.radius, ball.radius)
    radius = torch.where((kept < 0.25) & ~along, shorter, grown)
    less = part * shorter / torch.where(length > 0, length, 1)
    twice = torch.clamp(2 * part, max=1)
    more = torch.where(kept < 0.25, 0.5 * part, torch.where(kept > 0.5, twice, part))
    more = torch.where(walled, torch.where(ball.rejected > 0, part, twice), more)
    part = torch.where(taken, more, torch.where(along, less, part))
    energy, rejected = torch.where(taken, energy, ball.energy), torch.where(taken, 0, ball.rejected + 1)
    rows = taken.unsqueeze(-1)
    x, gradient = torch.where(rows, trial, x), torch.where(rows, gradient, ball.residual)
    return x, Ball(gradient, energy, radius, torch.maximum(ball.steepest, norm(gradient)), rejected, part, decrement, walled)


def _shortened(length: Tensor, size: Tensor, factor: Tensor) -> Tensor:
    """This part of it; of one far beyond the size of x the geometric mean of both, so that few rejections bring it near."""
    return torch.minimum(factor * length, torch.clamp(length, max=torch.finfo(length.dtype).max).sqrt() * size.sqrt())


def _decrease(before: Tensor, after: Tensor, slopes: Tensor, foretold: Tensor, terms: Tensor) -> Tensor:
    """By how much the energy fell; by its slopes where the difference may be lost in rounding, of it or of its terms.

    How large these are, the energy does not tell: they may cancel in it. A parabola's are of the size of its curvature times
    ‖x‖². Where the gradient is as foretold, a difference in doubt tells nothing new; one beyond doubt does: there may be a wall.
    """
    noise = 100 * torch.finfo(before.dtype).eps
    difference, size = before - after, before.abs()
    doubted = torch.where(foretold, max(noise, CANCELLED) * size + noise * terms, noise * size)
    return torch.where(difference.abs() <= doubted, slopes, difference)


class Inner(NamedTuple):
    """Conjugate gradients on the model m(p) = gᵀp + ½ pᵀHp; scalars are ``(*batch, 1)``."""

    step: Tensor  # p, (*batch, n)
    image: Tensor  # H p
    left: Tensor  # g + H p, the model's gradient
    direction: Tensor  # d, of length 1, since H d and dᵀH d may overflow for the length of a gradient
    done: Tensor  # bool


def truncated_step(product: Callable[[Tensor], Tensor], ball: Ball, most: int, done: Tensor) -> Inner:
    """Least m(p) in the ball, as far as ``most`` products tell; the closer to the answer, the more exactly.

    Zero where ``done``, ``(*batch)`` bool.
    """
    g, radius, size = ball.residual, ball.radius.unsqueeze(-1), norm(ball.residual).unsqueeze(-1)
    steepest = torch.where(ball.steepest > 0, ball.steepest, 1).unsqueeze(-1)
    goal = size * torch.clamp((size / steepest).sqrt(), max=0.1)
    inner = Inner(torch.zeros_like(g), torch.zeros_like(g), g, _unit_length(-g), done.unsqueeze(-1) | (size == 0))
    found: Inner = while_loop(
        lambda inner: ~inner.done.all(),
        lambda inner: _conjugate_gradient(product(inner.direction), inner, radius, goal),
        inner,
        min(most, max(2 * g.shape[-1], 1)),
    )
    return found


def _conjugate_gradient(hd: Tensor, inner: Inner, radius: Tensor, goal: Tensor) -> Inner:
    """One step; at the edge of the ball, or where the curvature is not positive, it ends on the edge."""
    p, d = inner.step, inner.direction
    along = dot(d, hd)
    finite = torch.isfinite(along)  # a product that is not counts as zero: the step goes downhill
    along, hd = torch.where(finite, along, 0), torch.where(finite, hd, 0)
    flat = ~(along > torch.finfo(d.dtype).eps * norm(hd).unsqueeze(-1))
    curvature = torch.where(flat, 1, along)
    alpha = -dot(inner.left, d) / curvature
    outside = flat | (norm(p + alpha * d).unsqueeze(-1) >= radius)
    length = torch.where(inner.done, 0, torch.where(outside, _to_edge(p, d, radius), alpha))
    left = inner.left + length * hd
    done = inner.done | outside | (norm(left).unsqueeze(-1) <= goal)
    following = _unit_length(dot(left, hd) / curvature * d - left)
    return Inner(p + length * d, inner.image + length * hd, left, following, done)


def _unit_length(d: Tensor) -> Tensor:
    length = norm(d).unsqueeze(-1)
    return d / torch.where(length > 0, length, 1)


def _to_edge(p: Tensor, d: Tensor, radius: Tensor) -> Tensor:
    """τ ≥ 0 with ‖p + τ d‖ = radius."""
    dd, pd, room = dot(d, d), dot(p, d), torch.clamp(radius.square() - dot(p, p), min=0)
    root = (pd.square() + dd * room).sqrt()
    # Of the two forms of the root, the one without cancellation.
    return torch.where(pd > 0, room / torch.where(pd + root > 0, pd + root, 1), (root - pd) / torch.where(dd > 0, dd, 1))


def unit(x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    """max(1, ‖x‖)."""
    return torch.clamp(norm(x), min=1)


def norm(a: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    """Lengths of samples."""
    return torch.linalg.vector_norm(a, dim=-1)

"""Newton steps inside a trust region, a ball around x in which the quadratic model of the energy is trusted; one per sample."""

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

MOST_REJECTED = 30  # each rejection shrinks the ball at least by a factor of four


class Ball(NamedTuple):
    """The state of a trust-region solver: the values at x, and the ball in which the model is trusted."""

    residual: Tensor  # ∇E(x), (*batch, n)
    energy: Tensor  # E(x), (*batch)
    radius: Tensor  # (*batch); infinite until a step fails
    steepest: Tensor  # the largest ‖∇E‖ so far, (*batch)
    rejected: Tensor  # the number of consecutive rejected steps, (*batch) int32
    part: Tensor  # the fraction of the model's step that is tried, (*batch) in (0, 1]: a line search along its direction
    decrement: Tensor  # √(−gᵀp) of the last step p, before it was shortened, (*batch)
    walled: Tensor  # (*batch) bool: whether a trial point since the last accepted step was not finite


class TrustRegion(Solver):
    """The base class of trust-region solvers."""

    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.ENERGY})
    descends: ClassVar[bool] = True
    unrollable: ClassVar[bool] = False  # Hessian-vector products keep no graph, and the inner loop ends at 0 / 0
    radius: float
    """The radius of the first ball, in units of max(1, ‖x‖)."""

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
    """The next x and its ball: a step is accepted if the energy decreases by a fraction of what the model predicts.

    After a rejection the ball shrinks. Beside a wall, the step is shortened along its direction instead: a smaller ball would
    turn it away from the minimum of the model, and the nearest wall would limit every coordinate.

    Args:
        problem: a minimization.
        x: ``(*batch, n)``.
        ball: the ball around x.
        step: p, a step in the ball.
        image: H p.
        along: ``(*batch)`` bool, samples whose step is always shortened along its direction.
    """
    slope = dot(ball.residual, step).squeeze(-1)
    decrement = torch.clamp(-slope, min=0).sqrt()
    # If the energy is a sum of logarithms, steps with the same decrement go equally far toward the wall.
    part = ball.part * torch.clamp(ball.decrement / torch.where(decrement > 0, decrement, 1), min=1)
    part = torch.where(decrement > 0, torch.clamp(part, max=1), 1)
    rows = part.unsqueeze(-1)
    step, image = rows * step, rows * image
    predicted = -(part * slope + 0.5 * dot(step, image).squeeze(-1))
    trial = x + step
    energy, gradient = problem.value_and_gradient(trial)
    finite = torch.isfinite(energy) & torch.isfinite(gradient).all(-1)
    slopes = -0.5 * dot(ball.residual + gradient, step).squeeze(-1)
    as_predicted = norm(gradient - ball.residual - image) <= 0.01 * norm(ball.residual)
    length, size = norm(step), unit(x)
    terms = norm(image) / torch.where(length > 0, length, 1) * size.square()
    ratio = _decrease(ball.energy, energy, slopes, as_predicted, terms) / torch.where(predicted > 0, predicted, 1)
    ratio = torch.where((predicted > 0) & torch.isfinite(ratio) & finite, ratio, -1)
    accepted = ratio > 1e-4
    walled = ~finite | (ball.walled & ~(accepted & (ball.rejected == 0)))
    along = along | walled
    shorter = _shortened(torch.minimum(length, ball.radius), size, torch.where(along, 0.5, 0.25))
    grown = torch.where((ratio > 0.75) & (length > 0.9 * ball.radius), 2 * ball.radius, ball.radius)
    radius = torch.where((ratio < 0.25) & ~along, shorter, grown)
    less = part * shorter / torch.where(length > 0, length, 1)
    twice = torch.clamp(2 * part, max=1)
    more = torch.where(ratio < 0.25, 0.5 * part, torch.where(ratio > 0.5, twice, part))
    more = torch.where(walled, torch.where(ball.rejected > 0, part, twice), more)
    part = torch.where(accepted, more, torch.where(along, less, part))
    energy, rejected = torch.where(accepted, energy, ball.energy), torch.where(accepted, 0, ball.rejected + 1)
    rows = accepted.unsqueeze(-1)
    x, gradient = torch.where(rows, trial, x), torch.where(rows, gradient, ball.residual)
    return x, Ball(gradient, energy, radius, torch.maximum(ball.steepest, norm(gradient)), rejected, part, decrement, walled)


def _shortened(length: Tensor, size: Tensor, factor: Tensor) -> Tensor:
    """This fraction of the length; if it far exceeds ``size``, at most their geometric mean, so that few rejections suffice."""
    return torch.minimum(factor * length, torch.clamp(length, max=torch.finfo(length.dtype).max).sqrt() * size.sqrt())


def _decrease(before: Tensor, after: Tensor, slopes: Tensor, as_predicted: Tensor, terms: Tensor) -> Tensor:
    """The decrease of the energy; from the slopes if the difference of energies may be a rounding error.

    The size of the energy does not bound this error, because large terms may cancel in it; those of a quadratic energy are of
    the size of its curvature times ‖x‖². Where the gradient is as the model predicts, the slopes decide for larger differences
    as well, up to these terms. Beyond them the difference counts: there may be a wall.
    """
    noise = 100 * torch.finfo(before.dtype).eps
    difference, size = before - after, before.abs()
    doubted = torch.where(as_predicted, max(noise, CANCELLED) * size + noise * terms, noise * size)
    return torch.where(difference.abs() <= doubted, slopes, difference)


class Inner(NamedTuple):
    """Conjugate gradients on the model m(p) = gᵀp + ½ pᵀHp; scalars are ``(*batch, 1)``."""

    step: Tensor  # p, (*batch, n)
    image: Tensor  # H p
    left: Tensor  # g + H p, the gradient of the model
    direction: Tensor  # d, of length 1, because H d and dᵀH d may overflow for a longer one
    done: Tensor  # bool


def truncated_step(product: Callable[[Tensor], Tensor], ball: Ball, most: int, done: Tensor,
                   *, solve: Callable[[Tensor], Tensor] = lambda r: r, accuracy: float | None = None) -> Inner:  # fmt: skip
    """Minimize m(p) in the ball with at most ``most`` products, until its gradient has been reduced by the factor ``accuracy``;
    without one, more accurately the closer x is to the solution.

    Zero where ``done``, ``(*batch)`` bool. The preconditioner ``solve``, r -> M⁻¹ r, changes the iterates and not the ball: the
    model decreases along their path, which ends where it first leaves the ball.
    """
    g, radius, size = ball.residual, ball.radius.unsqueeze(-1), norm(ball.residual).unsqueeze(-1)
    steepest = torch.where(ball.steepest > 0, ball.steepest, 1).unsqueeze(-1)
    goal = accuracy * size if accuracy else size * torch.clamp((size / steepest).sqrt(), max=0.1)
    inner = Inner(torch.zeros_like(g), torch.zeros_like(g), g, _unit_length(-solve(g)), done.unsqueeze(-1) | (size == 0))
    found: Inner = while_loop(
        lambda inner: ~inner.done.all(),
        lambda inner: _conjugate_gradient(product(inner.direction), inner, radius, goal, solve),
        inner,
        min(most, max(2 * g.shape[-1], 1)),
    )
    return found


def _conjugate_gradient(hd: Tensor, inner: Inner, radius: Tensor, goal: Tensor, solve: Callable[[Tensor], Tensor]) -> Inner:
    """One step; it ends on the boundary if it would leave the ball, or if the curvature is not positive."""
    p, d = inner.step, inner.direction
    along = dot(d, hd)
    finite = torch.isfinite(along)  # a product that is not finite counts as zero, so that the step follows −∇E
    along, hd = torch.where(finite, along, 0), torch.where(finite, hd, 0)
    flat = ~(along > torch.finfo(d.dtype).eps * norm(hd).unsqueeze(-1))
    curvature = torch.where(flat, 1, along)
    alpha = -dot(inner.left, d) / curvature
    outside = flat | (norm(p + alpha * d).unsqueeze(-1) >= radius)
    length = torch.where(inner.done, 0, torch.where(outside, _to_edge(p, d, radius), alpha))
    left = inner.left + length * hd
    done = inner.done | outside | (norm(left).unsqueeze(-1) <= goal)
    z = solve(left)
    following = _unit_length(dot(z, hd) / curvature * d - z)
    return Inner(p + length * d, inner.image + length * hd, left, following, done)


def _unit_length(d: Tensor) -> Tensor:
    length = norm(d).unsqueeze(-1)
    return d / torch.where(length > 0, length, 1)


def _to_edge(p: Tensor, d: Tensor, radius: Tensor) -> Tensor:
    """τ ≥ 0 with ‖p + τ d‖ = radius."""
    dd, pd, room = dot(d, d), dot(p, d), torch.clamp(radius.square() - dot(p, p), min=0)
    root = (pd.square() + dd * room).sqrt()
    # This is the form of the root without cancellation.
    return torch.where(pd > 0, room / torch.where(pd + root > 0, pd + root, 1), (root - pd) / torch.where(dd > 0, dd, 1))


def unit(x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    """max(1, ‖x‖)."""
    return torch.clamp(norm(x), min=1)


def norm(a: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    """‖a‖ per sample."""
    return torch.linalg.vector_norm(a, dim=-1)

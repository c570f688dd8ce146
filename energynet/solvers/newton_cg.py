"""Newton's method with truncated conjugate gradients inside a trust region, batched sample by sample."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet._while import while_loop
from energynet.problem import Problem
from energynet.solvers.base import Solver
from energynet.step import Kind

MOST_REJECTED = 30  # each shortens the ball at least four times


class NewtonCGState(NamedTuple):
    residual: Tensor  # ∇E(x), (*batch, n)
    energy: Tensor  # E(x), (*batch)
    radius: Tensor  # of the ball in which the parabola is believed, (*batch)
    steepest: Tensor  # largest ‖∇E‖ seen, (*batch)
    rejected: Tensor  # steps in a row that were not taken, (*batch) int32


class Inner(NamedTuple):
    """Conjugate gradients on the model m(p) = gᵀp + ½ pᵀHp; scalars are ``(*batch, 1)``."""

    step: Tensor  # p, (*batch, n)
    image: Tensor  # H p
    left: Tensor  # g + H p, the model's gradient
    direction: Tensor  # d
    done: Tensor  # bool


@dataclasses.dataclass(frozen=True)
class NewtonCG(Solver):
    """Newton steps from Hessian-vector products, inside a ball that grows and shrinks with their success.

    Negative curvature is followed to the edge of the ball, so saddles are left behind. One step costs up to ``inner``
    Hessian-vector products and one evaluation; it pays where an energy is ill-conditioned or an exact answer is wanted.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> saddle = lambda x: (x[:, 0] ** 2 - 1) ** 2 + x[:, 1] ** 2
        >>> minimize(saddle, torch.tensor([[0.01, 1.0]]), solver=NewtonCG()).value.round(decimals=3).abs()
        tensor([[1., 0.]])

    Args:
        inner: most Hessian-vector products a step.
        radius: of the first ball, in units of max(1, ‖x‖).

    Raises:
        ValueError: if inner < 1 or radius ≤ 0.

    Source: Steihaug (1983); Nocedal and Wright (2006), algorithms 4.1 and 7.2.
    """

    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.ENERGY})
    descends: ClassVar[bool] = True
    unrollable: ClassVar[bool] = False  # its Hessian-vector products keep no graph, and its inner loop ends at 0 / 0
    inner: int = 50
    radius: float = 1.0

    def __post_init__(self) -> None:
        if self.inner < 1 or not 0 < self.radius < float("inf"):
            raise ValueError(f"NewtonCG needs inner ≥ 1 and a positive radius, got {self}.")

    def merit(self, state: NewtonCGState, size: Tensor) -> Tensor:
        return state.energy

    def init(self, problem: Problem, x0: Tensor) -> NewtonCGState:
        assert problem.value_and_gradient is not None
        energy, gradient = problem.value_and_gradient(x0)
        radius, size = self.radius * torch.clamp(_norm(x0), min=1), _norm(gradient)
        return NewtonCGState(gradient, energy, radius, size, torch.zeros_like(size, dtype=torch.int32))

    def stalled(self, state: NewtonCGState) -> Tensor:
        return state.rejected > MOST_REJECTED

    def update(self, problem: Problem, x: Tensor, state: NewtonCGState) -> tuple[Tensor, NewtonCGState]:
        assert problem.value_and_gradient is not None and problem.jacobian is not None
        g, radius = state.residual, state.radius.unsqueeze(-1)
        inner = self._model_step(problem.jacobian(x), g, radius, state.steepest.unsqueeze(-1))
        promised = -(_dot(g, inner.step) + 0.5 * _dot(inner.step, inner.image)).squeeze(-1)
        trial = x + inner.step
        energy, gradient = problem.value_and_gradient(trial)
        kept = _decrease(state, energy, gradient, inner) / torch.where(promised > 0, promised, 1)
        kept = torch.where((promised > 0) & torch.isfinite(kept) & torch.isfinite(gradient).all(-1), kept, -1)
        taken = kept > 1e-4
        length = _norm(inner.step)
        grown = torch.where((kept > 0.75) & (length > 0.9 * state.radius), 2 * state.radius, state.radius)
        radius = torch.where(kept < 0.25, 0.25 * torch.minimum(length, state.radius), grown)
        rows = taken.unsqueeze(-1)
        x, gradient = torch.where(rows, trial, x), torch.where(rows, gradient, g)
        energy = torch.where(taken, energy, state.energy)
        rejected = torch.where(taken, 0, state.rejected + 1)
        return x, NewtonCGState(gradient, energy, radius, torch.maximum(state.steepest, _norm(gradient)), rejected)

    def _model_step(self, product: Callable[[Tensor], Tensor], g: Tensor, radius: Tensor, steepest: Tensor) -> Inner:
        """Least m(p) in the ball, as far as a few products tell; the closer to the answer, the more exactly."""
        size = _norm(g).unsqueeze(-1)
        goal = size * torch.clamp((size / torch.where(steepest > 0, steepest, 1)).sqrt(), max=0.1)
        inner = Inner(torch.zeros_like(g), torch.zeros_like(g), g, -g, size == 0)
        most = min(self.inner, max(2 * g.shape[-1], 1))
        found: Inner = while_loop(
            lambda inner: ~inner.done.all(),
            lambda inner: _conjugate_gradient(product(inner.direction), inner, radius, goal),
            inner,
            most,
        )
        return found


def _conjugate_gradient(hd: Tensor, inner: Inner, radius: Tensor, goal: Tensor) -> Inner:
    """One step; at the edge of the ball, or where the curvature is not positive, it ends on the edge."""
    p, d, before = inner.step, inner.direction, _dot(inner.left, inner.left)
    along = _dot(d, hd)
    flat = ~(along > torch.finfo(d.dtype).eps * _norm(d).unsqueeze(-1) * _norm(hd).unsqueeze(-1))
    alpha = before / torch.where(flat, 1, along)
    outside = flat | (_norm(p + alpha * d).unsqueeze(-1) >= radius)
    length = torch.where(inner.done, 0, torch.where(outside, _to_edge(p, d, radius), alpha))
    left = inner.left + length * hd
    beta = _dot(left, left) / torch.where(before > 0, before, 1)
    done = inner.done | outside | (_norm(left).unsqueeze(-1) <= goal)
    return Inner(p + length * d, inner.image + length * hd, left, beta * d - left, done)


def _to_edge(p: Tensor, d: Tensor, radius: Tensor) -> Tensor:
    """τ ≥ 0 with ‖p + τ d‖ = radius."""
    dd, pd, room = _dot(d, d), _dot(p, d), torch.clamp(radius.square() - _dot(p, p), min=0)
    root = (pd.square() + dd * room).sqrt()
    # Of the two forms of the root, the one without cancellation.
    return torch.where(pd > 0, room / torch.where(pd + root > 0, pd + root, 1), (root - pd) / torch.where(dd > 0, dd, 1))


def _decrease(state: NewtonCGState, energy: Tensor, gradient: Tensor, inner: Inner) -> Tensor:
    """By how much the energy fell; by its slopes where the gradient is as the model foretold.

    There the difference of two energies tells nothing new, and may be lost in the rounding of their terms.
    """
    slopes = -0.5 * _dot(state.residual + gradient, inner.step).squeeze(-1)
    foretold = _norm(gradient - inner.left) <= 0.01 * _norm(state.residual)
    noise = 100 * torch.finfo(energy.dtype).eps * state.energy.abs()
    difference = state.energy - energy
    return torch.where(foretold | (difference.abs() <= noise), slopes, difference)


def _dot(a: Tensor, b: Tensor) -> Tensor:  # (*batch, n) twice -> (*batch, 1)
    return (a * b).sum(-1, keepdim=True)


def _norm(a: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    return torch.linalg.vector_norm(a, dim=-1)

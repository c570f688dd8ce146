"""How far a point is from the answer, in units of x: what is compared with the tolerances and reported as the residual.

F alone cannot tell: ∇E changes with the units of E. It is divided by a *scale*, a curvature. During a solve an old one
serves, which only decides when to look; what is reported is measured at the returned point by `scale_at`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from energynet._torch.autodiff import readable
from energynet._torch.while_loop import while_loop
from energynet.solvers.problem import Differentiable, Linear, Problem
from energynet.termination import Termination

MOST_PRODUCTS = 10
GROWTH = 1.1  # a Newton step that grows by less in a further product is believed


def is_scaled(problem: Problem) -> TypeGuard[Differentiable]:
    """Whether F is divided by a scale: not where it is in units of x, nor in a linear equation, which is judged by v."""
    return isinstance(problem, Differentiable) and not isinstance(problem, Linear)


def error_estimate(problem: Problem, termination: Termination, x: Tensor, size: Tensor, scale: Tensor) -> Tensor:  # -> (*batch)
    """The estimate, from the size of F at x; of a linear equation, that size itself."""
    if isinstance(problem, Linear):
        return size
    # x itself is only known to its rounding unit: a low-precision step that rounds to no change has not arrived.
    rounding = 0.5 * torch.finfo(x.dtype).eps * termination.size(x)
    return torch.where(size == 0, size, size / scale) + rounding


def first_scale(problem: Problem, termination: Termination, x: Tensor, residual: Tensor) -> Tensor:  # -> (*batch)
    """A guess before the first step: 1/γ, or the curvature at the start along F."""
    one = torch.ones_like(termination.size(x))
    if not is_scaled(problem):
        return one
    if problem.step_size is None:
        scale = _along(problem, termination, x, residual).curvature
        return torch.where((scale > 0) & torch.isfinite(scale), scale, 1)
    step_size = problem.step_size.squeeze(-1) if isinstance(problem.step_size, Tensor) else problem.step_size
    return one / step_size


def scale_at(problem: Differentiable, termination: Termination, x: Tensor, residual: Tensor) -> Tensor:  # -> (*batch)
    """‖F‖ / ‖e‖ with e a truncated Newton step. For F = 0 any value serves."""
    product, size, unit, image, curvature = _along(problem, termination, x, residual)
    if not problem.has_newton_step:
        return torch.where(size == 0, 1, curvature)
    # In units of that curvature, since its square, too, may underflow.
    one = torch.where((curvature > 0) & torch.isfinite(curvature), curvature, 1)
    rows = one.to(image.dtype).unsqueeze(-1)
    length = termination.size(_newton_step(lambda p: product(p) / rows, unit, image / rows))
    return torch.where(size == 0, 1, torch.where(length > 0, one / torch.where(length > 0, length, 1), curvature))


class _Along(NamedTuple):
    product: Callable[[Tensor], Tensor]  # with ∂F/∂x
    size: Tensor  # ‖F‖, (*batch)
    unit: Tensor  # F / ‖F‖, (*batch, n)
    image: Tensor  # of it
    curvature: Tensor  # ‖image‖, (*batch)


def _along(problem: Differentiable, termination: Termination, x: Tensor, residual: Tensor) -> _Along:
    size = termination.sure_size(residual)
    unit = residual / torch.where(size == 0, 1, size).to(residual.dtype).unsqueeze(-1)
    product = problem.jacobian(x)
    image = product(unit)
    curvature = termination.sure_size(image)
    curvature = torch.where(torch.isinf(curvature), torch.nan, curvature)  # else any gradient would pass for an arrival
    return _Along(product, size, unit, image, curvature)


def _newton_step(product: Callable[[Tensor], Tensor], right: Tensor, image: Tensor) -> Tensor:
    """Conjugate gradients on H e = right until ‖e‖ stops growing; it grows toward ‖H⁻¹ right‖ and never exceeds it.

    Zero where there is no positive curvature along the right-hand side, whose image comes along.
    """
    zero = torch.zeros_like(right[..., :1])
    first = _CG(torch.zeros_like(right), right, right, image, zero, torch.ones_like(zero, dtype=torch.bool))
    most = min(MOST_PRODUCTS, right.shape[-1])
    return while_loop(lambda s: s.growing.any(), lambda s: _longer(product, s), first, most).step


class _CG(NamedTuple):
    step: Tensor  # e, (*batch, n)
    left: Tensor  # right − H e
    direction: Tensor  # d
    image: Tensor  # H d
    length: Tensor  # ‖e‖, (*batch, 1)
    growing: Tensor  # (*batch, 1) bool


def _longer(product: Callable[[Tensor], Tensor], state: _CG) -> _CG:
    e, left, d, image, length, growing = state
    along, before = (d * image).sum(-1, keepdim=True), left.square().sum(-1, keepdim=True)
    noise = torch.finfo(d.dtype).eps * (d.square().sum(-1, keepdim=True) * image.square().sum(-1, keepdim=True)).sqrt()
    growing = growing & (along > noise)
    alpha = torch.where(growing, before / torch.where(growing, along, 1), 0)
    e, left = e + alpha * d, left - alpha * image
    longer = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
    growing = growing & (longer > GROWTH * length)
    d = left + left.square().sum(-1, keepdim=True) / torch.where(before > 0, before, 1) * d
    if readable(growing) and not bool(growing.any()):
        return _CG(e, left, d, image, longer, growing)
    return _CG(e, left, d, product(d), longer, growing)

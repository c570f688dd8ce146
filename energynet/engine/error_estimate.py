"""Estimates the distance of a point from the solution, in units of x; it is compared with the tolerances and reported.

The size of F alone does not suffice: ∇E changes with the units of E, and x − g(x) is small where g hardly contracts. So it is
divided by a *scale*, a curvature. During a solve an earlier scale is used, which only decides when to verify convergence; the
reported error is measured at the returned point by `measure`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from energynet.engine.newton_step import Effort, newton_step, unstable_direction
from energynet.solvers.problem import Descent, Differentiable, Linear, Problem, Proximal
from energynet.solvers.spectrum import normalized, some_direction
from energynet.termination import Termination


class Measured(NamedTuple):
    """The measurements at a point."""

    residual: Tensor  # F(x), (*batch, n)
    energy: Tensor | None  # E(x), (*batch), for a minimization
    error: Tensor  # (*batch), the estimated distance from the solution
    scale: Tensor  # (*batch), ‖F‖ / error, for use at points nearby; 0 where it is unknown
    settled: Tensor  # (*batch) bool, whether F itself is below its rounding error
    saddle: Tensor  # (*batch) bool, for a minimization: whether there is a direction of negative curvature
    direction: Tensor  # (*batch, n), that direction


def error_estimate(problem: Problem, termination: Termination, x: Tensor, size: Tensor, scale: Tensor) -> Tensor:  # -> (*batch)
    """The estimate from the size of F at x; for a linear equation, that size itself."""
    if isinstance(problem, Linear):
        return size
    return torch.where(size == 0, size, size / scale) + _rounding(termination, x)


def _rounding(termination: Termination, x: Tensor) -> Tensor:  # -> (*batch)
    """The rounding error of x itself: a low-precision step that rounds to no change does not prove convergence."""
    return 0.5 * torch.finfo(x.dtype).eps * termination.size(x)


def first_scale(problem: Problem, termination: Termination, x: Tensor, residual: Tensor) -> Tensor:  # -> (*batch)
    """An initial estimate: 1/γ, or the curvature at the initial point along F; 1 for x − g(x), which is in units of x."""
    one = torch.ones_like(termination.size(x))
    if not isinstance(problem, Differentiable) or isinstance(problem, Linear):
        return one
    if problem.step_size is None:
        scale = _curvature(problem.jacobian(x), termination, residual, termination.sure_size(residual))
        return torch.where((scale > 0) & torch.isfinite(scale), scale, 1)
    step_size = problem.step_size.squeeze(-1) if isinstance(problem.step_size, Tensor) else problem.step_size
    return one / step_size


def measure(problem: Problem, termination: Termination, x: Tensor, before: Tensor, residual: Tensor | None,
            evaluations: int, enough: Tensor | None = None) -> Measured:  # fmt: skip
    """Measures the error at a point ``(*batch, n)``.

    Args:
        problem: any problem except a linear equation.
        termination: defines the norm.
        x: the point.
        before: the previous scale, ``(*batch)``.
        residual: F(x), if it is known.
        evaluations: the number of evaluations to spend on a map.
        enough: of an energy, the distance, ``(*batch)``, beyond which the estimate may be too small.
    """
    if isinstance(problem, Descent) and problem.has_newton_step:
        return _of_energy(problem, termination, x, before, enough)
    residual = problem.residual(x) if residual is None else residual
    if not isinstance(problem, Differentiable):
        found = _contraction(problem, x, residual, before, evaluations)
        return found._replace(error=found.error + _rounding(termination, x))
    size, product = termination.sure_size(residual), problem.jacobian(x)
    scale = torch.where(size == 0, 1, _curvature(product, termination, residual, size))
    none = torch.zeros_like(size, dtype=torch.bool)
    found = Measured(residual, None, size / scale + _rounding(termination, x), scale, none, none, residual)
    if not isinstance(problem, Proximal) or not x.shape[-1]:
        return found
    gamma = problem.each_gamma(x)
    direction, saddle = unstable_direction(lambda p: gamma * product(p), x)
    return found._replace(saddle=saddle, direction=direction)


def _of_energy(problem: Descent, termination: Termination, x: Tensor, before: Tensor, enough: Tensor | None) -> Measured:
    energy, slope = problem.value_and_gradient(x)
    gradient = problem.condition(x, problem.each_gamma(x), slope) if isinstance(problem, Proximal) else slope
    size, products = termination.sure_size(gradient), termination.products
    if products == 0:
        none = torch.zeros_like(size, dtype=torch.bool)
        error = torch.where(size == 0, size, size / before) + _rounding(termination, x)
        return Measured(gradient, energy, error, before, none, none, gradient)
    effort = Effort(termination.sure_size, enough, products)
    length, sure, settled, saddle, direction = newton_step(problem, x, energy, gradient, effort)
    length = torch.where(size == 0, size, length)
    scale = torch.where(sure, size / torch.where(length > 0, length, 1), 0)
    scale = torch.where((length > 0) | torch.isnan(length), scale, before)
    return Measured(gradient, energy, length + _rounding(termination, x), scale, settled, saddle, direction)


def _curvature(product: Callable[[Tensor], Tensor], termination: Termination, residual: Tensor, size: Tensor) -> Tensor:
    """‖A F‖ / ‖F‖."""
    unit = residual / torch.where(size == 0, 1, size).to(residual.dtype).unsqueeze(-1)
    curvature = termination.sure_size(product(unit))
    return torch.where(torch.isinf(curvature), torch.nan, curvature)  # otherwise any gradient would count as converged


def _contraction(problem: Problem, x: Tensor, residual: Tensor, before: Tensor, evaluations: int) -> Measured:
    """‖x − g(x)‖ / (1 − ρ) for a map, with 1 − ρ = ‖F(x) − F(x − d)‖ / ‖d‖ from a further evaluation, at g(x).

    Additional evaluations reveal the slowest component of F, which makes up most of the error. Where F is close to its
    rounding error, ρ is measured at a point further away. Where even the change of F is below its rounding error, the previous
    scale is kept, unless it is larger than rounding can explain.
    """
    size, reach, eps = _length(residual, before), _length(x, before), torch.finfo(x.dtype).eps
    noise = 2 * eps * reach
    near, first = size <= 100 * noise, residual
    along = torch.where((size > 0).unsqueeze(-1), normalized(residual), some_direction(torch.zeros_like(x)))
    # Farther away than that a map may be steeper by orders of magnitude, as exp is, and x would seem close to a solution.
    most = torch.where(reach > 0, torch.maximum(0.1 * reach, eps**0.25 * size), size)
    step = torch.where((near | (size > most)).unsqueeze(-1), most.to(x.dtype).unsqueeze(-1) * along, residual)
    after, slope, seen = _slope(problem, x, residual, step, noise, before)
    error = torch.where(near, torch.maximum(size, torch.where(seen, 0.25, 1) * noise), size) / slope
    for _ in range(evaluations - 1):
        x, residual = x - step, after
        after, further, _ = _slope(problem, x, residual, residual, noise, before)
        error, step = torch.where(near, error, torch.maximum(error, _length(residual, before) / further)), residual
    nowhere = (reach == 0) & (size == 0)
    scale = torch.where(near | (error == 0), slope, size / torch.where(error > 0, error, 1))
    settled = nowhere | (size <= noise) & seen & (error <= eps**0.5 * reach)
    scale, error = torch.where(nowhere, before, scale), torch.where(nowhere, 0, error)
    return Measured(first, None, error, scale, settled, torch.zeros_like(near), first)


def _slope(problem: Problem, x: Tensor, residual: Tensor, step: Tensor, noise: Tensor, before: Tensor
           ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """F(x − step), its difference from F(x) divided by the length of the step, and whether that exceeds rounding errors."""
    after = problem.residual(x - step)
    length = _length(step, before)
    unit = torch.where(length > 0, length, 1)
    slope, doubt = _length((residual - after) / unit.to(x.dtype).unsqueeze(-1), before), noise / unit
    seen = slope > 2 * doubt
    known = torch.where(torch.isinf(slope), torch.nan, slope)  # otherwise any residual would count as converged
    return after, torch.where(seen | ~torch.isfinite(slope), known, torch.minimum(before, slope + doubt)), seen


def _length(x: Tensor, like: Tensor) -> Tensor:  # (*batch, n), (*batch) -> (*batch)
    return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(like.dtype)

"""The length of the Newton step at a point, and whether the point can be a minimum, estimated from a few Hessian products.

Rounding errors carry no information. If each term is known to a relative error ε, curvatures have an error of about ε‖H‖ and
gradients of about ε‖H‖·√(‖x‖² + |E|/‖H‖). Values below these errors count as zero, for example along a gauge direction of E.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from energynet._torch.autodiff import readable, tracing
from energynet._torch.while_loop import while_loop
from energynet.solvers.problem import Descent, Proximal
from energynet.solvers.spectrum import normalized, some_direction
from energynet.solvers.vectors import dot
from energynet.solvers.vectors import length as length_of
from energynet.termination import l2_norm, max_norm

MOST_PRODUCTS = 10  # up to this number of unknowns, the whole Hessian costs no more than products with some directions
PROBES = 3  # products that start from a fixed direction, in search of negative curvature
MAX_GROWTH = 1.1  # the Newton step is accepted if it grows by less than this factor in two further products,
MAX_REST = 0.2  # and if its missing part is at most this fraction of it, to judge by the smallest curvature found
MOST_FAR = 1000  # products, if the loop can stop as soon as it is finished
NOISE = 10  # accumulated rounding errors, in rounding units
NEGATIVE = 100  # a curvature counts as negative beyond this many rounding units


@dataclasses.dataclass(frozen=True, eq=False)
class Effort:
    """How accurately a Newton step is measured."""

    norm: Callable[[Tensor], Tensor]  # (*batch, n) -> (*batch)
    enough: Tensor | None = None
    """``(*batch)``: the length beyond which the step need not be measured any more accurately."""
    products: int | None = None
    """The largest number of products, without a search for negative curvature; None: as many as are needed."""


class NewtonStep(NamedTuple):
    """The measurements at a point."""

    length: Tensor  # (*batch), ‖H⁻¹∇E‖ without components that are below rounding errors
    sure: Tensor  # (*batch) bool, whether the curvature is known along every direction that contributes
    settled: Tensor  # (*batch) bool, whether the gradient itself is below its rounding error
    saddle: Tensor  # (*batch) bool, whether there is a direction of negative curvature, or neither slope nor curvature
    direction: Tensor  # (*batch, n), that direction, of length 1/√κ for the curvature −κ; without any curvature a fixed one


def newton_step(problem: Descent, x: Tensor, energy: Tensor, gradient: Tensor, effort: Effort) -> NewtonStep:
    """Measures the Newton step and the curvature at a point of a minimization.

    Args:
        problem: a minimization.
        x: ``(*batch, n)``.
        energy: E(x), ``(*batch)``.
        gradient: ∇E(x), ``(*batch, n)``.
        effort: how accurately it is measured.
    """
    size = effort.norm(gradient)
    if not x.shape[-1]:
        none = torch.zeros_like(size, dtype=torch.bool)
        return NewtonStep(size, ~none, ~none, none, gradient)
    if x.shape[-1] <= MOST_PRODUCTS and not isinstance(problem, Proximal):
        return _whole(problem.matrix(x), x, energy, gradient, effort)
    product = problem.jacobian(x)
    if effort.products is not None:
        return _along_some(product, x, energy, gradient, None, effort)
    probe = some_direction(torch.zeros_like(x))  # a saddle may have no slope along the direction in which it falls
    if isinstance(problem, Proximal):  # restrict the probe to the free coordinates
        probe = normalized(probe - problem.each_gamma(x) * product(probe))
    return _along_some(product, x, energy, gradient, probe, effort)


def _whole(matrix: Tensor, x: Tensor, energy: Tensor, gradient: Tensor, effort: Effort) -> NewtonStep:
    """From the Hessian itself, in variables in which its diagonal is one, so that badly scaled variables do not matter."""
    finite = torch.isfinite(matrix).all(-1).all(-1)
    matrix = torch.where(finite[..., None, None], 0.5 * (matrix + matrix.mT), 0)
    largest = max_norm(matrix.flatten(-2))
    unit = torch.where(largest > 0, largest, 1)  # scaling by this prevents underflow and overflow of squares
    matrix, x = matrix / unit[..., None, None], x.to(matrix.dtype)
    g = torch.where(finite.unsqueeze(-1), gradient.to(matrix.dtype) / unit.unsqueeze(-1), 0)
    eps = torch.finfo(gradient.dtype).eps
    diagonal = torch.clamp(torch.diagonal(matrix, dim1=-2, dim2=-1).abs(), min=min(100 * eps, 0.01))
    terms = energy.to(matrix.dtype).abs() / unit + (diagonal * x.square()).sum(-1)  # rounding errors are relative to this
    scale = diagonal.rsqrt()
    scaled = _Scaled(scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2), scale * g, scale, terms, eps, effort.norm)
    step = _of_spectrum(scaled) if not readable(matrix) and not tracing() else _of_factor(scaled)
    linear = (largest == 0) & (gradient != 0).any(-1)
    length = torch.where(finite, torch.where(linear, torch.inf, step.length), torch.nan)
    direction = (step.direction / unit.sqrt().unsqueeze(-1)).to(gradient.dtype)
    flat = (largest == 0) & ~linear & finite  # a maximum of higher order, as of −x⁴, or a constant
    direction = torch.where(flat.unsqueeze(-1), some_direction(torch.zeros_like(gradient)), direction)
    return step._replace(length=length, settled=step.settled & ~linear, saddle=step.saddle | flat, direction=direction)


class _Scaled(NamedTuple):
    matrix: Tensor  # S H S, (*batch, n, n)
    gradient: Tensor  # S ∇E, (*batch, n)
    scale: Tensor  # the diagonal of S, (*batch, n)
    terms: Tensor  # (*batch)
    eps: float
    norm: Callable[[Tensor], Tensor]


def _of_factor(scaled: _Scaled) -> NewtonStep:
    """By a Cholesky factorization, which is fast, and by `_of_spectrum` where a matrix is not clearly positive definite."""
    matrix, g, scale, terms, eps, size = scaled
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = torch.diagonal(factor, dim1=-2, dim2=-1).square()
    regular = scale.square() < 0.99 / min(100 * eps, 0.01)  # false for a variable whose curvature may be a rounding error
    definite = (info == 0) & (pivots > 1000 * eps).all(-1) & regular.all(-1)
    factor = torch.where(definite[..., None, None], factor, torch.eye(g.shape[-1], dtype=g.dtype, device=g.device))
    step = scale * torch.cholesky_solve(g.unsqueeze(-1), factor).squeeze(-1)
    settled = torch.linalg.vector_norm(g, dim=-1) <= NOISE * eps * terms.sqrt()
    none = torch.zeros_like(settled)
    easy = NewtonStep(size(step), ~none, settled, none, torch.zeros_like(g))
    if readable(definite) and bool(definite.all()):
        return easy

    def rest(_: NewtonStep) -> NewtonStep:
        hard = _of_spectrum(scaled)
        rows = (definite.unsqueeze(-1) if t.ndim > definite.ndim else definite for t in easy)
        return NewtonStep(*(torch.where(row, a, b) for row, a, b in zip(rows, easy, hard, strict=True)))

    found: NewtonStep = while_loop(lambda _: ~definite.all(), rest, easy, 1)
    return found


def _of_spectrum(scaled: _Scaled) -> NewtonStep:
    """By eigenvalues: where one is below its rounding error, the gradient along it counts only if it exceeds its own error."""
    values, vectors = torch.linalg.eigh(scaled.matrix)
    eps = scaled.eps
    directions = scaled.scale.unsqueeze(-1) * vectors  # columns, in which ‖H‖ is one
    stretch = directions.square().sum(-2)
    doubt = NOISE * eps * stretch  # (*batch, n)
    g = (vectors.mT @ scaled.gradient.unsqueeze(-1)).squeeze(-1)
    noise = NOISE * eps * (stretch * scaled.terms.unsqueeze(-1)).sqrt()
    flat = values.abs() <= doubt
    along = torch.where(flat & (g.abs() <= noise), 0, g / torch.maximum(values.abs(), doubt / NOISE))
    sure = ~(flat & (g.abs() > noise)).any(-1)
    step = (directions @ along.unsqueeze(-1)).squeeze(-1)
    negative = values[..., 0] < -NEGATIVE / NOISE * doubt[..., 0]
    length = scaled.norm(step)
    falling = directions[..., 0] * torch.where(negative, -values[..., 0], 1).rsqrt().unsqueeze(-1)
    return NewtonStep(length, sure, (g.abs() <= noise).all(-1), negative, falling)


def _along_some(product: Callable[[Tensor], Tensor], x: Tensor, energy: Tensor, gradient: Tensor, probe: Tensor | None,
                effort: Effort) -> NewtonStep:  # fmt: skip
    """Conjugate gradients on H e = ∇E until ‖e‖ stops growing; it grows towards ‖H⁻¹∇E‖ and never exceeds it."""
    size = effort.norm(gradient)
    unit = gradient / torch.where(size == 0, 1, size).to(gradient.dtype).unsqueeze(-1)
    image, across = product(unit), None if probe is None else product(probe)
    largest = max_norm(image) if across is None else torch.maximum(max_norm(image), max_norm(across))
    # The products are divided by that curvature, because its square may underflow, too.
    one = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
    rows, eps = one.to(image.dtype).unsqueeze(-1), torch.finfo(image.dtype).eps
    image = image / rows
    enough = None if effort.enough is None else (effort.enough * one / torch.where(size > 0, size, 1)).unsqueeze(-1)

    def run(first: _CG, most: int, enough: Tensor | None) -> _CG:
        longer = lambda state: _longer(lambda p: product(p) / rows, state, effort.norm, enough)  # noqa: E731
        found: _CG = while_loop(lambda state: (state.slow < 2).any(), longer, first, most)
        return found

    start = _begin(unit, image)
    if probe is not None and across is not None:
        probed = run(_begin(probe, across / rows), PROBES, None)
        start = start._replace(top=torch.maximum(start.top, probed.top), falling=probed.falling, bend=probed.bend)
    most = MOST_FAR if readable(image) or tracing() else MOST_PRODUCTS
    done = run(start, most if effort.products is None else effort.products, enough)
    top, size, energy = done.top.squeeze(-1).to(size.dtype), size / one, energy.abs().to(size.dtype) / one
    noise = NOISE * eps * (top * (top * x.square().sum(-1).to(size.dtype) + energy)).sqrt()
    euclidean = length_of(unit).squeeze(-1).to(size.dtype)  # in units of the norm
    noise = noise / torch.where(euclidean > 0, euclidean, 1)
    # Where the curvature is below its rounding error, the remaining gradient is a rounding error as well, or a long descent.
    end = done.end.squeeze(-1).to(size.dtype)
    left = torch.where(end < 0, 0, effort.norm(done.left) * size)
    flat = end <= NOISE * eps * top
    left = torch.where(flat & (left <= noise), 0, left)
    length = effort.norm(done.step) * size
    length = torch.where(left > 0, length + left / torch.maximum(end, eps * top), length)
    saddle = (done.bend < -NEGATIVE * eps * done.top).squeeze(-1)
    length = torch.where(torch.isfinite(largest), length, torch.nan)
    falling = normalized(done.falling) * (torch.where(done.bend < 0, -done.bend, 1) * rows).rsqrt()
    if probe is not None:
        constant = (largest == 0) & (size == 0)
        saddle, falling = saddle | constant, torch.where(constant.unsqueeze(-1), probe.to(falling.dtype), falling)
    return NewtonStep(length, ~flat | (left == 0), size <= noise, saddle, falling)


def unstable_direction(product: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A direction in which prox-gradient steps move away from their fixed point x, and whether there is one, ``(*batch)``.

    Args:
        product: p -> p − ∂g/∂x p. On the directions that the prox leaves free, it is symmetric for the usual ones.
        x: ``(*batch, n)``.
    """
    free = some_direction(torch.zeros_like(x))
    free = normalized(free - product(free))
    image = product(free)
    longer = lambda state: _longer(product, state, l2_norm, None)  # noqa: E731
    found: _CG = while_loop(lambda state: (state.slow < 2).any(), longer, _begin(free, image), PROBES)
    return normalized(found.falling), (found.bend < -(torch.finfo(x.dtype).eps ** 0.5) * found.top).squeeze(-1)


class _Bottom(NamedTuple):
    """An estimate of the smallest Ritz value, 1/ω: L Lᵀ is the Lanczos matrix, and ω ≤ ‖L⁻¹‖²; numbers are ``(*batch, 1)``.

    Source: Meurant and Tichý (2019), Approximating the extreme Ritz values and upper bounds for the A-norm of the error in CG.
    """

    omega: Tensor  # ‖L⁻ᵀz‖² for the unit vector z that is kept
    tau: Tensor  # (L⁻ᵀz)ᵀu
    upsilon: Tensor  # ‖u‖², with u = L⁻ᵀ times the last unit vector
    alpha: Tensor  # of the last update; 0 before the first
    beta: Tensor  # since then

    def pushed(self, alpha: Tensor, beta: Tensor) -> "_Bottom":
        """With the next row of L, of the step length α, and the β that follows."""
        ratio = torch.where(self.alpha > 0, self.beta * alpha / torch.where(self.alpha > 0, self.alpha, 1), 0)
        upsilon, off = ratio * self.upsilon + alpha, -torch.where(ratio > 0, ratio, 0).sqrt() * self.tau
        # The larger eigenvalue of [[ω, off], [off, υ]] and its unit eigenvector (s, t).
        half, mean = 0.5 * (self.omega - upsilon), 0.5 * (self.omega + upsilon)
        omega = mean + torch.hypot(half, off)
        s, t = torch.where(half > 0, omega - upsilon, off), torch.where(half > 0, off, omega - self.omega)
        length = torch.hypot(s, t)
        tau = torch.where(length > 0, (s * off + t * upsilon) / torch.where(length > 0, length, 1), upsilon)
        return _Bottom(omega, tau, upsilon, alpha, beta)


class _CG(NamedTuple):
    """Numbers are ``(*batch, 1)``."""

    step: Tensor  # e, (*batch, n)
    left: Tensor  # the residual, right − H e
    direction: Tensor  # d
    image: Tensor  # H d
    length: Tensor  # ‖e‖
    top: Tensor  # the largest ‖H d‖ / ‖d‖ so far
    bottom: _Bottom  # the smallest curvature
    slow: Tensor  # the number of updates in which e grew little; 2 or more: finished
    end: Tensor  # |curvature| of the direction at which the iteration ended, if it is not positive; −1: none
    falling: Tensor  # (*batch, n), a direction of negative curvature
    bend: Tensor  # the curvature along it


def _begin(right: Tensor, image: Tensor) -> "_CG":
    """e = 0, for H e = right and the product of that."""
    top = length_of(image)
    none = torch.zeros_like(top)
    zero = torch.zeros_like(right)
    top = top / torch.where(top > 0, length_of(right), 1)
    bottom = _Bottom(none, none, none, none, none)
    return _CG(zero, right, right, image, none, top, bottom, none, none - 1, zero, none)


def _longer(product: Callable[[Tensor], Tensor], state: _CG, norm: Callable[[Tensor], Tensor], enough: Tensor | None) -> _CG:
    e, left, d, image, length, top, bottom, slow, end, falling, bend = state
    along, before, squared = dot(d, image), dot(left, left), dot(d, d)
    top = torch.maximum(top, length_of(image) / torch.where(squared > 0, squared, 1).sqrt())
    goes_on, curvature = slow < 2, along / torch.where(squared > 0, squared, 1)
    lower = goes_on & (curvature < bend) & (curvature < 0)
    falling, bend = torch.where(lower, d, falling), torch.where(lower, curvature, bend)
    lost = goes_on & ~(curvature > NOISE * torch.finfo(d.dtype).eps * top)
    grows = goes_on & ~lost & (squared > 0)
    end = torch.where(lost, curvature.abs(), end)
    alpha = torch.where(grows, before / torch.where(grows, along, 1), 0)
    e, left = e + alpha * d, left - alpha * image
    longer, after = length_of(e), dot(left, left)
    beta = after / torch.where(before > 0, before, 1)
    bottom = _Bottom(*(torch.where(grows, new, old) for new, old in zip(bottom.pushed(alpha, beta), bottom, strict=True)))
    # With a residual that is large in comparison with the smallest curvature, most of the step may still be missing.
    growing = (longer > MAX_GROWTH * length) | (bottom.omega * after.sqrt() > MAX_REST * longer)
    slow = torch.where(grows, torch.where(growing, 0, slow + 1), 2)
    if enough is not None:
        slow = torch.where(norm(e).unsqueeze(-1).to(enough.dtype) > enough, 2, slow)
    d = torch.where(lost, d, left + beta * d)
    if readable(slow) and not bool((slow < 2).any()):
        return _CG(e, left, d, image, longer, top, bottom, slow, end, falling, bend)
    return _CG(e, left, d, product(d), longer, top, bottom, slow, end, falling, bend)

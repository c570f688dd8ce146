"""Constraints and nonsmooth terms, given by their proximal maps: what a `ProximalStep` takes besides the energy.

A bound, radius or weight is a float, a tensor, or a pytree of such like ``x``. A tensor may require grad and broadcasts to
``x``, so one value per sample of ``(B, n)`` is ``(B, 1)`` for `Box` and `L1`, which act on each number, and ``(B,)`` for
`Simplex`, `CappedSimplex`, `L2Ball` and `GroupL2`, which act along the last dimension.

The maps are differentiable to any order wherever the derivatives exist; at a kink they give the derivative of one side. NaN
in the input gives NaN in the output: every condition is written so that NaN passes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import readable
from energynet.solve import fixed_point
from energynet.solvers import Nesterov
from energynet.step import Prox, per_sample
from energynet.termination import Termination

__all__ = ["Affine", "Box", "CappedSimplex", "GroupL2", "L1", "L2Ball", "NonNegative", "Prox", "Simplex", "TotalVariation"]


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Box(Prox):
    """Bounds on every number: lower ≤ x ≤ upper.

    Example:
        >>> import torch
        >>> Box(0.0, torch.tensor([1.0, 2.0]))(torch.tensor([[-3.0, 3.0]]), 1.0)      # (B, 2) -> (B, 2)
        tensor([[0., 2.]])

    Args:
        lower: a float or a tensor that broadcasts to ``x``; None: no bound.
        upper: likewise.

    Raises:
        ValueError: if lower > upper somewhere.
    """

    is_box: ClassVar[bool] = True
    lower: Any = None
    upper: Any = None

    def __post_init__(self) -> None:
        if _is_value(self.lower) != _is_value(self.upper):
            both = _like(self.lower, self.upper), _like(self.upper, self.lower)
        else:
            both = self.lower, self.upper
        _tree.map_structure(_refuse_crossed, *both)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return _each(_clip, x, self.lower, self.upper)


@final
@dataclasses.dataclass(frozen=True)
class NonNegative(Prox):
    """x ≥ 0.

    Example:
        >>> import torch
        >>> NonNegative()(torch.tensor([[-3.0, 3.0]]), 1.0)
        tensor([[0., 3.]])
    """

    is_box: ClassVar[bool] = True

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return _each(lambda x: _clip(x, 0.0, None), x)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Simplex(Prox):
    """x ≥ 0 with Σ x = radius along the last dimension.

    Example:
        >>> import torch
        >>> Simplex()(torch.tensor([[0.5, 0.5, -1.0], [3.0, 0.0, 0.0]]), 1.0)          # (B, n) -> (B, n)
        tensor([[0.5000, 0.5000, 0.0000],
                [1.0000, 0.0000, 0.0000]])

    Args:
        radius: a float, or a tensor that broadcasts to ``x`` without its last dimension, as ``(B,)``.

    Raises:
        ValueError: if the radius is negative.

    Source: Held, Wolfe and Crowder (1974); Duchi et al. (2008), Efficient projections onto the l1-ball.
    """

    radius: Any = 1.0

    def __post_init__(self) -> None:
        _refuse_negative("Simplex", "radius", self.radius)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return _each(_onto_simplex, x, self.radius)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class CappedSimplex(Prox):
    """0 ≤ x ≤ upper with Σ x = radius along the last dimension, such as the shares of a portfolio in which none may exceed a
    tenth.

    Example:
        >>> import torch
        >>> CappedSimplex(upper=0.6)(torch.tensor([[3.0, 0.1, 0.0], [0.0, 0.0, 0.0]]), 1.0)        # (B, n) -> (B, n)
        tensor([[0.6000, 0.2500, 0.1500],
                [0.3333, 0.3333, 0.3333]])

    Args:
        upper: a float or a tensor that broadcasts to ``x``.
        radius: a float, or a tensor that broadcasts to ``x`` without its last dimension, as ``(B,)``.

    Raises:
        ValueError: if one of them is negative; when called, if Σ upper < radius. Where values cannot be read at once, under
            ``vmap`` or on an accelerator, the result is NaN instead.

    Source: Wang and Lu (2015), Projection onto the capped simplex.
    """

    upper: Any
    radius: Any = 1.0

    def __post_init__(self) -> None:
        _refuse_negative("CappedSimplex", "upper", self.upper)
        _refuse_negative("CappedSimplex", "radius", self.radius)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return _each(_onto_capped_simplex, x, self.upper, self.radius)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class L2Ball(Prox):
    """‖x − center‖ ≤ radius along the last dimension.

    Example:
        >>> import torch
        >>> L2Ball(radius=1.0)(torch.tensor([[3.0, 4.0], [0.1, 0.2]]), 1.0)            # (B, n) -> (B, n)
        tensor([[0.6000, 0.8000],
                [0.1000, 0.2000]])

    Args:
        radius: a float, or a tensor that broadcasts to ``x`` without its last dimension, as ``(B,)``.
        center: a float or a tensor that broadcasts to ``x``; None: 0.

    Raises:
        ValueError: if the radius is negative.
    """

    radius: Any = 1.0
    center: Any = None

    def __post_init__(self) -> None:
        _refuse_negative("L2Ball", "radius", self.radius)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return _each(_onto_ball, x, self.radius, self.center)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class L1(Prox):
    """The term weight · ‖x‖₁: numbers smaller than γ · weight become zero, the others shrink by it.

    Example:
        >>> import torch
        >>> L1(weight=2.0)(torch.tensor([[3.0, -0.5]]), 0.5)
        tensor([[2., 0.]])

    Args:
        weight: a float or a tensor that broadcasts to ``x``.

    Raises:
        ValueError: if a weight is negative.

    Source: Donoho and Johnstone (1994), soft thresholding.
    """

    weight: Any

    def __post_init__(self) -> None:
        _refuse_negative("L1", "weight", self.weight)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return _each(lambda x, weight: _shrink(x, per_sample(step_size, x.ndim) * weight), x, self.weight)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class GroupL2(Prox):
    """The term weight · Σ ‖x‖ with one norm for each last dimension: groups become zero as a whole.

    Example:
        >>> import torch
        >>> GroupL2(weight=2.5)(torch.tensor([[[3.0, 4.0], [0.6, 0.8]]]), 1.0)         # (B, groups, n)
        tensor([[[1.5000, 2.0000],
                 [0.0000, 0.0000]]])

    Args:
        weight: a float, or a tensor that broadcasts to ``x`` without its last dimension, as ``(groups,)``.

    Raises:
        ValueError: if a weight is negative.

    Source: Yuan and Lin (2006), Model selection and estimation in regression with grouped variables.
    """

    weight: Any

    def __post_init__(self) -> None:
        _refuse_negative("GroupL2", "weight", self.weight)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return _each(lambda x, weight: _shrink_group(x, per_sample(step_size, x.ndim) * _last(weight)), x, self.weight)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Affine(Prox):
    """Linear equations, matrix · x = right, on the last dimension.

    The matrix is factorized once per solve, Aᵀ = Q R, and the projection is x − Q Qᵀ x + Q R⁻ᵀ b.

    Example:
        >>> import torch
        >>> from energynet.step import ProximalStep
        >>> plane = Affine(torch.ones(1, 2), torch.ones(1))                            # (m, n), (m,)
        >>> ProximalStep(lambda x: x.square().sum(-1), 0.5, plane)(torch.zeros(3, 2))[0]
        tensor([0.5000, 0.5000])

    Args:
        matrix: ``(m, n)``, m ≤ n, rows linearly independent; or ``(B, m, n)`` for ``x`` of shape ``(B, n)``.
        right: ``(m,)`` or ``(B, m)``.

    Raises:
        ValueError: if shapes do not fit, or the rows are dependent to working precision.
    """

    matrix: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        m, n = self.matrix.shape[-2:]
        if m > n or self.right.shape[-1:] != (m,):
            raise ValueError(
                f"Affine needs a matrix (m, n) with m ≤ n and a right-hand side (m,), got {tuple(self.matrix.shape)} and "
                f"{tuple(self.right.shape)}."
            )

    def encode(self, *context: Any) -> tuple[Tensor, Tensor]:
        working = torch.promote_types(self.matrix.dtype, torch.float32)  # no half-precision factorizations exist
        q, r = torch.linalg.qr(self.matrix.mT.to(working))
        pivots = r.detach().diagonal(dim1=-2, dim2=-1).abs()
        least = 100 * torch.finfo(r.dtype).eps * torch.linalg.matrix_norm(r.detach()).unsqueeze(-1)
        if readable(pivots) and bool((pivots <= least).any()):
            raise ValueError(
                f"Affine needs linearly independent rows; one of the {r.shape[-1]} is a combination of the others, to within "
                f"{float(pivots.min()):.1e}. Leave out rows that repeat what others say."
            )
        weights = torch.linalg.solve_triangular(r.mT, self.right.to(working).unsqueeze(-1), upper=False)
        return q, (q @ weights).squeeze(-1)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        q, particular = code or self.encode()
        return _each(lambda x: (x - (q @ (q.mT @ x.to(q.dtype).unsqueeze(-1))).squeeze(-1) + particular).to(x.dtype), x)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class TotalVariation(Prox):
    """The term weight · Σ ‖differences of neighbors‖ over the last ``dims`` dimensions: piecewise constant answers.

    Its proximal map is itself a solve, of the dual problem by accelerated projected gradients, and differentiable to any
    order like every solve. If that does not converge, the result is NaN, so that the outer solve fails too.

    Example:
        >>> import torch
        >>> TotalVariation(weight=1.0)(torch.tensor([[0.0, 0.0, 4.0, 4.0]]), 1.0).round(decimals=3)      # (B, n)
        tensor([[0.5000, 0.5000, 3.5000, 3.5000]])

    Args:
        weight: a float, or a tensor that broadcasts to ``x`` without its last ``dims`` dimensions, as ``(B,)``.
        dims: how many trailing dimensions have neighbors: 1 for signals ``(B, n)``, 2 for images ``(B, H, W)``.
        isotropic: whether differences in all directions are combined, √(dx² + dy²), or taken separately, abs(dx) + abs(dy).
        termination: of the inner solve, in units of ‖x − mean(x)‖; default: ε^¾ of the dtype, in at most 20 000 steps.

    Raises:
        ValueError: if a weight is negative, or dims < 1.

    Source: Rudin, Osher and Fatemi (1992); Chambolle (2004), the dual; Beck and Teboulle (2009), its acceleration.
    """

    weight: Any
    dims: int = 1
    isotropic: bool = True
    termination: Termination | None = None

    def __post_init__(self) -> None:
        _refuse_negative("TotalVariation", "weight", self.weight)
        if self.dims < 1:
            raise ValueError(f"TotalVariation needs dims ≥ 1, got {self.dims}.")

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return _each(lambda x, weight: self._flatten(x, per_sample(step_size, x.ndim - self.dims) * weight), x, self.weight)

    def _flatten(self, x: Tensor, threshold: float | Tensor) -> Tensor:
        """On one leaf: each index of the leading dimensions is a problem of its own."""
        if x.ndim < self.dims:
            raise ValueError(f"TotalVariation(dims={self.dims}) needs as many dimensions at least; x has shape {tuple(x.shape)}.")
        if not x.numel():
            return x
        shape = x.shape[: x.ndim - self.dims]
        thresholds = torch.as_tensor(threshold, dtype=x.dtype, device=x.device).expand(shape).reshape(-1)
        rows = x.reshape(-1, *x.shape[len(shape) :])
        return self._denoise(rows, thresholds).reshape(x.shape)

    def _denoise(self, x: Tensor, threshold: Tensor) -> Tensor:  # (K, *grid), (K,)
        """In units of each row's own deviation from its mean, of which the tolerance and the rounding unit are fractions."""
        flat = x.detach().flatten(1)
        middle = flat.mean(1)
        size = torch.linalg.vector_norm(flat - middle.unsqueeze(1), dim=1)
        size = torch.where((size > 0) & torch.isfinite(size), size, 1)
        rows = (x - per_sample(middle, x.ndim)) / per_sample(size, x.ndim)
        return per_sample(middle, x.ndim) + per_sample(size, x.ndim) * self._denoise_unit(rows, threshold / size)

    def _denoise_unit(self, x: Tensor, threshold: Tensor) -> Tensor:
        termination = self.termination or Termination(rtol=float(torch.finfo(x.dtype).eps ** 0.75), max_steps=20_000)
        dual = fixed_point(
            _DualStep(self.dims, self.isotropic), torch.zeros_like(_differences(x, self.dims)), x, threshold,
            solver=Nesterov(), termination=termination, on_failure="ignore",
        )  # fmt: skip
        answer = x - _adjoint_differences(dual.value, self.dims)
        return torch.where(dual.converged.reshape(-1, *[1] * self.dims), answer, torch.nan)


@dataclasses.dataclass(frozen=True)
class _DualStep:
    """Projected gradient step on ½‖x − Dᵀp‖² over |p| ≤ threshold; 4 · dims bounds the curvature D Dᵀ."""

    dims: int
    isotropic: bool

    def __call__(self, p: Tensor, x: Tensor, threshold: Tensor) -> Tensor:  # (K, *grid, dims), (K, *grid), (K,)
        moved = p + _differences(x - _adjoint_differences(p, self.dims), self.dims) / (4 * self.dims)
        radius = threshold.reshape(-1, *[1] * self.dims)
        if self.isotropic and self.dims > 1:
            return _onto_ball(moved, radius, None)
        return _clip(moved, -radius.unsqueeze(-1), radius.unsqueeze(-1))


def _differences(x: Tensor, dims: int) -> Tensor:  # (K, *grid) -> (K, *grid, dims)
    """D: from each point to the next one, zero at the last."""
    return torch.stack([torch.cat((x.diff(dim=d), 0 * x.narrow(d, 0, 1)), d) for d in range(-dims, 0)], -1)


def _adjoint_differences(p: Tensor, dims: int) -> Tensor:  # (K, *grid, dims) -> (K, *grid)
    """Dᵀ."""
    result = torch.zeros_like(p[..., 0])
    for d, part in zip(range(-dims, 0), p.unbind(-1), strict=True):
        inner, edge = part.narrow(d, 0, part.shape[d] - 1), torch.zeros_like(part.narrow(d, 0, 1))
        result = result + torch.cat((edge, inner), d) - torch.cat((inner, edge), d)
    return result


# ------------------------------------------------------------------------------------------------- on one leaf


def _clip(x: Tensor, lower: Any, upper: Any) -> Tensor:
    """On a bound the derivative is that of the inside; torch.maximum would halve it."""
    x = x if lower is None else torch.where(_or_nan(x < lower, lower), lower, x)
    return x if upper is None else torch.where(_or_nan(x > upper, upper), upper, x)


def _or_nan(crossed: Tensor, bound: Any) -> Tensor:
    """A bound that is NaN is no bound that is missing."""
    return crossed | torch.isnan(bound) if isinstance(bound, Tensor) else crossed


def _shrink(x: Tensor, threshold: float | Tensor) -> Tensor:
    small = (x.abs() <= threshold) & (_positive(threshold))
    return torch.where(small, 0, x - threshold * x.detach().sign())


def _shrink_group(x: Tensor, threshold: float | Tensor) -> Tensor:
    length = _length(x)
    small = (length <= threshold) & _positive(threshold)
    factor = 1 - threshold / torch.where(small | (length == 0), 1, length)
    return torch.where(small, 0, x * factor)


def _onto_ball(x: Tensor, radius: Any, center: Any) -> Tensor:
    offset = x if center is None else x - center
    length, radius = _length(offset), _last(radius)
    inside = length <= radius
    factor = torch.where(inside, 1, radius / torch.where(inside, 1, length))
    return torch.where(inside, x, x - offset + factor * offset)


def _onto_simplex(x: Tensor, radius: Any) -> Tensor:
    """x − τ where that is positive, τ such that the sum is right: linear in x and radius on each support."""
    if not x.shape[-1]:
        return _of_no_numbers(x, radius)
    radius = _last(radius)
    y = x.detach() - x.detach().amax(-1, keepdim=True)
    support = _support(y, radius.detach() if isinstance(radius, Tensor) else radius)
    above = _shifted(x, support, radius)
    # Not relu: on the edge of the support τ counts a number, so its own derivative belongs to it as well.
    rounding = above.detach().clamp_min(0) - above.detach()
    return torch.where(support, above + rounding, 0)


def _shifted(x: Tensor, free: Tensor, total: Any) -> Tensor:
    """x − τ, τ such that the free ones of its numbers sum to ``total``."""
    largest = torch.where(free, x.detach(), -torch.inf).amax(-1, keepdim=True)
    y = x - largest  # moves τ only, and keeps its digits
    return y - (torch.where(free, y, 0).sum(-1, keepdim=True) - total) / free.sum(-1, keepdim=True)


def _onto_capped_simplex(x: Tensor, upper: Any, radius: Any) -> Tensor:
    """x − τ, cut at 0 and at its upper bound, τ such that the sum is right: linear in all three on each set of those cut."""
    if not x.shape[-1]:
        return _of_no_numbers(x, radius)
    working = x.dtype if x.dtype == torch.float64 else torch.float32
    radius, upper = (torch.as_tensor(v, dtype=working, device=x.device) for v in (_last(radius), upper))
    y, upper = x.to(working), upper.expand_as(x)
    room, needed = torch.broadcast_tensors(upper.detach().sum(-1, keepdim=True), radius.detach())
    enough = ~(room < needed * (1 - 8 * x.shape[-1] * torch.finfo(working).eps))
    _refuse_too_small(enough, room, needed)
    capped, free = _capped_and_free(y.detach(), torch.minimum(upper, radius).detach(), radius.detach())
    above = _shifted(y, free, radius - torch.where(capped, upper, 0).sum(-1, keepdim=True))
    rounding = torch.minimum(above.detach().clamp_min(0), upper.detach()) - above.detach()
    found = torch.where(free, above + rounding, torch.where(capped, upper, 0))
    return torch.where(enough & ~torch.isnan(y.detach().sum(-1, keepdim=True)), found, torch.nan)


def _capped_and_free(x: Tensor, upper: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Which numbers end at their upper bound and which between their bounds.

    As τ falls a number starts to grow at τ = x, and stops at τ = x − upper. In the order of these events the sum is known at
    each; the last event before it reaches the radius says all.
    """
    n = x.shape[-1]
    events, order = torch.cat([x, x - upper], -1).sort(dim=-1, descending=True, stable=True)
    growing = torch.where(order < n, 1, -1).cumsum(-1)
    nothing = torch.zeros_like(x[..., :1])
    grown = torch.cat([nothing, -(growing[..., :-1] * events.diff(dim=-1)).cumsum(-1)], -1)
    lost = torch.cat([torch.zeros_like(x), upper - (x - (x - upper))], -1).gather(-1, order)  # in the rounding of x − upper
    reached = grown + lost.cumsum(-1) >= radius
    reached = torch.cat([reached[..., :-1], torch.ones_like(reached[..., :1])], -1)
    last = reached.to(torch.int8).argmax(-1, keepdim=True).clamp_min(1)
    started, stopped = (order.argsort(-1) < last).split(n, -1)
    return stopped, started & ~stopped


def _refuse_too_small(enough: Tensor, room: Tensor, needed: Tensor) -> None:
    """Where looking at values costs nothing."""
    if enough.device.type == "cpu" and readable(enough) and not bool(enough.all()):
        sample = int((~enough).flatten().nonzero()[0])
        raise ValueError(
            f"CappedSimplex asks for a sum of {float(needed.flatten()[sample]):g} from numbers whose upper bounds sum to "
            f"{float(room.flatten()[sample]):g} (sample {sample}): nothing meets that. Raise upper, or lower radius."
        )


def _of_no_numbers(x: Tensor, radius: Any) -> Tensor:
    """Nothing sums to zero."""
    positive = radius.detach() > 0 if isinstance(radius, Tensor) else torch.tensor(radius > 0)
    if x.shape[0] and readable(positive) and bool(positive.any()):
        raise ValueError(f"Simplex asks for a positive sum of no number: x has shape {tuple(x.shape)}. Nothing meets that.")
    return x


def _support(y: Tensor, radius: Any) -> Tensor:
    ordered = y.sort(-1, descending=True).values
    count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    thresholds = (ordered.cumsum(-1) - radius) / count
    size = (ordered > thresholds).sum(-1, keepdim=True).clamp_min(1)
    return ~(y < thresholds.gather(-1, size - 1))


def _length(x: Tensor) -> Tensor:  # (..., n) -> (..., 1)
    """Norm along the last dimension with derivative 0 at 0; scaled, so that no square over- or underflows."""
    if not x.shape[-1]:
        return x.sum(-1, keepdim=True)
    largest = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
    square = (x / scale).square().sum(-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt()) * scale


def _positive(value: float | Tensor) -> Any:
    """Whether a threshold does anything; at 0 the map is the identity, also in its derivative."""
    return value > 0


def _last(value: Any) -> Any:
    """One value for each last dimension, ready to be broadcast along it."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.ndim else value


# ------------------------------------------------------------------------------------------------- pytrees and checks


def _each(function: Callable[..., Tensor], x: Any, *values: Any) -> Any:
    """Apply to every leaf of ``x`` and what belongs to it; the result keeps the leaf's dtype."""
    return _tree.map_structure(lambda x, *v: function(x, *v).to(x.dtype), x, *(_like(value, x) for value in values))


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, Tensor))


def _like(value: Any, tree: Any) -> Any:
    """One value for every leaf, or the pytree of values that was given."""
    return _tree.map_structure(lambda _: value, tree) if _is_value(value) else value


def _refuse_negative(owner: str, name: str, values: Any) -> None:
    for value in _tree.leaves(values):
        least = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        if readable(least) and not bool((least >= 0).all()):
            raise ValueError(f"{owner} needs {name} ≥ 0, got {float(least.min())}.")


def _refuse_crossed(lower: Any, upper: Any) -> None:
    if lower is None or upper is None:
        return
    low, high = torch.broadcast_tensors(*(torch.as_tensor(v).detach() for v in (lower, upper)))
    crossed = ~(low <= high)
    if readable(crossed) and bool(crossed.any()):
        raise ValueError(f"Box needs lower ≤ upper, got lower {float(low[crossed][0])} with upper {float(high[crossed][0])}.")

"""The formulas of the proximal maps on one tensor, their application to pytrees, and the checks of bounds and weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import readable


def clip(x: Tensor, lower: Any, upper: Any) -> Tensor:
    """Clamp ``x``; on a bound the derivative is that of the interior, whereas torch.maximum would halve it."""
    x = x if lower is None else torch.where(_or_nan(x < lower, lower), lower, x)
    return x if upper is None else torch.where(_or_nan(x > upper, upper), upper, x)


def _or_nan(crossed: Tensor, bound: Any) -> Tensor:
    """Let a NaN bound give NaN, unlike a missing bound."""
    return crossed | torch.isnan(bound) if isinstance(bound, Tensor) else crossed


def shrink(x: Tensor, threshold: float | Tensor) -> Tensor:
    small = (x.abs() <= threshold) & (_positive(threshold))
    return torch.where(small, 0, x - threshold * x.detach().sign())


def shrink_group(x: Tensor, threshold: float | Tensor) -> Tensor:
    length = _length(x)
    small = (length <= threshold) & _positive(threshold)
    factor = 1 - threshold / torch.where(small | (length == 0), 1, length)
    return torch.where(small, 0, x * factor)


def onto_ball(x: Tensor, radius: Any, center: Any) -> Tensor:
    offset = x if center is None else x - center
    length, radius = _length(offset), last(radius)
    inside = length <= radius
    factor = torch.where(inside, 1, radius / torch.where(inside, 1, length))
    return torch.where(inside, x, x - offset + factor * offset)


def onto_simplex(x: Tensor, radius: Any) -> Tensor:
    """max(0, x − τ) with τ such that the sum is the radius; linear in x and the radius on each support."""
    if not x.shape[-1]:
        return _of_no_numbers(x, radius)
    radius = last(radius)
    y = x.detach() - x.detach().amax(-1, keepdim=True)
    support = _support(y, radius.detach() if isinstance(radius, Tensor) else radius)
    above = _shifted(x, support, radius)
    # relu would drop the derivative of elements on the boundary of the support, which τ does include.
    rounding = above.detach().clamp_min(0) - above.detach()
    return torch.where(support, above + rounding, 0)


def _shifted(x: Tensor, free: Tensor, total: Any) -> Tensor:
    """x − τ, with τ such that the free elements sum to ``total``."""
    largest = torch.where(free, x.detach(), -torch.inf).amax(-1, keepdim=True)
    y = x - largest  # this changes only τ, and reduces rounding errors
    return y - (torch.where(free, y, 0).sum(-1, keepdim=True) - total) / free.sum(-1, keepdim=True)


def onto_capped_simplex(x: Tensor, upper: Any, radius: Any) -> Tensor:
    """x − τ clamped to [0, upper], with τ such that the sum is the radius; linear in all three on each active set."""
    if not x.shape[-1]:
        return _of_no_numbers(x, radius)
    working = x.dtype if x.dtype == torch.float64 else torch.float32
    radius, upper = (torch.as_tensor(v, dtype=working, device=x.device) for v in (last(radius), upper))
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
    """Which elements end at their upper bound, and which between their bounds.

    As τ decreases, an element starts to grow at τ = x and stops at τ = x − upper. The sum at each of these events is computed
    in order; the last event before the sum reaches the radius determines the active set.
    """
    n = x.shape[-1]
    events, order = torch.cat([x, x - upper], -1).sort(dim=-1, descending=True, stable=True)
    growing = torch.where(order < n, 1, -1).cumsum(-1)
    nothing = torch.zeros_like(x[..., :1])
    grown = torch.cat([nothing, -(growing[..., :-1] * events.diff(dim=-1)).cumsum(-1)], -1)
    lost = torch.cat([torch.zeros_like(x), upper - (x - (x - upper))], -1).gather(-1, order)  # the rounding error of x − upper
    reached = grown + lost.cumsum(-1) >= radius
    reached = torch.cat([reached[..., :-1], torch.ones_like(reached[..., :1])], -1)
    last = reached.to(torch.int8).argmax(-1, keepdim=True).clamp_min(1)
    started, stopped = (order.argsort(-1) < last).split(n, -1)
    return stopped, started & ~stopped


def _refuse_too_small(enough: Tensor, room: Tensor, needed: Tensor) -> None:
    """Raise an error where reading values costs nothing."""
    if enough.device.type == "cpu" and readable(enough) and not bool(enough.all()):
        sample = int((~enough).flatten().nonzero()[0])
        raise ValueError(
            f"CappedSimplex requires a sum of {float(needed.flatten()[sample]):g}, but the upper bounds sum to "
            f"{float(room.flatten()[sample]):g} (sample {sample}), so the set is empty. Raise upper, or lower radius."
        )


def _of_no_numbers(x: Tensor, radius: Any) -> Tensor:
    """The projection for n = 0, where the sum is zero."""
    positive = radius.detach() > 0 if isinstance(radius, Tensor) else torch.tensor(radius > 0)
    if x.shape[0] and readable(positive) and bool(positive.any()):
        raise ValueError(f"Simplex requires a positive sum, but x has shape {tuple(x.shape)}, so the set is empty.")
    return x


def _support(y: Tensor, radius: Any) -> Tensor:
    ordered = y.sort(-1, descending=True).values
    count = torch.arange(1, y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    thresholds = (ordered.cumsum(-1) - radius) / count
    size = (ordered > thresholds).sum(-1, keepdim=True).clamp_min(1)
    return ~(y < thresholds.gather(-1, size - 1))


def _length(x: Tensor) -> Tensor:  # (..., n) -> (..., 1)
    """The norm along the last dimension, with derivative 0 at 0; it is scaled, so that no square over- or underflows."""
    if not x.shape[-1]:
        return x.sum(-1, keepdim=True)
    largest = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
    square = (x / scale).square().sum(-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt()) * scale


def _positive(value: float | Tensor) -> Any:
    """Whether a threshold has an effect; at 0 the map is the identity, and so is its derivative."""
    return value > 0 if isinstance(value, Tensor) else bool(value > 0)


def last(value: Any) -> Any:
    """A value that broadcasts along the last dimension of ``x``."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.ndim else value


def each(function: Callable[..., Tensor], x: Any, *values: Any) -> Any:
    """Apply a function to every leaf of ``x`` and the corresponding values; the result keeps the leaf's dtype."""
    return _tree.map_structure(lambda x, *v: function(x, *v).to(x.dtype), x, *(like(value, x) for value in values))


def is_value(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, Tensor))


def like(value: Any, tree: Any) -> Any:
    """A pytree of values like ``tree``: a single value is repeated for every leaf."""
    if is_value(value):
        return _tree.map_structure(lambda _: value, tree)
    if isinstance(tree, Tensor):
        raise TypeError(
            f"x is one tensor, so each argument of its prox must be a number or a tensor, got {value!r}. Convert it, as by "
            "torch.tensor(...)."
        )
    return value


def refuse_others(owner: str, name: str, values: Any) -> None:
    """Refuse anything that is not a number, a tensor or a pytree of such."""
    for value in _tree.leaves(values):
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            array = " Pass torch.as_tensor(...)." if hasattr(value, "__array__") else ""
            raise TypeError(f"{owner} needs {name} to be a number, a tensor or a pytree of such, got {value!r}.{array}")


def refuse_negative(owner: str, name: str, values: Any) -> None:
    refuse_others(owner, name, values)
    for value in _tree.leaves(values):
        least = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        if readable(least) and not bool((least >= 0).all()):
            raise ValueError(f"{owner} needs {name} ≥ 0, got {float(least.min())}.")


def refuse_crossed(lower: Any, upper: Any) -> None:
    if lower is None or upper is None:
        return
    low, high = torch.broadcast_tensors(*(torch.as_tensor(v).detach() for v in (lower, upper)))
    crossed = ~(low <= high)
    if readable(crossed) and bool(crossed.any()):
        raise ValueError(f"Box needs lower ≤ upper, got lower {float(low[crossed][0])} with upper {float(high[crossed][0])}.")

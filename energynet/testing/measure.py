"""The measurements that all checks share: finite differences, permutations of the batch's rows, power iterations."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from energynet._torch import tree as _tree

Product = Callable[[Tensor], Tensor]


class CheckError(AssertionError):
    """A check failed; the message states the finding, the likely cause and the remedy."""


class Report:
    """The measurements of a check, printed with one number per line."""

    def __repr__(self) -> str:
        assert dataclasses.is_dataclass(self)
        rows = [f"  {f.name} = {_figure(getattr(self, f.name))}" for f in dataclasses.fields(self)]
        return "\n".join([f"{type(self).__name__}: passed", *rows])


def _figure(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_figure, value)) + ")"
    return f"{value:.3g}" if isinstance(value, float) else "not tested" if value is None else str(value)


@contextlib.contextmanager
def own_random_numbers(seed: int = 0) -> Iterator[None]:
    """A context in which random numbers have a fixed seed, and which restores the caller's generators."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        yield


def copied(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """The pytree with its tensors detached and cloned, and floating-point tensors converted to ``dtype``."""

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        t = t.detach().clone()
        return t.to(dtype) if dtype is not None and t.is_floating_point() else t

    return _tree.map_structure(leaf, tree)


def floating(named: dict[str, Any]) -> dict[str, Tensor]:
    """Every floating-point tensor in the named pytrees, under a name that states its position."""
    found = {}
    for name, tree in named.items():
        leaves = _tree.leaves(tree)
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                found[name if len(leaves) == 1 else f"{name}, leaf {k}"] = leaf
    return found


def replaced(tree: Any, old: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    """The pytree with the ``new`` tensors in place of the ``old`` ones."""
    chosen = {id(a): b for a, b in zip(old, new, strict=True)}
    return _tree.map_structure(lambda t: chosen.get(id(t), t), tree)


def equal(a: Any, b: Any) -> bool:
    """Whether two pytrees contain the same values, where NaN equals NaN."""
    pairs = zip(_tree.leaves(a), _tree.leaves(b), strict=True)
    return all(torch.equal(torch.nan_to_num(s), torch.nan_to_num(t)) if isinstance(s, Tensor) else True for s, t in pairs)


def largest(values: Tensor) -> float:
    """The largest magnitude; 0 for an empty tensor, Inf if a value is not finite."""
    found = float(values.detach().abs().max()) if values.numel() else 0.0
    return found if found == found else float("inf")


# ------------------------------------------------------------------------------------------------- samples


def take(tree: Any, rows: Tensor, batch: int) -> Any:
    """These rows of every tensor whose leading dimension counts samples: ``(batch, ...) -> (len(rows), ...)``."""
    return _tree.map_structure(lambda t: t[rows] if isinstance(t, Tensor) and t.shape[:1] == (batch,) else t, tree)


def check_independent(function: Callable[[Any], Tensor], inputs: Any, batch: int, limit: float, what: str) -> float | None:
    """Check that a function of batched inputs commutes with selections of rows: reversed, halved, all but one replaced.

    Args:
        function: pytree with tensors ``(B, ...)`` -> ``(B, n)``.

    Returns:
        The largest change, relative to the size of the values; None if there is only one sample.
    """
    if batch < 2:
        return None
    half = (batch + 1) // 2
    first, last = torch.arange(batch), torch.arange(batch)
    first[half:], last[: batch - 1] = 0, batch - 1
    maps = {
        "the order of the batch is reversed": torch.arange(batch).flip(0),
        "the other half of the batch is left out": torch.arange(half),
        "other samples are replaced": first,
        "all other samples are replaced": last,
    }
    values = function(inputs)
    worst = 0.0
    for action, rows in maps.items():
        change = _change(function, inputs, batch, rows, values)
        if not bool((change <= limit).all()):
            seen = sorted(set(rows[~(change <= limit)].tolist()))
            raise CheckError(
                f"{what} of sample {_some(seen)} changes by {float(change.max()):.2g} (relative) when {action}. Likely cause: a "
                "mean, sum, norm or softmax over the batch dimension, or BatchNorm. Reduce over all dimensions but the first, as "
                f"in .flatten(1).sum(-1). (Every tensor with leading dimension {batch} was assumed to have one row per sample; "
                "if one is shared by all samples, repeat the check with another batch size.)"
            )
        worst = max(worst, float(change.max()))
    return worst


def _change(function: Callable[[Any], Tensor], inputs: Any, batch: int, rows: Tensor, values: Tensor) -> Tensor:
    try:
        mapped = function(take(inputs, rows, batch))
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckError(
            f"Evaluating rows {rows.tolist()} of a batch of {batch} raised {type(error).__name__}: {error} Likely cause: the "
            f"batch size is fixed inside, or a tensor shared by all samples happens to have the leading dimension {batch}. Take "
            "the batch size from x.shape[0], or repeat the check with another batch size."
        ) from error
    size = values.abs().amax()
    return (mapped - values[rows]).abs().flatten(1).amax(-1) / torch.where(size > 0, size, 1)


def _some(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")


# ------------------------------------------------------------------------------------------------- derivatives


def check_derivatives(function: Callable[[list[Tensor]], Tensor], tensors: dict[str, Tensor], limit: float, noise: float,
                      what: str) -> float:  # fmt: skip
    """Compare the derivative of a scalar with respect to each tensor, along a random direction, with central differences.

    Args:
        noise: the relative accuracy to which the function is evaluated.

    Returns:
        The largest relative error.
    """
    names, values = list(tensors), [t.detach().requires_grad_() for t in tensors.values()]
    output = function(values)
    gradients: Sequence[Tensor | None] = [None] * len(values)
    if output.requires_grad:
        gradients = torch.autograd.grad(output, values, allow_unused=True)
    worst = 0.0
    for k, name in enumerate(names):
        found = gradients[k]
        gradient = torch.zeros_like(values[k]) if found is None else found
        error, slope, difference = _directional_error(function, values, k, gradient, limit, noise)
        if not error <= limit:
            raise CheckError(
                f"{what} in {name} is {slope:.6g} along a random direction, but finite differences give {difference:.6g} "
                f"(relative error {error:.1e}). Likely cause: detach, .data, .item(), no_grad or NumPy inside, an inexact custom "
                "backward or adjoint, or a kink (ReLU) at this point. Keep every operation differentiable; for a kink, use a "
                "smooth function (softplus) or another point."
            )
        worst = max(worst, error)
    return worst


def _directional_error(function: Callable[[list[Tensor]], Tensor], values: list[Tensor], k: int, gradient: Tensor,
                       limit: float, noise: float) -> tuple[float, float, float]:  # fmt: skip
    """The smallest relative error over a few step lengths, the derivative, and the difference quotient."""
    size = values[k].detach().abs()
    best = (float("inf"), float("nan"), float("nan"))
    # Steps proportional to each element stay within the domain of log and sqrt for small elements; zeros stay zero.
    for scale in (1 + size, size):
        best = min(best, _along(function, values, k, gradient, torch.randn_like(size) * scale, limit, noise))
        if best[0] <= limit:
            break
    return best


def _along(function: Callable[[list[Tensor]], Tensor], values: list[Tensor], k: int, gradient: Tensor, direction: Tensor,
           limit: float, noise: float) -> tuple[float, float, float]:  # fmt: skip
    """The same as `_directional_error`, along one direction."""
    slope = float((gradient * direction).sum())
    typical = float(gradient.norm() * direction.norm()) / max(1, direction.numel()) ** 0.5
    best = (float("inf"), slope, float("nan"))
    if not bool(direction.any()):
        return best if direction.numel() else (0.0, slope, 0.0)
    for h in (1e-4, 1e-5, 1e-3):
        ends = [
            float(function([*values[:k], values[k].detach() + s * h * direction, *values[k + 1 :]]).detach())
            for s in (1, -1, 0.5, -0.5)
        ]
        coarse, fine = (ends[0] - ends[1]) / (2 * h), (ends[2] - ends[3]) / h
        difference = (4 * fine - coarse) / 3  # Richardson's extrapolation
        # Values below the rounding and truncation errors are indistinguishable from zero, such as the whole slope at a minimum.
        unknown = noise * (abs(ends[0]) + abs(ends[1])) / h + abs(difference - fine)
        error = abs(difference - slope) / max(typical, abs(slope), abs(difference), unknown / limit, 1e-300)
        best = min(best, (error if error == error else float("inf"), slope, difference))
        if best[0] <= 0.01 * limit:
            break
    return best


# ------------------------------------------------------------------------------------------------- spectra


def dominant(product: Product, like: Tensor, steps: int = 60) -> Tensor:  # -> (*batch)
    """The Rayleigh quotient of a symmetric matrix after a power iteration: the eigenvalue of largest magnitude, with its sign."""
    v = unit(torch.randn_like(like))
    for _ in range(steps):
        v = unit(product(v))
    return (v * product(v)).sum(-1)


def extreme_eigenvalues(product: Product, like: Tensor) -> tuple[Tensor, Tensor]:  # -> (*batch), (*batch)
    """Estimates of the smallest and the largest eigenvalue of a symmetric matrix, per sample."""
    one = dominant(product, like)
    other = one + dominant(lambda v: product(v) - one.unsqueeze(-1) * v, like)
    return torch.minimum(one, other), torch.maximum(one, other)


def spectral_radius(product: Product, like: Tensor, steps: int = 60) -> Tensor:  # -> (*batch)
    """The mean growth of a vector over the last powers of a matrix that need not be symmetric."""
    v, growth = unit(torch.randn_like(like)), torch.zeros_like(like[..., 0])
    for k in range(2 * steps):
        v = product(v)
        length = torch.linalg.vector_norm(v, dim=-1)
        growth = growth + (torch.log(length) if k >= steps else 0)
        v = unit(v)
    return torch.exp(growth / steps)


def unit(v: Tensor) -> Tensor:
    """The vectors scaled to length 1; zero stays zero."""
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return v / torch.where(length > 0, length, 1)

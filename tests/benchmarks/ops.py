"""The functions that the energies are made of, so that each energy is written once for PyTorch and JAX alike."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from energynet.energies.filters import Boundary, filter_bank


class Ops(NamedTuple):
    """What the arrays' own methods do not offer under the same name in both libraries."""

    cosh: Callable[[Any], Any]
    log: Callable[[Any], Any]
    relu: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]
    softplus: Callable[[Any], Any]
    huber: Callable[[Any], Any]  # √(1 + t²) - 1
    cat: Callable[[Any], Any]  # along the last dimension
    split: Callable[[Any, int], Any]  # so many of the last dimension, and the rest
    conv: Callable[[Any, Any], Any]  # (B, 1, H, W), (K, 1, s, s) -> (B, K, H, W), s odd, zeros around


def _conv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    return functional.conv2d(x, filters, padding=filters.shape[-1] // 2)


def _huber(t: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(1 + t**2) - 1


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, -1)


def _split(t: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return t.split([count, t.shape[-1] - count], -1)


TORCH = Ops(torch.cosh, torch.log, torch.relu, torch.sigmoid, functional.softplus, _huber, _cat, _split, _conv)


def _filter_bank(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    return filter_bank(x, filters, Boundary.ZERO)


def _hypot(t: torch.Tensor) -> torch.Tensor:
    return torch.hypot(t, t.new_ones(())) - 1


OURS = TORCH._replace(huber=_hypot, conv=_filter_bank)
"""With what energynet's ready-made image energy is made of."""


def jax_ops() -> Ops:
    import jax
    from jax import numpy as jnp

    def conv(x: Any, filters: Any) -> Any:
        return jax.lax.conv_general_dilated(x, filters, (1, 1), "SAME")

    return Ops(
        jnp.cosh, jnp.log, jax.nn.relu, jax.nn.sigmoid, jax.nn.softplus,
        huber=lambda t: jnp.sqrt(1 + t**2) - 1, cat=lambda parts: jnp.concatenate(parts, -1),
        split=lambda t, count: jnp.split(t, [count], -1), conv=conv,
    )  # fmt: skip

"""The global settings of PyTorch that change what operations compute, as they were when a solve was called.

The backward pass runs where the caller calls it; in the usual training loop with mixed precision, that is outside
``torch.autocast``. It has to differentiate the same energy that was solved, so all derivatives are taken under the settings of
the forward pass. Autocast applies to the energy or map only: a solver computes in the precision of its own tensors.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from energynet._torch.attention import Kernels, allowed_kernels, kernels


@dataclasses.dataclass(frozen=True)
class Ambient:
    """Global settings of PyTorch that affect operations.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     there = Ambient.now("cpu")
        >>> with there.solving():
        ...     inside = torch.is_autocast_enabled("cpu")
        ...     with there.evaluating():
        ...         inside, torch.is_autocast_enabled("cpu")
        (False, True)

    Args:
        device: the device type of the tensors.
        autocast: the device types for which autocast is enabled (the CPU included), each with its dtype.
        cache: whether autocast caches converted weights.
        default_dtype: PyTorch's default dtype.
        deterministic: PyTorch's deterministic debug mode: 0, 1 (warn) or 2 (raise).
        attention: the kernels that ``scaled_dot_product_attention`` may use.
    """

    device: str
    autocast: tuple[tuple[str, torch.dtype], ...]
    cache: bool
    default_dtype: torch.dtype
    deterministic: int
    attention: Kernels

    @classmethod
    def now(cls, device: str) -> "Ambient":
        """The current settings."""
        return cls(
            device,
            tuple((d, torch.get_autocast_dtype(d)) for d in _devices(device) if torch.is_autocast_enabled(d)),
            torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(),
            torch.get_deterministic_debug_mode(),
            allowed_kernels(),
        )

    def evaluating(self) -> AbstractContextManager[Any]:
        """A context that enables autocast for an evaluation of the energy or map inside `solving`."""
        if not self.autocast:
            return _NOTHING
        stack = ExitStack()
        for device, dtype in self.autocast:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=self.cache))
        return stack

    @contextlib.contextmanager
    def solving(self) -> Iterator[None]:
        """A context with all of these settings, but with autocast off.

        Most settings apply to all threads, so each one is only set where it differs from the current value.
        """
        around = Ambient.now(self.device)
        if around == self and not self.autocast:
            yield
            return
        torch.autocast_increment_nesting()  # keeps the weights that autocast has converted until the end
        try:
            self._set(around)
            for device in _devices(self.device):
                torch.set_autocast_enabled(device, False)
            with kernels(self.attention):
                yield
        finally:
            for device, dtype in around.autocast:
                torch.set_autocast_enabled(device, True)
                torch.set_autocast_dtype(device, dtype)
            around._set(self)
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    def _set(self, before: "Ambient") -> None:
        torch.set_autocast_cache_enabled(self.cache)
        if self.default_dtype != before.default_dtype:
            torch.set_default_dtype(self.default_dtype)
        if self.deterministic != before.deterministic:
            torch.set_deterministic_debug_mode(self.deterministic)


_NOTHING = contextlib.nullcontext()


def _devices(device: str) -> tuple[str, ...]:
    return ("cpu",) if device == "cpu" else ("cpu", device)

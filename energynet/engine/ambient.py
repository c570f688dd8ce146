"""The settings around a call that change what operations do, as they were when a solve was called.

A backward runs where the caller puts it: in the usual loop with mixed precision, outside of ``torch.autocast``. What it has to
differentiate is the energy that was solved, so all derivatives are taken under the settings of the forward. Autocast is for the
energy or map alone: a solver's own products are taken in the precision of its tensors.
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
    """Settings of PyTorch that are not arguments of an operation.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     there = Ambient.now("cpu")
        >>> with there.solving():
        ...     inside = torch.is_autocast_enabled("cpu")
        ...     with there.evaluating():
        ...         inside, torch.is_autocast_enabled("cpu")
        (False, True)

    Args:
        device: the kind of device of the tensors.
        autocast: the kinds where autocast is enabled, the CPU's included, and its dtype.
        cache: whether autocast converts a weight only once.
        default_dtype: of tensors made without one.
        deterministic: PyTorch's debug mode: 0, 1 (warn) or 2 (raise).
        attention: which kernels ``scaled_dot_product_attention`` may take.
    """

    device: str
    autocast: tuple[tuple[str, torch.dtype], ...]
    cache: bool
    default_dtype: torch.dtype
    deterministic: int
    attention: Kernels

    @classmethod
    def now(cls, device: str) -> "Ambient":
        """Those that hold here."""
        return cls(
            device,
            tuple((d, torch.get_autocast_dtype(d)) for d in _devices(device) if torch.is_autocast_enabled(d)),
            torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(),
            torch.get_deterministic_debug_mode(),
            allowed_kernels(),
        )

    def evaluating(self) -> AbstractContextManager[Any]:
        """Autocast, where an energy or map is evaluated inside of `solving`."""
        if not self.autocast:
            return _NOTHING
        stack = ExitStack()
        for device, dtype in self.autocast:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=self.cache))
        return stack

    @contextlib.contextmanager
    def solving(self) -> Iterator[None]:
        """Everything but autocast, which is off. All but that is set for other threads as well, so only where it differs."""
        around = Ambient.now(self.device)
        if around == self and not self.autocast:
            yield
            return
        torch.autocast_increment_nesting()  # what autocast converts inside is kept until the end
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

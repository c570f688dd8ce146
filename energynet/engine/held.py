"""Registers the tensors and modules inside objects that are not modules, such as a `Prox`, a `Step` or a bound method."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from energynet.engine.binding import parts_of, with_tensors


class Held(nn.Module):
    """Registers the parameters, tensors and modules of a value under the names of its attributes.

    They are listed, saved, loaded and moved with the module of which this one is a submodule. A parameter stays the same object
    when it moves; any other tensor is replaced by a new one, and `value` returns the value with the new tensors.

    Example:
        >>> import torch
        >>> from energynet.constraints import Box
        >>> held = Held(Box(torch.zeros(2), nn.Parameter(torch.ones(2))))
        >>> list(held.state_dict())
        ['upper', 'lower']
        >>> held.double().value().lower.dtype
        torch.float64

    Args:
        value: anything except a module or tensor.
    """

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = self._original = value
        self._places: list[tuple[nn.Module, str]] = []
        self._shared: list[nn.Module] = []
        self._fill(self, value, set())
        self._tensors = self._now()

    def __bool__(self) -> bool:
        """Whether there is anything to hold."""
        return bool(self._places or self._shared)

    def value(self) -> Any:
        """The value with the tensors that are registered now; the value itself if they have not been replaced."""
        now = self._now()
        if all(new is old for new, old in zip(now, self._tensors, strict=True)):
            return self._value
        chosen = {id(old): new for old, new in zip(self._tensors, now, strict=True)}
        return with_tensors(self._value, chosen, self._shared)

    def _now(self) -> list[Tensor]:
        return [getattr(owner, name) for owner, name in self._places]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Held":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._value, self._tensors = self.value(), self._now()
        return self

    def _fill(self, owner: nn.Module, value: Any, met: set[int]) -> None:
        """Register each part of the value with its owner; nested parts get submodules of their own."""
        met.add(id(value))
        for name, part in parts_of(value).items():
            name = name.replace(".", "_") + "_" * hasattr(owner, name)
            if isinstance(part, nn.Module):
                owner.add_module(name, part)
                self._shared.append(part)
            elif isinstance(part, Tensor):
                if isinstance(part, nn.Parameter):
                    owner.register_parameter(name, part)
                else:
                    owner.register_buffer(name, part)
                self._places.append((owner, name))
            elif id(part) not in met and parts_of(part):
                inner = nn.Module()
                self._fill(inner, part, met)
                if next(inner.children(), None) is not None or inner._parameters or inner._buffers:
                    owner.add_module(name, inner)

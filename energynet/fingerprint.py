"""What a piece of Python says, apart from its tensors: equal fingerprints make equal programs."""

import dataclasses
import enum
import functools
import sys
import types
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from energynet import _tree

_PLAIN = (type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.Size, enum.Enum, type(...))
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "energynet"}
_MISSING = object()


class Fingerprint:
    """A key that changes with anything that the value's code may read, and the tensors met on the way.

    Functions count by their code, defaults, closures and the globals that they name, objects by their class and attributes,
    what belongs to a library and all that cannot be looked into by identity, weakly where possible.

    Example:
        >>> scaled = [functools.partial(torch.add, alpha=alpha) for alpha in (1.0, 1.0, 2.0)]
        >>> [Fingerprint(f).key == Fingerprint(scaled[0]).key for f in scaled]
        [True, True, False]

    Args:
        value: anything.
        inputs: tensors that count by their position here only.
    """

    key: Hashable
    met: list[Tensor]
    """Tensors that are none of the inputs, which count by identity."""
    inputs: list[Tensor]
    """Those of the inputs that were met."""

    def __init__(self, value: Any, inputs: Sequence[Tensor] = ()) -> None:
        self.met, self.inputs = [], []
        self._positions = {id(t): k for k, t in enumerate(inputs)}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # ids are unique among the living only
        self._entries: list[tuple[Any, Any, Any]] = []  # mapping, name, value
        self._sizes: list[tuple[Any, int]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self.key = self._describe(value)
        self._asked = [(t, t.requires_grad) for t in self.met]
        self._alive = [v for v in self._alive if not _hashable(v)]  # the rest may die

    def unchanged(self) -> bool:
        """Whether all that was read is still there: the same objects at the same places. Cheaper than to look anew."""
        return (
            all(mapping.get(name, _MISSING) is value for mapping, name, value in self._entries)
            and all(len(container) == size for container, size in self._sizes)
            and all(cell.cell_contents is value for cell, value in self._cells)
            and all(t.requires_grad is wanted for t, wanted in self._asked)
        )

    def _describe(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, Tensor):
            return self._tensor(value)
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, dict):
            return type(value), tuple((self._describe(k), v) for k, v in self._items(value))
        if isinstance(value, (list, tuple)):
            if isinstance(value, list):
                self._entries += [(_Items(value), k, v) for k, v in enumerate(value)]
                self._sizes.append((value, len(value)))
            return type(value), *(self._describe(v) for v in value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self._describe(value.__func__), self._describe(value.__self__)
        if isinstance(value, functools.partial):
            return self._describe(value.func), self._describe(value.args), self._describe(value.keywords)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, (_tree.TreeSpec, types.CodeType)):
            return value
        if hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
            return self._describe(type(value)), *self._items(vars(value))
        return _identity(value)

    def _items(self, mapping: dict[Any, Any]) -> list[tuple[Any, Hashable]]:
        self._sizes.append((mapping, len(mapping)))
        return [(name, self._entry(mapping, name)) for name in list(mapping)]

    def _entry(self, mapping: Any, name: Any) -> Hashable:
        value = mapping.get(name, _MISSING)
        self._entries.append((mapping, name, value))
        return self._describe(value)

    def _tensor(self, tensor: Tensor) -> Hashable:
        if id(tensor) in self._positions:
            self.inputs.append(tensor)
            return "input", self._positions[id(tensor)]
        self.met.append(tensor)
        return "tensor", id(tensor), tensor.requires_grad

    def _function(self, function: types.FunctionType) -> Hashable:
        if _of_a_library(function):
            return _identity(function)
        cells = [cell for cell in function.__closure__ or () if _filled(cell)]
        self._cells += [(cell, cell.cell_contents) for cell in cells]
        read = (function.__defaults__, function.__kwdefaults__, tuple(cell.cell_contents for cell in cells))
        named = self._globals(function.__code__, function.__globals__)
        return function.__code__, self._describe(read), *self._items(vars(function)), *named

    def _globals(self, code: types.CodeType, names: dict[str, Any]) -> list[Hashable]:
        found: list[Hashable] = []
        for name in code.co_names:
            value = names.get(name, _MISSING)
            if isinstance(value, types.ModuleType) and not _of_a_library(value):
                found += [self._entry(vars(value), n) for n in code.co_names]
            elif value is not _MISSING and not isinstance(value, types.ModuleType):
                found.append((name, self._entry(names, name)))
        inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
        return found + [part for c in inner for part in self._globals(c, names)]

    def _class(self, cls: type) -> Hashable:
        """A user's class with what its methods read; one of a library by identity."""
        read: list[Hashable] = []
        for own in (c for c in cls.__mro__ if not _of_a_library(c)):
            for name, value in list(vars(own).items()):
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(value, (types.FunctionType, *_PLAIN, float)):
                    self._entries.append((vars(own), name, vars(own)[name]))
                    read.append(self._describe(value))
        return _identity(cls), *read


def told(value: Any) -> Hashable:
    """A value that compares by content as its own key, anything else by its fingerprint."""
    frozen = dataclasses.is_dataclass(value) and type(value).__eq__ is not object.__eq__ and _hashable(value)
    return value if frozen else Fingerprint(value).key


class _Items:
    """A list as a mapping."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def get(self, index: int, default: Any) -> Any:
        return self.values[index] if index < len(self.values) else default


def _identity(value: Any) -> Hashable:
    try:
        return weakref.ref(value) if _hashable(value) else ("object", id(value))
    except TypeError:  # no weak reference to it can be made
        return value


def _hashable(value: Any) -> bool:
    try:
        hash(value)
        return True
    except TypeError:
        return False


def _of_a_library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    return name.partition(".")[0] in _LIBRARIES


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False

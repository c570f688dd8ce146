"""Fingerprints of Python objects, apart from the values of their tensors: equal fingerprints give equal programs."""

import collections
import contextvars
import dataclasses
import dis
import enum
import functools
import sys
import types
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet.compiled.changes import MISSING, Watch, asked
from energynet.engine.driver import Driver
from energynet.engine.root_gradient import AdjointReport
from energynet.warm_start import WarmStart

_PLAIN = (type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.Size, enum.Enum, type(...))
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "energynet"}


_UNREAD = (Driver, AdjointReport, WarmStart)  # a model may have them as attributes, but no energy reads their content


class Fingerprint:
    """A key that changes with anything that the value's code may read, and the tensors that were found.

    The key contains the code, defaults, closures and named globals of functions, and the classes and attributes of objects.
    Library objects and opaque objects are represented by their identity, with weak references where possible.

    Example:
        >>> scaled = [functools.partial(torch.add, alpha=alpha) for alpha in (1.0, 1.0, 2.0)]
        >>> [Fingerprint(f).key == Fingerprint(scaled[0]).key for f in scaled]
        [True, True, False]

    Args:
        value: anything.
        inputs: tensors that are represented by their position in this sequence.
    """

    key: Hashable
    met: list[Tensor]
    """Tensors that are not inputs; they are represented by their identity."""
    inputs: list[Tensor]
    """The inputs that were found."""

    def __init__(self, value: Any, inputs: Sequence[Tensor] = ()) -> None:
        self.met, self.inputs = [], []
        self._positions = {id(t): k for k, t in enumerate(inputs)}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # keeps objects alive, because ids of dead objects are reused
        self._watch = Watch()
        self.key = self._describe(value)
        self._watch.tensors(self.met)
        self._alive = [v for v in self._alive if not _hashable(v)]  # the others may be deleted

    def unchanged(self) -> bool:
        """Whether the same objects are still at the places that were read; this is cheaper than a new fingerprint."""
        return self._watch.unchanged()

    def _describe(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, _UNREAD):
            return _identity(type(value))
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, (dict, types.MappingProxyType)):
            return type(value), tuple((self._describe(k), v) for k, v in self._items(value))
        if isinstance(value, (list, tuple, collections.deque)):
            if not isinstance(value, tuple):
                self._watch.whole(value, dict(enumerate(value)))
            return type(value), *(self._describe(v) for v in value)
        if isinstance(value, (set, frozenset, bytearray)) or hasattr(type(value), "tobytes"):
            return type(value), self._watch.content(value)
        if isinstance(value, contextvars.ContextVar):
            return _identity(value), self._describe(self._watch.variable(value))
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
        if isinstance(value, types.ModuleType):
            return _identity(value)
        return self._object(value)

    def _object(self, value: Any) -> Hashable:
        slots = [name for cls in type(value).__mro__ for name in _slots(cls)]
        if not slots and not hasattr(value, "__dict__"):
            return _identity(value)
        attributes = self._watch.object(value)
        fixed = [(name, self._entry(attributes, name)) for name in slots]
        return self._describe(type(value)), *fixed, *self._items(getattr(value, "__dict__", {}))

    def _items(self, mapping: Mapping[Any, Any]) -> list[tuple[Any, Hashable]]:
        self._watch.whole(mapping, {})
        return [(name, self._entry(mapping, name)) for name in list(mapping)]

    def _entry(self, mapping: Any, name: Any) -> Hashable:
        return self._describe(self._watch.entry(mapping, name))

    def _tensor(self, tensor: Tensor) -> Hashable:
        if id(tensor) in self._positions:
            self.inputs.append(tensor)
            return "input", self._positions[id(tensor)]
        self.met.append(tensor)
        return "tensor", id(tensor), asked(tensor)

    def _function(self, function: types.FunctionType) -> Hashable:
        if _of_a_library(function):
            return _identity(function)
        read = (function.__defaults__, function.__kwdefaults__, self._watch.function(function))
        named = self._globals(function.__code__, function.__globals__)
        return function.__code__, self._describe(read), *self._items(vars(function)), *named

    def _globals(self, code: types.CodeType, names: dict[str, Any]) -> list[Hashable]:
        found: list[Hashable] = []
        for name in _global_names(code):
            value = names.get(name, sys.modules.get(name, MISSING))  # a module may be imported by the code itself
            if isinstance(value, types.ModuleType):
                found += self._module(value, _names(code))
            elif value is not MISSING:
                found.append((name, self._entry(names, name)))
        inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
        return found + [part for c in inner for part in self._globals(c, names)]

    def _module(self, module: types.ModuleType, names: Sequence[str], around: tuple[Any, ...] = ()) -> list[Hashable]:
        """The entries with these names in a user's module and in modules inside it."""
        if module in around or _of_a_library(module):
            return []
        found: list[Hashable] = []
        for name in names:
            found.append(self._entry(vars(module), name))
            inner = vars(module).get(name)
            found += self._module(inner, names, (*around, module)) if isinstance(inner, types.ModuleType) else []
        return found

    def _class(self, cls: type) -> Hashable:
        """A user's class with its methods and other attributes; a library class by its identity."""
        read: list[Hashable] = []
        for own in (c for c in cls.__mro__ if not _of_a_library(c)):
            attributes = vars(own)
            self._watch.whole(attributes, {})
            for name, value in list(attributes.items()):
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(value, types.FunctionType) or not (name.startswith("__") or name == "_abc_impl"):
                    self._watch.entry(attributes, name)
                    read.append(self._describe(value))
        return _identity(cls), *read


@functools.lru_cache(4096)
def _global_names(code: types.CodeType) -> Sequence[str]:
    """The globals and modules that a piece of code reads, without names that it uses only as attributes."""
    read = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")]
    return list(dict.fromkeys([*read, *_spelled(code)] if "globals" in read else read))


def _names(code: types.CodeType) -> Sequence[str]:
    """The names that the code may look up in a module."""
    return [*code.co_names, *_spelled(code)] if "getattr" in code.co_names else code.co_names


def _spelled(code: types.CodeType) -> list[str]:
    return [c for c in code.co_consts if isinstance(c, str) and c.isidentifier()]


def content_key(value: Any) -> Hashable:
    """The value itself if it compares by content, otherwise the key of its fingerprint."""
    frozen = dataclasses.is_dataclass(value) and type(value).__eq__ is not object.__eq__ and _hashable(value)
    return value if frozen else Fingerprint(value).key


def _slots(cls: type) -> Sequence[str]:
    slots = () if _of_a_library(cls) else vars(cls).get("__slots__", ())
    return [name for name in ((slots,) if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


class _Same:
    """A unique key for an opaque value, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _identity(value: Any) -> Hashable:
    try:
        return weakref.ref(value) if _hashable(value) else _Same(value)
    except TypeError:  # the value does not support weak references
        return value


def _hashable(value: Any) -> bool:
    try:
        hash(value)
        return True
    except Exception:  # usually a TypeError, but PyTorch's containers raise other errors
        return False


def _of_a_library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    return name.partition(".")[0] in _LIBRARIES

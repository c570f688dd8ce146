"""What a piece of Python says, apart from its tensors: equal fingerprints make equal programs."""

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


_UNREAD = (Driver, AdjointReport, WarmStart)  # a model may hold them, but no energy reads what is in them


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
        self._watch = Watch()
        self.key = self._describe(value)
        self._watch.tensors(self.met)
        self._alive = [v for v in self._alive if not _hashable(v)]  # the rest may die

    def unchanged(self) -> bool:
        """Whether all that was read is still there: the same objects at the same places. Cheaper than to look anew."""
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
        """What goes by these names in a user's module, and in modules in it."""
        if module in around or _of_a_library(module):
            return []
        found: list[Hashable] = []
        for name in names:
            found.append(self._entry(vars(module), name))
            inner = vars(module).get(name)
            found += self._module(inner, names, (*around, module)) if isinstance(inner, types.ModuleType) else []
        return found

    def _class(self, cls: type) -> Hashable:
        """A user's class with its methods and other attributes; one of a library by identity."""
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
    """The globals and modules that a piece of code reads; an attribute may go by the name of a global that it does not read."""
    read = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")]
    return list(dict.fromkeys([*read, *_spelled(code)] if "globals" in read else read))


def _names(code: types.CodeType) -> Sequence[str]:
    """What it may ask a module for."""
    return [*code.co_names, *_spelled(code)] if "getattr" in code.co_names else code.co_names


def _spelled(code: types.CodeType) -> list[str]:
    return [c for c in code.co_consts if isinstance(c, str) and c.isidentifier()]


def told(value: Any) -> Hashable:
    """A value that compares by content as its own key, anything else by its fingerprint."""
    frozen = dataclasses.is_dataclass(value) and type(value).__eq__ is not object.__eq__ and _hashable(value)
    return value if frozen else Fingerprint(value).key


def _slots(cls: type) -> Sequence[str]:
    slots = () if _of_a_library(cls) else vars(cls).get("__slots__", ())
    return [name for name in ((slots,) if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


class _Same:
    """A value that cannot be looked into, as a key that equals that of no other: it lives as long as its key."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _identity(value: Any) -> Hashable:
    try:
        return weakref.ref(value) if _hashable(value) else _Same(value)
    except TypeError:  # no weak reference to it can be made
        return value


def _hashable(value: Any) -> bool:
    try:
        hash(value)
        return True
    except Exception:  # a TypeError, but of PyTorch's containers
        return False


def _of_a_library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    return name.partition(".")[0] in _LIBRARIES

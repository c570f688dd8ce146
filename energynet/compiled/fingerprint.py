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
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet.compiled.changes import MISSING, Watch, asked
from energynet.compiled.reach import Reach, names_of_class
from energynet.engine.driver import Driver
from energynet.engine.root_gradient import AdjointReport
from energynet.warm_start import WarmStart

_PLAIN = (type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.Size, enum.Enum, type(...))
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "energynet"}


_UNREAD = (Driver, AdjointReport, WarmStart)  # a model may have them as attributes, but no energy reads their content


class Fingerprint:
    """A key that changes with anything that the value's code may read, and the tensors that were found.

    The key contains the code, defaults, closures and named globals of functions, and the classes and attributes of objects.
    Library objects and opaque objects are represented by their identity, with weak references where possible. If ``value``
    contains all the code that runs, as an energy does, the key contains only those methods and attributes of user-defined
    classes that this code may read.

    Example:
        >>> scaled = [functools.partial(torch.add, alpha=alpha) for alpha in (1.0, 1.0, 2.0)]
        >>> [Fingerprint(f).key == Fingerprint(scaled[0]).key for f in scaled]
        [True, True, False]

    Args:
        value: anything.
        inputs: tensors that are represented by their position in this sequence.
        whole: whether code outside of ``value`` may read it, so that everything in it belongs to the key.
    """

    key: Hashable
    met: list[Tensor]
    """Tensors that are not inputs; they are represented by their identity."""
    inputs: list[Tensor]
    """The inputs that were found."""

    def __init__(self, value: Any, inputs: Sequence[Tensor] = (), *, whole: bool = True) -> None:
        self.met, self.inputs = [], []
        self._whole, self._reach = whole, Reach()
        self._waiting: list[_Unread] = []
        self._made: set[type] = set()  # classes that the code names, so that it may create instances
        self._reader = self._place = ""  # the current function and the place that it reads, for messages
        self._positions = {id(t): k for k, t in enumerate(inputs)}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # keeps objects alive, because ids of dead objects are reused
        self._watch = Watch()
        self.key = self._describe(value), *self._waited()
        self._watch.tensors(self.met)
        self._alive = [v for v in self._alive if not _hashable(v)]  # the others may be deleted

    def unchanged(self) -> bool:
        """Whether the same objects are still at the places that were read; this is cheaper than a new fingerprint."""
        return self._watch.unchanged()

    def changes(self) -> list[str]:
        """A description of each change, such as ``Model.energy reads SETTINGS['rate']: 1.0 → 2.0``."""
        return list(dict.fromkeys(self._watch.changes()))

    def _waited(self) -> list[Hashable]:
        """Describe the attributes that the code found so far may read; they may contain code that reads further attributes."""
        read: list[Hashable] = []
        while ready := [unread for unread in self._waiting if self._whole or unread.may_be_read()]:
            taken = set(map(id, ready))
            self._waiting = [unread for unread in self._waiting if id(unread) not in taken]
            for unread in ready:
                self._reader = ""
                read.append((unread.owner, unread.name, self._entry(unread.mapping, unread.name, unread.place)))
        return read

    def _describe(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, _UNREAD):
            return _identity(type(value))
        if isinstance(value, type):
            self._made.add(value)
        if known := self._known(value):
            return known
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
        if isinstance(value, (property, classmethod, staticmethod)):
            return type(value), self._describe(value.fget if isinstance(value, property) else value.__func__)
        if isinstance(value, (_tree.TreeSpec, types.CodeType)):
            return value
        if isinstance(value, types.ModuleType):
            return _identity(value)
        return self._object(value)

    def _object(self, value: Any) -> Hashable:
        cls = type(value)
        slots = [name for base in cls.__mro__ for name in _slots(base)]
        if not slots and not hasattr(value, "__dict__"):
            return _identity(value)
        self._watch.where = f"the class of {self._place or cls.__qualname__}"
        attributes = self._watch.object(value)
        own = getattr(value, "__dict__", {})
        self._watch.whole(own, {})
        for mapping, names in ((attributes, slots), (own, list(own))):
            for name in names:
                self._later(value, cls, mapping, name, functools.partial(self._reach.reads, name))
        return self._known(cls) or self._class(cls)  # not `_describe`: no code names the class

    def _known(self, value: Any) -> Hashable:
        """The number of an object that has been described before; None for another, which gets the next number."""
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        return None

    def _later(self, owner: Any, cls: type, mapping: Any, name: str, may_be_read: Callable[[], bool]) -> None:
        """Describe an attribute once code is found that may read it. Code of libraries is not followed, but may read its own."""
        by_library = any(name in names_of_class(base) for base in cls.__mro__[:-1] if _of_a_library(base))
        if by_library or _of_a_library(cls):
            may_be_read = _always
        self._waiting.append(_Unread(self._seen[id(owner)], mapping, name, f"{cls.__qualname__}.{name}", may_be_read))

    def _items(self, mapping: Mapping[Any, Any]) -> list[tuple[Any, Hashable]]:
        self._watch.whole(mapping, {})
        place = self._place
        return [(name, self._entry(mapping, name, f"{place}[{name!r}]")) for name in list(mapping)]

    def _entry(self, mapping: Any, name: Any, place: str) -> Hashable:
        """Describe the value at a place; ``place`` is its name in messages."""
        before = self._reader, self._place
        self._place, self._watch.where = place, f"{self._reader} reads {place}" if self._reader else place
        found = self._describe(self._watch.entry(mapping, name))
        self._reader, self._place = before
        return found

    def _tensor(self, tensor: Tensor) -> Hashable:
        if id(tensor) in self._positions:
            self.inputs.append(tensor)
            return "input", self._positions[id(tensor)]
        self.met.append(tensor)
        return "tensor", id(tensor), asked(tensor)

    def _function(self, function: types.FunctionType) -> Hashable:
        if _of_a_library(function):
            return _identity(function)
        self._reach.follow(function.__code__)
        before, self._reader = self._reader, function.__qualname__
        self._place, self._watch.where = function.__qualname__, f"the code of {function.__qualname__}"
        read = (function.__defaults__, function.__kwdefaults__, self._watch.function(function))
        named = self._globals(function.__code__, function.__globals__)
        found = function.__code__, self._describe(read), *self._items(vars(function)), *named
        self._reader = before
        return found

    def _globals(self, code: types.CodeType, names: dict[str, Any]) -> list[Hashable]:
        found: list[Hashable] = []
        for name in _global_names(code):
            value = names.get(name, sys.modules.get(name, MISSING))  # a module may be imported by the code itself
            if isinstance(value, types.ModuleType):
                found += self._module(value, _names(code))
            elif value is not MISSING:
                found.append((name, self._entry(names, name, name)))
        inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
        return found + [part for c in inner for part in self._globals(c, names)]

    def _module(self, module: types.ModuleType, names: Sequence[str], around: tuple[Any, ...] = ()) -> list[Hashable]:
        """The entries with these names in a user's module and in modules inside it."""
        if module in around or _of_a_library(module):
            return []
        found: list[Hashable] = []
        for name in names:
            found.append(self._entry(vars(module), name, f"{module.__name__}.{name}"))
            inner = vars(module).get(name)
            found += self._module(inner, names, (*around, module)) if isinstance(inner, types.ModuleType) else []
        return found

    def _class(self, cls: type) -> Hashable:
        """A user's class by its identity and the attributes that may be read; a library class by its identity."""
        for own in (c for c in cls.__mro__ if not _of_a_library(c)):
            attributes = vars(own)
            self._watch.where = f"the attributes of {own.__qualname__}"
            self._watch.whole(attributes, {})
            for name, value in list(attributes.items()):
                if isinstance(value, (types.FunctionType, property, classmethod, staticmethod)):
                    self._later(cls, cls, attributes, name, functools.partial(self._runs, cls, name))
                elif not (name.startswith("__") or name == "_abc_impl"):
                    self._later(cls, cls, attributes, name, functools.partial(self._reach.reads, name))
        return _identity(cls)

    def _runs(self, cls: type, name: str) -> bool:
        return self._reach.runs(name, made=cls in self._made)


class _Unread(NamedTuple):
    """An attribute that is described once code is found that may read it."""

    owner: int  # the position of its object in the order of discovery
    mapping: Any
    name: str
    place: str
    may_be_read: Callable[[], bool]


def _always() -> bool:
    return True


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

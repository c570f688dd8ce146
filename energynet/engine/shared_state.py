"""Detects changes in the state that a solve depends on besides its inputs, between the solve and the backward pass.

A `Binding` copies attributes of modules, variables in closures and globals of functions. Everything else is shared with
the caller, who may change it between the solve and the backward pass: tensors in place, lists, dictionaries and arrays,
attributes of other objects, globals that methods read. A `SharedState` records their state when a solve is called and compares
it at every backward pass.
"""

import collections
import contextlib
import enum
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from energynet.engine.code import Reads, cells_of, content, of_a_library, reads_of, unwrapped
from energynet.step import Step

PLAIN = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(...), range, slice,
          types.BuiltinFunctionType, types.MethodWrapperType}  # fmt: skip
_MISSING: Any = object()


class ChangedFunctionError(RuntimeError):
    """The energy or map reads state that has changed since the solve, so backward would differentiate another problem."""


class _Read(NamedTuple):
    """An object that is shared with the caller: its name, and a value that identifies its state."""

    name: str
    state: Callable[[], Any]
    before: Any

    def changed(self) -> bool:
        return not _same(self.state(), self.before)


class SharedState:
    """The objects that a function reads and shares with the caller, with their states.

    Example:
        >>> ks = [1.0]
        >>> state = SharedState.of(Survey(lambda x, ks=ks: ks[0] * x))
        >>> ks[0] = 2.0
        >>> [read.name for read in state.reads if read.changed()]
        ['a default of <lambda>']

    Args:
        reads: the shared objects.
    """

    def __init__(self, reads: list[_Read]) -> None:
        self.reads = reads

    @classmethod
    def of(cls, survey: "Survey", inputs: Iterator[Tensor] | tuple[Tensor, ...] = ()) -> "SharedState":
        """The objects that a survey has found, except tensors that are inputs of the solve, which autograd checks itself."""
        given = {id(t) for t in inputs}
        return cls([_Read(name, state, state()) for name, state, key in survey.found if key not in given])

    def again(self) -> "SharedState":
        """The same objects with their current states, for another solve."""
        return SharedState([_Read(name, state, state()) for name, state, _ in self.reads])

    def settle(self) -> None:
        """Drop objects that changed while the function itself ran, such as a log, a counter or a cache."""
        self.reads = [read for read in self.reads if not read.changed()]

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """A context for a later evaluation.

        Raises:
            ChangedFunctionError: if anything has changed since.
        """
        changed = [read.name for read in self.reads if read.changed()]
        if changed:
            raise ChangedFunctionError(
                f"The energy or map reads {' and '.join(changed)}, which changed after the solve and before its gradient was "
                "computed. The gradient would be that of another problem. Pass it as context, keep a copy for each solve (as "
                "by .clone()), or change it after the backward pass."
            )
        try:
            yield
        finally:
            self.settle()


class _Hold(enum.Enum):
    """How the binding refers to a value."""

    COPIED = "the object that contains the value is copied, and so are lists in it"
    FIXED = "the function that captures the value is copied"
    SHARED = "the caller's own object refers to the value, and may refer to another one later"


class Survey:
    """Traverses everything that a value's code may read. It does not descend into libraries."""

    def __init__(self, value: Any) -> None:
        self.found: list[tuple[str, Callable[[], Any], int]] = []
        """The name, the state and the id of each object."""
        self.written: set[int] = set()
        """The ids of cells that the code itself assigns to."""
        self._seen: dict[int, Any] = {}
        self._names = set(_SPECIAL)
        self._objects: list[tuple[str, Any, bool]] = []  # name, object or class, whether its own attributes are copied
        self._done: set[tuple[int, str]] = set()
        self._visit("it", value, _Hold.COPIED)
        self._look_up_all()

    def _look_up_all(self) -> None:
        """Look up names in objects until neither new names nor new objects appear."""
        before = len(self._names), len(self._objects)
        for each in list(self._objects):
            self._look_up_names(*each)
        if before != (len(self._names), len(self._objects)):
            self._look_up_all()

    def _visit(self, name: str, value: Any, hold: _Hold) -> None:
        if type(value) in PLAIN:
            return
        value = unwrapped(value)
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._note(f"{name} (a tensor of shape {tuple(value.shape)})", lambda: version(value), value)
        elif isinstance(value, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            refuse_scripted(value)
        elif isinstance(value, types.FunctionType):
            self._function(value, hold)
        elif isinstance(value, types.MethodType):
            self._visit(name, value.__func__, _Hold.SHARED)
            self._visit(name, value.__self__, hold)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(name, part, hold)
        elif isinstance(value, (Mapping, list, tuple, set, frozenset, collections.deque)):
            self._container(name, value, hold)
        elif isinstance(value, bytearray) or hasattr(type(value), "tobytes"):
            self._note(name, lambda: _content(value), value)
        elif isinstance(value, nn.Module):
            self._module(name, value, hold)
        elif holds_attributes(value) and hold is _Hold.COPIED:
            self._attributes(name, value)
        elif not isinstance(value, (type, types.ModuleType)) or not of_a_library(value):
            self._objects.append((name, value, False))  # with attributes that the user sets, such as an argparse.Namespace

    def _note(self, name: str, state: Callable[[], Any], key: Any) -> None:
        self.found.append((name, state, id(key)))

    def _function(self, function: types.FunctionType, hold: _Hold) -> None:
        reads, library = reads_of(function.__code__), of_a_library(function)
        for variable, cell in cells_of(function):
            if variable in reads.written_cells:
                self.written.add(id(cell))
                continue
            if hold is _Hold.SHARED and not library:
                self._note(variable, functools.partial(content, cell), cell)
            self._visit(variable, content(cell), _Hold.FIXED)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(f"a default of {function.__name__}", default, _Hold.FIXED)
        if not library:
            self._names |= reads.attributes
            self._globals(reads, function.__globals__, fixed=hold is not _Hold.SHARED and reads.may_be_fixed)

    def _globals(self, reads: Reads, names: dict[str, Any], fixed: bool) -> None:
        for name in reads.globals:
            value = names.get(name, _MISSING)
            if value is not _MISSING and name not in reads.written_globals and not stays(value):
                if not fixed:
                    self._place(name, names, name)
                self._visit(name, value, _Hold.FIXED)

    def _place(self, name: str, mapping: Mapping[str, Any], key: str, default: Any = _MISSING) -> None:
        self._note(name, lambda: mapping.get(key, default), mapping)

    def _container(self, name: str, value: Any, hold: _Hold) -> None:
        if hold is not _Hold.COPIED and not isinstance(value, (tuple, frozenset)):
            self._note(name, lambda: _elements(value), value)
        for key, element in list(value.items()) if isinstance(value, Mapping) else enumerate(list(value)):
            if type(element) not in PLAIN:
                self._visit(f"{name}[{key!r}]", element, hold)

    def _module(self, name: str, module: nn.Module, hold: _Hold) -> None:
        for own, value in (*module._modules.items(), *module._parameters.items(), *module._buffers.items()):
            self._visit(f"{name}.{own}", value, hold)
        if hold is not _Hold.COPIED:
            self._objects.append((name, module, False))
        elif not of_a_library(type(module)) or "forward" in vars(module):
            self._attributes(name, module)

    def _attributes(self, name: str, value: Any) -> None:
        """Visit the attributes of an object that is copied; its methods still belong to the class."""
        for attribute, part in list(vars(value).items()):
            if attribute not in _OF_MODULES:
                self._visit(attribute if isinstance(value, Step) else f"{name}.{attribute}", part, _Hold.COPIED)
        self._objects.append((name, value, True))

    def _look_up_names(self, name: str, value: Any, copied: bool) -> None:
        """Visit what a shared object and its class contain under the names that the code uses."""
        cls = value if isinstance(value, type) else type(value)
        own = {} if isinstance(value, type) else getattr(value, "__dict__", {})
        if not copied:
            for attribute in self._names.intersection(own):
                self._attribute(name, attribute, value, _Place(own, cls))
        for holder in _users(cls):
            for attribute in self._names.intersection(vars(holder)).difference(own):
                self._attribute(name, attribute, value, _Place({} if copied else own, cls))

    def _attribute(self, name: str, attribute: str, value: Any, place: "_Place") -> None:
        if (id(value), attribute) in self._done:
            return
        self._done.add((id(value), attribute))
        found = place.get(attribute)
        if isinstance(found, types.MemberDescriptorType) and not isinstance(value, type):
            self._note(f"{name}.{attribute}", lambda: getattr(value, attribute, _MISSING), value)  # a slot
            found = getattr(value, attribute, None)
        elif not stays(found):
            self._note(f"{name}.{attribute}", functools.partial(place.get, attribute), place)
        found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        self._visit(f"{name}.{attribute}", found, _Hold.SHARED)


class _Place(NamedTuple):
    """The namespaces in which an attribute is looked up."""

    own: Mapping[str, Any]
    cls: type

    def get(self, attribute: str) -> Any:
        if attribute in self.own:
            return self.own[attribute]
        return next((vars(c)[attribute] for c in self.cls.__mro__ if attribute in vars(c)), _MISSING)


def refuse_scripted(scripted: Any) -> NoReturn:
    kind = "module" if isinstance(scripted, torch.jit.ScriptModule) else "function"
    name = getattr(scripted, "original_name", None) or getattr(scripted, "name", type(scripted).__name__)
    raise TypeError(
        f"{name} is scripted: TorchScript has no second derivatives under torch.func, and its tensors cannot be bound as "
        f"inputs, so gradients would be lost. Pass the {kind} that was passed to torch.jit.script."
    )


# Methods that are called implicitly, without appearing by name in the code.
_SPECIAL = ("forward", "evaluate", "optimality", "__call__", "__getattr__", "__getitem__", "__iter__")
_OF_MODULES = {*vars(nn.Module())}


def holds_attributes(value: Any) -> bool:
    """Whether a value is a step or a callable object with attributes, and not a function, class or module."""
    plain = isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.jit.ScriptFunction))
    return isinstance(value, Step) or (not plain and callable(value) and hasattr(value, "__dict__"))


def stays(value: Any) -> bool:
    """Whether a value belongs to a library and refers to no object of the user."""
    kinds = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    return isinstance(value, kinds) and of_a_library(value) and getattr(value, "__closure__", None) is None


@functools.lru_cache(1024)
def _users(cls: type) -> tuple[type, ...]:
    """The base classes of a class, itself included, that do not belong to libraries."""
    return tuple(c for c in cls.__mro__ if not of_a_library(c))


def version(tensor: Tensor) -> Any:
    """A value that changes when the tensor is changed in place."""
    return None if tensor.is_inference() else tensor._version


def _elements(value: Any) -> tuple[Any, ...]:
    return (*value, *value.values()) if isinstance(value, Mapping) else tuple(value)


def _content(value: Any) -> Any:
    return getattr(value, "shape", None), hash(bytes(value) if isinstance(value, bytearray) else value.tobytes())


def _same(now: Any, before: Any) -> bool:
    """Whether both are the same object, or equal values of a plain type."""
    if now is before:
        return True
    if type(now) is tuple and type(before) is tuple:
        return len(now) == len(before) and all(map(_same, now, before))
    return type(now) is type(before) and type(now) in PLAIN and bool(now == before)

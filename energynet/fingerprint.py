"""What a piece of Python says, apart from its tensors: equal fingerprints make equal programs."""

import enum
import functools
import types
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from energynet import _tree

_PLAIN = (type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.Size, enum.Enum, type(...))
_LIBRARIES = ("torch", "numpy", "math", "builtins", "energynet")


def fingerprint(value: Any, inputs: Sequence[Tensor] = ()) -> tuple[Hashable, list[Tensor]]:
    """A key that changes with anything that the value's code may read, and the tensors met on the way.

    Functions count by their code, defaults, closures and the globals that they name, objects by their class and attributes,
    what belongs to a library and all that cannot be looked into by identity, weakly where possible.

    Example:
        >>> scaled = [functools.partial(torch.add, alpha=alpha) for alpha in (1.0, 1.0, 2.0)]
        >>> [fingerprint(f) == fingerprint(scaled[0]) for f in scaled]
        [True, True, False]

    Args:
        value: anything.
        inputs: tensors that count by their position here only.

    Returns:
        The key, and the tensors that are none of the inputs, which count by identity.
    """
    walk = _Walk(inputs)
    return walk.describe(value), walk.met


class _Walk:
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.positions = {id(t): k for k, t in enumerate(inputs)}
        self.met: list[Tensor] = []
        self.seen: dict[int, int] = {}
        self.alive: list[Any] = []  # ids are unique among the living only

    def describe(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, Tensor):
            return self._tensor(value)
        if id(value) in self.seen:
            return "seen", self.seen[id(value)]
        self.seen[id(value)] = len(self.seen)
        self.alive.append(value)
        if isinstance(value, dict):
            return type(value), tuple((self.describe(k), self.describe(v)) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return type(value), *(self.describe(v) for v in value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self.describe(value.__func__), self.describe(value.__self__)
        if isinstance(value, functools.partial):
            return self.describe(value.func), self.describe(value.args), self.describe(value.keywords)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, (_tree.TreeSpec, types.CodeType)):
            return value
        if hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
            return self.describe(type(value)), *((name, self.describe(v)) for name, v in vars(value).items())
        return _identity(value)

    def _tensor(self, tensor: Tensor) -> Hashable:
        if id(tensor) in self.positions:
            return "input", self.positions[id(tensor)]
        self.met.append(tensor)
        return "tensor", id(tensor), tensor.requires_grad

    def _function(self, function: types.FunctionType) -> Hashable:
        if _of_a_library(function):
            return _identity(function)
        cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        read = [self.describe(v) for v in (function.__defaults__, function.__kwdefaults__, cells, vars(function))]
        return function.__code__, *read, *self._globals(function.__code__, function.__globals__)

    def _globals(self, code: types.CodeType, names: dict[str, Any]) -> list[Hashable]:
        found: list[Hashable] = []
        for name in code.co_names:
            value = names.get(name)
            if isinstance(value, types.ModuleType) and not _of_a_library(value):
                found += [self.describe(vars(value).get(n)) for n in code.co_names]
            elif name in names and not isinstance(value, types.ModuleType):
                found.append((name, self.describe(value)))
        inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
        return found + [part for c in inner for part in self._globals(c, names)]

    def _class(self, cls: type) -> Hashable:
        """A user's class with what its methods read; one of a library by identity."""
        own = [c for c in cls.__mro__ if not _of_a_library(c)]
        methods = [v for c in own for v in vars(c).values()]
        readable = [v.fget if isinstance(v, property) else getattr(v, "__func__", v) for v in methods]
        return _identity(cls), *(self.describe(v) for v in readable if isinstance(v, (types.FunctionType, *_PLAIN, float)))


def _identity(value: Any) -> Hashable:
    try:
        hash(value)
        return weakref.ref(value)
    except TypeError:
        return "object", id(value)


def _of_a_library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    return name.partition(".")[0] in _LIBRARIES


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False

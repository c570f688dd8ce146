"""Records the values that were read from Python objects, to detect later whether any of them has changed."""

import contextvars
import functools
import operator
import reprlib
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor

from energynet.engine.code import cells_of, content

MISSING: Any = object()


class Watch:
    """The places that were read, and their values. Objects and functions are held weakly, so that they can be deleted.

    Example:
        >>> names = {"scale": 2.0}
        >>> watch = Watch()
        >>> watch.where = "energy reads names['scale']"
        >>> watch.entry(names, "scale"), watch.unchanged()
        (2.0, True)
        >>> names["scale"] = 3.0
        >>> watch.unchanged(), next(watch.changes())
        (False, "energy reads names['scale']: 2.0 → 3.0")
    """

    def __init__(self) -> None:
        self.where = ""
        """A description of the place that is read next."""
        self._entries: list[tuple[str, Any, Any, Any]] = []  # place, mapping, name, value
        self._others: list[tuple[str, Callable[[Any], bool], Any]] = []  # place, check, the checked object

    def unchanged(self) -> bool:
        """Whether the same objects are still at the places that were read."""
        same = all(mapping.get(name, MISSING) is value for _, mapping, name, value in self._entries)
        return same and all(is_as_before(value) for _, is_as_before, value in self._others)

    def changes(self) -> Iterator[str]:
        """A description of each change."""
        for where, mapping, name, value in self._entries:
            now = mapping.get(name, MISSING)
            if now is not value:
                yield f"{where}: {_in_short(value)} → {_in_short(now)}"
        yield from (f"{where} has changed" for where, is_as_before, value in self._others if not is_as_before(value))

    def entry(self, mapping: Any, name: Any) -> Any:
        """The entry of a mapping under a name, or `MISSING`."""
        value = mapping.get(name, MISSING)
        self._entries.append((self.where, mapping, name, value))
        return value

    def whole(self, container: Any, items: dict[Any, Any]) -> None:
        """Record the size and the given entries of a container; for a mapping, also the order of its keys."""
        if isinstance(container, Mapping):
            names = tuple(container)
            self._add(lambda mapping: tuple(mapping) == names, container)
        else:
            size = len(container)
            self._add(lambda container: len(container) == size, container)
        self._entries += [(f"{self.where}[{place}]", _Items(container), place, value) for place, value in items.items()]

    def variable(self, variable: contextvars.ContextVar[Any]) -> Any:
        """The value of a context variable, or `MISSING`."""
        value = variable.get(MISSING)
        self._add(lambda variable: variable.get(MISSING) is value, variable)
        return value

    def function(self, function: types.FunctionType) -> tuple[Any, ...]:
        """The values that a function captures."""
        cells = [(name, cell) for name, cell in cells_of(function) if content(cell, MISSING) is not MISSING]
        self._entries += [(f"{function.__qualname__} closes over {name}", _Cell(c), "", c.cell_contents) for name, c in cells]
        code = _code(function)
        self._add(lambda function: all(map(operator.is_, _code(function()), code)), _weakly(function))
        return tuple(cell.cell_contents for _, cell in cells)

    def object(self, value: Any) -> "Attributes":
        """The attributes of an object, whose class is recorded as well."""
        cls = type(value)
        self._add(lambda value: type(value()) is cls, _weakly(value))
        return Attributes(_weakly(value))

    def content(self, value: Any) -> Hashable:
        """The content of a set or of an array such as NumPy's, which can change in place."""
        before = _content(value)
        self._add(lambda value: _content(value) == before, value)
        return before

    def tensors(self, tensors: list[Tensor]) -> None:
        """Record the kinds of tensors; their values may change."""
        for tensor in tensors:
            self.where = f"the kind of a tensor of shape {tuple(tensor.shape)}"
            self._add(functools.partial(_is_asked, asked(tensor)), tensor)

    def _add(self, is_as_before: Callable[[Any], bool], value: Any) -> None:
        self._others.append((self.where, is_as_before, value))


def _in_short(value: Any) -> str:
    return "nothing" if value is MISSING else reprlib.repr(value)


def _is_asked(before: Hashable, tensor: Tensor) -> bool:
    return asked(tensor) == before


def kind(tensor: Tensor) -> Hashable:
    """Everything about a tensor that a program depends on, except its values."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def asked(tensor: Tensor) -> Hashable:
    """`kind`, and whether the tensor requires grad, for captured tensors."""
    return tensor.requires_grad, kind(tensor)


class Attributes:
    """An object as a mapping."""

    def __init__(self, value: Callable[[], Any]) -> None:
        self.value = value

    def get(self, name: str, default: Any) -> Any:
        return getattr(self.value(), name, default)


class _Cell:
    """A variable that a function captures, as a mapping."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, _: str, default: Any) -> Any:
        return content(self.cell, default)


class _Items:
    """A list as a mapping."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def get(self, index: int, default: Any) -> Any:
        return self.values[index] if index < len(self.values) else default


def _content(value: Any) -> Hashable:
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if isinstance(value, bytearray):
        return bytes(value)
    return str(getattr(value, "dtype", "")), getattr(value, "shape", None), value.tobytes()


def _code(function: Any) -> tuple[Any, ...]:
    """The code and defaults of a function; None for one that has been deleted."""
    return (None,) * 3 if function is None else (function.__code__, function.__defaults__, function.__kwdefaults__)


def _weakly(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value

"""Records the values that were read from Python objects, to detect later whether any of them has changed."""

import contextvars
import operator
import types
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor

MISSING: Any = object()


class Watch:
    """The places that were read, and their values. Objects and functions are held weakly, so that they can be deleted.

    Example:
        >>> names = {"scale": 2.0}
        >>> watch = Watch()
        >>> watch.entry(names, "scale"), watch.unchanged()
        (2.0, True)
        >>> names["scale"] = 3.0
        >>> watch.unchanged()
        False
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Any, Any, Any]] = []  # mapping, name, value
        self._sizes: list[tuple[Any, int]] = []
        self._orders: list[tuple[Any, tuple[Any, ...]]] = []
        self._variables: list[tuple[contextvars.ContextVar[Any], Any]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._codes: list[tuple[Callable[[], Any], tuple[Any, ...]]] = []  # function, its code and defaults
        self._types: list[tuple[Callable[[], Any], type]] = []
        self._contents: list[tuple[Any, Hashable]] = []
        self._kinds: list[tuple[Tensor, Hashable]] = []

    def unchanged(self) -> bool:
        """Whether the same objects are still at the places that were read."""
        return (
            all(mapping.get(name, MISSING) is value for mapping, name, value in self._entries)
            and all(len(container) == size for container, size in self._sizes)
            and all(tuple(mapping) == names for mapping, names in self._orders)
            and all(variable.get(MISSING) is value for variable, value in self._variables)
            and all(cell.cell_contents is value for cell, value in self._cells)
            and all(all(map(operator.is_, _code(function()), code)) for function, code in self._codes)
            and all(type(value()) is cls for value, cls in self._types)
            and all(_content(value) == content for value, content in self._contents)
            and all(asked(tensor) == before for tensor, before in self._kinds)
        )

    def entry(self, mapping: Any, name: Any) -> Any:
        """The entry of a mapping under a name, or `MISSING`."""
        value = mapping.get(name, MISSING)
        self._entries.append((mapping, name, value))
        return value

    def whole(self, container: Any, items: dict[Any, Any]) -> None:
        """Record the size and the given entries of a container; for a mapping, also the order of its keys."""
        if isinstance(container, Mapping):
            self._orders.append((container, tuple(container)))
        else:
            self._sizes.append((container, len(container)))
        self._entries += [(_Items(container), place, value) for place, value in items.items()]

    def variable(self, variable: contextvars.ContextVar[Any]) -> Any:
        """The value of a context variable, or `MISSING`."""
        value = variable.get(MISSING)
        self._variables.append((variable, value))
        return value

    def function(self, function: types.FunctionType) -> tuple[Any, ...]:
        """The values that a function captures."""
        cells = [cell for cell in function.__closure__ or () if _filled(cell)]
        self._cells += [(cell, cell.cell_contents) for cell in cells]
        self._codes.append((_weakly(function), _code(function)))
        return tuple(cell.cell_contents for cell in cells)

    def object(self, value: Any) -> "Attributes":
        """The attributes of an object, whose class is recorded as well."""
        self._types.append((_weakly(value), type(value)))
        return Attributes(_weakly(value))

    def content(self, value: Any) -> Hashable:
        """The content of a set or of an array such as NumPy's, which can change in place."""
        content = _content(value)
        self._contents.append((value, content))
        return content

    def tensors(self, tensors: list[Tensor]) -> None:
        """Record the kinds of tensors; their values may change."""
        self._kinds += [(tensor, asked(tensor)) for tensor in tensors]


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


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False

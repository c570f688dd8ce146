"""Copies functions so that they keep their current values even if the variables that they capture change."""

import functools
import types
from collections.abc import Iterable
from typing import Any

from energynet.engine.code import cells_of, content, of_a_library, reads_of, unwrapped
from energynet.engine.shared_state import PLAIN, stays

Memo = dict[int, tuple[Any, Any]]  # copy and original, which is kept alive because ids of dead objects are reused


class Functions:
    """Copies functions together with the current values of the variables that they capture and of the globals that they name.

    Captured values are shared with the caller, except for functions, which are copied in turn.

    Args:
        written: ids of cells that the code itself assigns to, such as counters; these are shared with the caller.
    """

    def __init__(self, written: set[int]) -> None:
        self.written = written
        self.globals: dict[int, dict[str, Any]] = {}
        self.open: set[int] = set()

    def copy(self, function: types.FunctionType, memo: Memo) -> types.FunctionType:
        if id(function) in memo:
            known: types.FunctionType = memo[id(function)][0]
            return known
        reads, cells = reads_of(function.__code__), dict(cells_of(function))
        own = {name: cell for name, cell in cells.items() if name in reads.written_cells or id(cell) in self.written}
        fixes = reads.may_be_fixed and not of_a_library(function)
        names = [name for name in reads.globals if name in function.__globals__] if fixes else []
        fixes = any(not stays(function.__globals__[name]) for name in names)
        if not cells and not fixes and not function.__defaults__ and not function.__kwdefaults__:
            return function
        scope = self._scope(function.__globals__) if fixes else function.__globals__
        closure = tuple(own.get(name) or types.CellType() for name in cells)
        result = types.FunctionType(function.__code__, scope, function.__name__, None, closure)
        memo[id(function)] = (result, function)  # set before captured values are copied, since a function may capture itself
        for name, cell in zip(cells, closure, strict=True):
            if name not in own and (value := content(cells[name], _EMPTY)) is not _EMPTY:
                cell.cell_contents = self._captured(value, memo)
        for name in names if fixes else ():
            if name not in scope:
                scope[name] = function.__globals__[name]
                scope[name] = self._captured(scope[name], memo)
        result.__defaults__ = self._captured(function.__defaults__, memo)
        result.__kwdefaults__ = self._captured(function.__kwdefaults__, memo)
        result.__dict__.update(function.__dict__)
        result.__module__, result.__qualname__, result.__doc__ = function.__module__, function.__qualname__, function.__doc__
        return result

    def _scope(self, names: dict[str, Any]) -> dict[str, Any]:
        """A copy of a module's globals, with those that functions name and those that Python itself looks up."""
        if id(names) not in self.globals:
            names.setdefault("__warningregistry__", {})
            self.globals[id(names)] = {name: names[name] for name in _PYTHONS if name in names}
        return self.globals[id(names)]

    def _captured(self, value: Any, memo: Memo) -> Any:
        """The value, in which functions are replaced by copies."""
        if type(value) in PLAIN:
            return value
        value = unwrapped(value)
        if id(value) in memo:
            return memo[id(value)][0]
        if isinstance(value, types.FunctionType):
            return self.copy(value, memo)
        if id(value) in self.open:
            return value
        self.open.add(id(value))
        result = self._parts(value, memo)
        self.open.discard(id(value))
        return result

    def _parts(self, value: Any, memo: Memo) -> Any:
        if isinstance(value, types.MethodType):
            owner = self._captured(value.__self__, memo)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if type(value) is functools.partial:
            parts = (value.func, value.args, value.keywords)
            function, args, keywords = found = tuple(self._captured(part, memo) for part in parts)
            return value if _same(found, parts) else functools.partial(function, *args, **keywords)
        if type(value) is dict:
            copy = {k: self._captured(v, memo) for k, v in list(value.items())}
            return value if _same(copy.values(), value.values()) else copy
        if type(value) in (list, tuple):
            elements = [self._captured(v, memo) for v in value]
            return value if _same(elements, value) else type(value)(elements)
        return value


_EMPTY: Any = object()
_PYTHONS = ("__builtins__", "__name__", "__package__", "__spec__", "__loader__", "__file__", "__warningregistry__")


def _same(values: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(values, others))

"""Finds out which outside names a piece of Python code reads and writes, and whether the code belongs to the user."""

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"torch", "numpy", "energynet"}
_INSTALLED = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
_DYNAMIC = {"globals", "eval", "exec", "__import__", "vars", "locals"}  # functions that may read any name


class Reads(NamedTuple):
    """The outside names that a piece of code uses, directly or in functions that it defines."""

    globals: tuple[str, ...]
    attributes: frozenset[str]
    written_cells: frozenset[str]
    """Variables of enclosing functions that the code assigns to, by ``nonlocal``."""
    written_globals: frozenset[str]
    dynamic: bool
    """Whether the code may read globals that it does not name."""

    @property
    def may_be_fixed(self) -> bool:
        """Whether a function works with a copy of the globals that it names, in place of the globals themselves."""
        return not self.dynamic and not self.written_globals


@functools.lru_cache(4096)
def reads_of(code: types.CodeType) -> Reads:
    """Collects the outside names that a piece of code reads and writes.

    Example:
        >>> reads_of((lambda x: scale * x.mean()).__code__)[:2]
        (('scale',), frozenset({'mean'}))
    """
    named, attributes, cells, written = list[str](), set[str](), set[str](), set[str]()
    for part in parts_of(code):
        for step in dis.get_instructions(part):
            name = step.argval
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                named.append(name)
            elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                written.add(name)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
                attributes.add(name)
            elif step.opname in ("STORE_DEREF", "DELETE_DEREF") and name in part.co_freevars:
                cells.add(name)
    if not {"getattr", "attrgetter", "hasattr"}.isdisjoint({*named, *attributes}):
        attributes |= {c for part in parts_of(code) for c in part.co_consts if isinstance(c, str) and c.isidentifier()}
    cells.intersection_update(code.co_freevars)
    return Reads(tuple(dict.fromkeys(named)), frozenset(attributes), frozenset(cells), frozenset(written),
                 not _DYNAMIC.isdisjoint(named))  # fmt: skip


def parts_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """A piece of code and those of the functions that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from parts_of(constant)


def of_a_library(value: Any) -> bool:
    """Whether a function, class or module belongs to Python, PyTorch, NumPy, this package or anything else that is installed."""
    if isinstance(value, types.FunctionType):  # ``functools.wraps`` sets ``__module__`` to that of the wrapped function
        name = value.__globals__.get("__name__")
    else:
        name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(name, str) and _is_library(name)


@functools.lru_cache(4096)
def _is_library(name: str) -> bool:
    if name.partition(".")[0] in _LIBRARIES:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and file.startswith(_INSTALLED)


def unwrapped(value: Any) -> Any:
    """The module or function that ``torch.compile`` has wrapped.

    The wrapper hides its tensors and evaluates a graph of its own. A ``staticmethod`` object outside a class is a wrapper as
    well.
    """
    if isinstance(value, staticmethod):
        return unwrapped(value.__func__)
    attributes = getattr(value, "__dict__", {})
    modules = attributes.get("_modules")
    inner = modules.get("_orig_mod") if type(modules) is dict else None
    inner = attributes.get("_torchdynamo_orig_callable") if inner is None else inner
    return value if inner is None else unwrapped(inner)


def cells_of(function: types.FunctionType) -> Iterable[tuple[str, types.CellType]]:
    """The variables that a function captures from enclosing functions, by name."""
    return zip(function.__code__.co_freevars, function.__closure__ or ())


def content(cell: types.CellType, default: Any = None) -> Any:
    """The content of a cell; ``default`` while it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return default

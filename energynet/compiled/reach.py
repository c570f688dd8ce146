"""Finds the attributes that an energy's code may read: a program depends on these, and on no others of the same objects."""

import functools
import types
from collections.abc import Iterator
from typing import Any

from energynet.engine.code import parts_of, reads_of

# Code that names one of these may read any attribute of what it is given.
_READS_ANY = frozenset({
    "getattr", "vars", "dir", "eval", "exec", "locals", "asdict", "astuple", "fields", "attrgetter", "methodcaller",
    "getattr_static", "getmembers", "__dict__", "__getattribute__",
})  # fmt: skip
_MAKES = frozenset({"type", "__class__"})  # code that names one of these may make another object of the same class
_MAKING = frozenset({"__init__", "__new__", "__post_init__", "__init_subclass__", "__class_getitem__", "__prepare__"})
_SHOWING = frozenset({
    "__repr__", "__str__", "__format__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__del__", "__copy__",
    "__deepcopy__", "__sizeof__", "__dir__", "extra_repr",
})  # fmt: skip


class Reach:
    """The names of attributes that the functions found so far may read.

    Example:
        >>> reach = Reach()
        >>> reach.follow((lambda self, x: self.scale * x).__code__)
        >>> reach.reads("scale"), reach.reads("calls")
        (True, False)
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def follow(self, code: types.CodeType) -> None:
        """Add the names that a piece of code may read."""
        self._names |= names_read(code)

    def reads(self, name: str) -> bool:
        """Whether an attribute of this name may be read."""
        return name in self._names or not self._names.isdisjoint(_READS_ANY)

    def runs(self, name: str, made: bool) -> bool:
        """Whether a method of this name may run. Python calls special methods although no code names them.

        Args:
            name: the name of the method.
            made: whether the code names the class itself, so that it may create instances.
        """
        if name in _MAKING:
            return made or not self._names.isdisjoint(_MAKES)
        special = name.startswith("__") and name.endswith("__")
        return self.reads(name) or (special and name not in _SHOWING)


@functools.lru_cache(4096)
def names_read(code: types.CodeType) -> frozenset[str]:
    """The attributes that a piece of code may read, and the strings in it, by which it may look up others."""
    reads = reads_of(code)
    return reads.attributes.union(reads.globals, *(_strings(part.co_consts) for part in parts_of(code)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from value.split(".")
    elif isinstance(value, (tuple, frozenset)):
        for part in value:
            yield from _strings(part)


@functools.lru_cache(1024)
def names_of_class(cls: type) -> frozenset[str]:
    """The attributes that the methods of a class may read, and its own attributes, for library classes."""
    functions = (getattr(v, "__func__", getattr(v, "fget", v)) for v in vars(cls).values())
    return frozenset(vars(cls)).union(*(names_read(f.__code__) for f in functions if isinstance(f, types.FunctionType)))

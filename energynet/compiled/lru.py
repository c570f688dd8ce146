"""A cache of recently used values, and entries that are removed when the objects in their keys are deleted."""

import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
NUMBERS = (float, int)


class Recent(Generic[T]):
    """A dictionary that drops the least recently used entry."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.values: OrderedDict[Hashable, T] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self.values

    def get(self, key: Hashable) -> T | None:
        value = self.values.get(key)
        if value is not None:
            self.values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: T) -> None:
        self.values.pop(key, None)  # so that the key moves to the end
        self.values[key] = value
        if len(self.values) > self.capacity:
            self.values.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        self.values.pop(key, None)


def lasting(value: Any) -> tuple[Any, ...]:
    """The objects that identify a value; for a bound method, which is a new object at each access, its function and owner."""
    return (value.__func__, value.__self__) if isinstance(value, types.MethodType) else (value,)


def forget_with(values: Iterable[Any], cache: Recent[Any], key: Hashable) -> bool:
    """Remove an entry once a value whose id is in its key is deleted, since ids are reused; returns whether this is possible."""
    objects = [v for v in values if not isinstance(v, (*NUMBERS, type(None)))]
    try:
        for value in objects:
            weakref.finalize(value, cache.forget, key).atexit = False
    except TypeError:  # the value does not support weak references
        return False
    return True

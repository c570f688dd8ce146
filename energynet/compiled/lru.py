"""What was used last, and objects as keys that are forgotten with them."""

import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
NUMBERS = (float, int)


class Recent(Generic[T]):
    """A dictionary that forgets what was longest unused."""

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
        self.values.pop(key, None)  # to the end of the line
        self.values[key] = value
        if len(self.values) > self.capacity:
            self.values.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        self.values.pop(key, None)


def lasting(value: Any) -> tuple[Any, ...]:
    """What tells a value from others: of a bound method, which is another object each time, what it is made of."""
    return (value.__func__, value.__self__) if isinstance(value, types.MethodType) else (value,)


def forget_with(values: Iterable[Any], cache: Recent[Any], key: Hashable) -> bool:
    """Have an entry forgotten when one of the values that its key names by id is no more, since ids come again."""
    objects = [v for v in values if not isinstance(v, (*NUMBERS, type(None)))]
    try:
        for value in objects:
            weakref.finalize(value, cache.forget, key).atexit = False
    except TypeError:  # it cannot tell of its end
        return False
    return True

"""Checks of the arguments that are passed to constructors; the message names the object, its argument and what was passed."""

import numbers
from collections.abc import Callable
from typing import Any


def check_whole(owner: Any, name: str, least: int = 1, optional: bool = False) -> None:
    """Refuse an attribute that is not a whole number of at least ``least``, or None where that is optional.

    Raises:
        ValueError: if it is anything else, such as True, "5" or 1.5.
    """
    value = getattr(owner, name)
    if (optional and value is None) or (_is(value, numbers.Integral) and value >= least):
        return
    other = " or None" if optional else ""
    raise ValueError(f"{type(owner).__name__} needs a whole number {name} ≥ {least}{other}, got {shown(value)}.")


def check_number(owner: Any, name: str, allowed: str, inside: Callable[[float], bool], optional: bool = False) -> None:
    """Refuse an attribute that is not a number for which ``inside`` holds, or None where that is optional.

    Args:
        owner: the object.
        name: the name of the attribute.
        allowed: the condition in words, such as "in (0, 1]".
        inside: the condition.
        optional: whether None is allowed.

    Raises:
        ValueError: if it is anything else, such as True, "0.5" or NaN.
    """
    value = getattr(owner, name)
    if (optional and value is None) or (_is(value, numbers.Real) and inside(value)):
        return
    other = " or None" if optional else ""
    raise ValueError(f"{type(owner).__name__} needs a number {name} {allowed}{other}, got {shown(value)}.")


def check_function(function: Any, name: str) -> None:
    """Refuse an object that cannot be called, and a class where an instance is meant."""
    if isinstance(function, type):
        raise TypeError(f"{name} must be a function or a module, but {shown(function)} was passed. Did you mean an instance, "
                        f"{function.__name__}()?")  # fmt: skip
    if not callable(function):
        raise TypeError(f"{name} must be a function or a module, but {type(function).__name__} cannot be called.")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value in a message."""
    return f"the class {value.__qualname__}" if isinstance(value, type) else repr(value)

"""Loops that a compiled program can keep as loops; Python runs them unless a program is being recorded."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from energynet._torch.autodiff import loop_recorder, readable

Condition = Callable[[Any], Tensor | bool]


def while_loop(condition: Condition, body: Callable[[Any], Any], carry: Any, limit: int | Tensor, every: int = 1) -> Any:
    """``while condition(carry): carry = body(carry)``, at most ``limit`` times; in a program, one loop of machine code.

    Example:
        >>> import torch
        >>> while_loop(lambda x: x < 100, lambda x: 2 * x, torch.tensor(3), limit=20)
        tensor(192)

    Args:
        condition: carry -> a 0-d tensor, or a bool where values can be read.
        body: carry -> carry with the same shapes and dtypes; both functions may capture tensors.
        carry: a pytree of tensors.
        limit: the largest number of updates; where no value can be read, as under ``vmap``, exactly this number is made.
        every: the number of updates between two checks of the condition; a program may exceed the limit by this number.
    """
    recorder = loop_recorder()
    if recorder is not None:
        return recorder(condition, body, carry, limit, every)
    for k in range(int(limit)):
        if k % every == 0 and _says_no(condition(carry)):
            break
        carry = body(carry)
    return carry


def _says_no(condition: Tensor | bool) -> bool:
    return not condition if isinstance(condition, bool) else readable(condition) and not bool(condition)

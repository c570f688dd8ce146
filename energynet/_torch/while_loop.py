"""Loops that a program can keep as loops: Python runs them, unless somebody records what it does."""

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
        condition: carry -> 0-d bool, or a bool where its values can be read.
        body: carry -> carry of the same shapes and dtypes; both may use tensors from around.
        carry: a pytree of tensors.
        limit: the largest number of updates; where no value can be read, as under ``vmap``, so many are made.
        every: how many updates are made between two looks at the condition; a program may end so many after the limit.
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

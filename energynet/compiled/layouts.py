"""How the elements of a tensor lie in memory."""

from typing import Any

from torch import Tensor


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """The position and interpretation of the elements in memory, as text because sizes may be symbolic."""
    where = (tensor.storage_offset(), *tensor.size(), *tensor.stride())
    return *map(str, where), tensor.dtype, tensor.is_conj(), tensor.is_neg()

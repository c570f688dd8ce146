"""Divides a batch into parts, one per core: samples are independent, so the cores need not wait for one another.

If the cores share each operation, they synchronize at its end, hundreds of times in a solve. For a large batch, each core
instead runs the whole program on its own samples and stops when these have finished.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from energynet.engine.row_inputs import own_rows
from energynet.engine.tasks import Pull, Task

ROWS = 32  # the minimum number of samples per part, because each part reads shared weights separately
LEAST = 2048  # the minimum number of elements of x per part; for smaller parts the overhead exceeds the gain
GOOD = 128, 32_768  # samples and elements per part that use weights efficiently and fit into a core's cache


@dataclasses.dataclass(frozen=True)
class Shards:
    """The division of a function's tensors into parts."""

    own: tuple[bool, ...]  # which of them have one row per sample
    count: int

    def split(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The tensors of each part, without copying."""
        rows = len(tensors[0]) // self.count
        plain = [t.detach() for t in tensors]
        return [
            tuple(t[k * rows : (k + 1) * rows] if own else t for t, own in zip(plain, self.own, strict=True))
            for k in range(self.count)
        ]

    def joined(self, function: Task, parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The combined result: rows are concatenated, and gradients of shared tensors are summed as the parts arrive."""
        shared = [not own for own, want in zip(self.own[2:], function.wanted) if want] if isinstance(function, Pull) else []
        kept: list[list[Tensor]] = []
        for part in parts:
            kept = kept or [[] for _ in part]
            alike = [False] * (len(part) - len(shared)) + shared
            for column, found, summed in zip(kept, part, alike, strict=True):
                column.append(column.pop() + found if summed and column else found)
        return tuple(torch.cat(column) if len(column) > 1 else column[0] for column in kept)


def how_many(tensors: Sequence[Tensor], batch_dims: int) -> int:
    """The number of parts: of equal size, equally many per thread, and as small as is efficient; 1 on an accelerator."""
    x, threads = tensors[0], torch.get_num_threads()
    if batch_dims == 0 or x.device.type != "cpu" or threads == 1 or len(x) % threads:
        return 1
    each = x.numel() // max(1, len(x))
    counts = [k for k in range(threads, len(x) // ROWS + 1, threads) if len(x) % k == 0 and len(x) // k * each >= LEAST]
    good = [k for k in counts if len(x) // k >= GOOD[0] and len(x) // k * each >= GOOD[1]]
    return max(good, default=min(counts, default=1))


def divided(function: Task, tensors: tuple[Tensor, ...]) -> tuple[bool, ...] | None:
    """Which tensors have one row per sample; None if a part of the batch cannot be computed separately."""
    first = 2 if isinstance(function, Pull) else 1  # the inputs follow v and the point, or the initial point
    own = own_rows(function.equation, tensors[first - 1], tensors[first:])
    return None if own is None else (*[True] * first, *own)

"""A batch in parts, one for each core: samples are independent, so the cores need not wait for one another.

Cores that share every operation meet at its end, hundreds of times in a solve. Where a batch is large, each runs the whole
program on samples of its own instead, and ends when these have ended.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from energynet.engine.row_inputs import own_rows
from energynet.engine.tasks import Pull, Task

ROWS = 32  # samples of a part: fewer make no good use of shared weights, which each part reads by itself
LEAST = 2048  # numbers of x in a part, below which to begin and end it costs more than it saves
GOOD = 128, 32_768  # samples and numbers of a part that makes good use of weights, and that stays in a core's cache


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the tensors of a function are divided."""

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
        """One result: rows one below the other; of what all samples share, gradients are summed, as they come."""
        shared = [not own for own, want in zip(self.own[2:], function.wanted) if want] if isinstance(function, Pull) else []
        kept: list[list[Tensor]] = []
        for part in parts:
            kept = kept or [[] for _ in part]
            alike = [False] * (len(part) - len(shared)) + shared
            for column, found, summed in zip(kept, part, alike, strict=True):
                column.append(column.pop() + found if summed and column else found)
        return tuple(torch.cat(column) if len(column) > 1 else column[0] for column in kept)


def how_many(tensors: Sequence[Tensor], batch_dims: int) -> int:
    """Parts that pay: as many for each thread, of equal size, and as small as is good; 1 on an accelerator."""
    x, threads = tensors[0], torch.get_num_threads()
    if batch_dims == 0 or x.device.type != "cpu" or threads == 1 or len(x) % threads:
        return 1
    each = x.numel() // max(1, len(x))
    counts = [k for k in range(threads, len(x) // ROWS + 1, threads) if len(x) % k == 0 and len(x) // k * each >= LEAST]
    good = [k for k in counts if len(x) // k >= GOOD[0] and len(x) // k * each >= GOOD[1]]
    return max(good, default=min(counts, default=1))


def divided(function: Task, tensors: tuple[Tensor, ...]) -> tuple[bool, ...] | None:
    """Which tensors have one row per sample; None where a part of the batch cannot be computed by itself."""
    first = 2 if isinstance(function, Pull) else 1  # after v and the point, or the start
    own = own_rows(function.equation, tensors[first - 1], tensors[first:])
    return None if own is None else (*[True] * first, *own)

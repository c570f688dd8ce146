"""A batch in parts, one for each core: samples are independent, so the cores need not wait for one another.

Cores that share every operation meet at its end, hundreds of times in a solve. Where a batch is large, each runs the whole
program on samples of its own instead, and ends when these have ended.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from energynet._program import tied_rows
from energynet.equation import Equation, Linear
from energynet.pure import Pull, Pure

ROWS = 32  # samples of a part: fewer make no good use of shared weights, which each part reads by itself
LEAST = 2048  # numbers of x in a part, below which to begin and end it costs more than it saves
GOOD = 128, 32_768  # samples and numbers of a part that makes good use of weights, and that stays in a core's cache


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the tensors of a function are divided."""

    own: tuple[bool, ...]  # which of them have one row a sample
    count: int

    def split(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The tensors of each part, without copying."""
        rows = len(tensors[0]) // self.count
        plain = [t.detach() for t in tensors]
        return [
            tuple(t[k * rows : (k + 1) * rows] if own else t for t, own in zip(plain, self.own, strict=True))
            for k in range(self.count)
        ]

    def joined(self, function: Pure, parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
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
    each = x[0].numel()
    counts = [k for k in range(threads, len(x) // ROWS + 1, threads) if len(x) % k == 0 and len(x) // k * each >= LEAST]
    good = [k for k in counts if len(x) // k >= GOOD[0] and len(x) // k * each >= GOOD[1]]
    return max(good, default=min(counts, default=1))


def own_rows(function: Pure, tensors: tuple[Tensor, ...]) -> tuple[bool, ...] | None:
    """Which tensors have one row a sample; None where a part of the batch cannot be computed by itself."""
    if isinstance(function, Pull):
        own = _own_rows(function.equation, tensors[1], tensors[2:])
        return None if own is None else (True, True, *own)
    own = _own_rows(function.equation, tensors[0], tensors[1:])
    return None if own is None else (True, *own)


def _own_rows(equation: Equation, x: Tensor, inputs: tuple[Tensor, ...]) -> tuple[bool, ...] | None:
    if isinstance(equation, Linear):  # its own inputs are v and the point
        own = _own_rows(equation.root, inputs[1], inputs[2:])
        return None if own is None else (True, True, *own)
    if equation.vmaps:
        return tuple(dim == 0 for dim in equation.vmaps[-1][0])
    try:
        tied = tuple(tied_rows(equation.residual, (x, *inputs))[1:])
        return tied if _is_independent(equation.residual, x, inputs, tied) else None
    except Exception:  # whatever code raises that insists on the size of the batch
        return None


@torch.no_grad()
def _is_independent(residual: Callable[..., Tensor], x: Tensor, inputs: Sequence[Tensor], own: Sequence[bool]) -> bool:
    """Whether some samples by themselves give what they give among the others, as they would not with z − z.mean(0)."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:  # zeros would hide what they are multiplied with; positive ones stay positive
        noise = torch.rand(t.shape, generator=generator, dtype=torch.float32).to(t)
        return t + 0.5 * noise * (1 + t.abs()) if t.is_floating_point() else t

    x, inputs = moved(x), [moved(t) if mine else t for t, mine in zip(inputs, own, strict=True)]
    some = torch.randperm(len(x), generator=generator)[: len(x) // 2]
    among = residual(x, *inputs)[some]
    alone = residual(x[some], *(t[some] if mine else t for t, mine in zip(inputs, own, strict=True)))
    size = among.abs().nan_to_num(0, 0, 0).amax()
    return torch.allclose(alone, among, rtol=0.0, atol=float(torch.finfo(x.dtype).eps ** 0.5 * size), equal_nan=True)

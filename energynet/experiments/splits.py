"""Which training rows are held out to choose round, threshold and rates."""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 1000
"""Below this many training rows one held-out tenth chooses little but its own noise."""
FOLDS = 5


@dataclass(frozen=True)
class Split:
    """Row numbers of the training rows that are fitted, and of those held out."""

    fit: Tensor
    held_out: Tensor


def draw_splits(num_rows: int, seed: int, *, share: float = 1.0, fraction: float = 0.1, folds: int | None = None) -> list[Split]:
    """Draw the held-out training rows with the seed: one split, or the folds of a cross-validation.

    Args:
        num_rows: number of training rows.
        seed: seed of the draw.
        share: share of the rows that is used at all.
        fraction: share of these rows to hold out, where there is one split.
        folds: number of folds; 1 for one split, None for 5 folds below 1,000 rows and one split otherwise.

    Returns:
        The splits; the held-out rows of several are disjoint and together all rows that are used.

    Raises:
        ValueError: when a part would be empty.

    >>> [len(split.held_out) for split in draw_splits(2000, seed=0)], len(draw_splits(100, seed=0))
    ([200], 5)
    """
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[: round(share * num_rows)]
    folds = (FOLDS if len(order) < SMALL else 1) if folds is None else folds
    if folds == 1:
        count = int(len(order) * fraction)
        parts: tuple[Tensor, ...] = (order[:count], order[count:])
    else:
        parts = torch.tensor_split(order, folds)
    if folds < 1 or not all(map(len, parts)):
        raise ValueError(
            f"{len(order)} training rows cannot be divided: with {folds} folds, and {fraction:g} held out where there is "
            "one, a part would be empty; give more rows."
        )
    if folds == 1:
        return [Split(fit=parts[1], held_out=parts[0])]
    return [Split(torch.cat([*parts[:k], *parts[k + 1 :]]), parts[k]) for k in range(folds)]

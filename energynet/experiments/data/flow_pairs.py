"""The pairs of the optical-flow experiment, by number: generated ones for training and held-out ones, and those of a data set."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .flow_files import LabeledPair, PairSource, find_pairs
from .moving_pictures import MovingPictures, bundled_pictures

HELD_OUT = 1_000_000
"""Held-out pairs have numbers from here on, those of the data set negative ones: −1, −2, ..."""
SMALL = (128, 160)
"""The size of training frames; motions are as much shorter as these are narrower than FlyingChairs."""


@dataclass(frozen=True, eq=False)
class FlowPairs:
    """Pairs by number.

    Every fifth picture is kept for the held-out pairs.

    Args:
        pictures: what generated pairs are made of.
        test: the pairs of a data set.
        size: of generated pairs.
    """

    pictures: Sequence[Tensor]
    test: Sequence[PairSource]
    size: tuple[int, int] = SMALL

    @classmethod
    def of(cls, folder: Path | None) -> "FlowPairs":
        """With the pairs of a folder, or of its folders, and the pictures of train400 if they are there."""
        pictures = bundled_pictures()
        if folder is None:
            return cls(pictures, ())
        archives = [place / "train400" / "train400.npz" for place in (folder, folder.parent)]
        for archive in [path for path in archives if path.is_file()][:1]:
            with np.load(archive) as arrays:
                more = torch.from_numpy(arrays["images"].astype(np.float32) / 255)
            pictures = [*pictures * (len(more) // (4 * len(pictures))), *more[:, None]]
        return cls(pictures, find_pairs(folder))

    def pair(self, number: int) -> LabeledPair:
        """The pair of a number."""
        if number < 0:
            return self.test[-1 - number].load()
        held_out = number >= HELD_OUT
        pictures = [picture for k, picture in enumerate(self.pictures) if (k % 5 == 0) == held_out]
        made = MovingPictures(pictures, self.size, pace=self.size[1] / 512).pair(number)
        everywhere = torch.ones_like(made.flow[0], dtype=torch.bool)
        return LabeledPair(f"generated-{number}", made.first, made.second, made.flow, everywhere)

    @functools.lru_cache(maxsize=600)  # noqa: B019 (the pairs live as long as the experiment)
    def cached(self, number: int) -> LabeledPair:
        """The pair, which is kept for the next time."""
        return self.pair(number)


def gray(image: Tensor) -> Tensor:  # (C, H, W) -> (1, H, W)
    """The brightness of a picture as the eye sees it (Rec. 601)."""
    weights = image.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return image if len(image) == 1 else (weights * image[:3]).sum(0, keepdim=True)

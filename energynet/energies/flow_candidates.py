"""Candidates for motions that are too long for a pyramid: displacements at which small windows of two frames match."""

import dataclasses
import itertools

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from energynet.energies.flow import census, derivatives
from energynet.energies.flow_fields import inside, visible, warp

SIDES = range(36, 144)
"""Shorter sides of the levels that are searched: two levels of any pyramid by halves that has them."""
SATURATION = 0.6
"""Features that differ by more count as this different: they belong to something else."""


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Replaces a flow, window by window, where another displacement explains the frames clearly better.

    A small object that moves by more than its size is lost in a pyramid: on the level on which its motion is short, it can no
    longer be seen. Here every displacement within reach is tried on two coarse levels, and compared by soft census and gradients,
    summed over a window. The best one is taken if the search in the other direction leads back, and if it costs less than
    ``ratio`` times the present flow minus ``margin``.

    Example:
        >>> first = torch.rand(1, 1, 40, 48, generator=torch.Generator().manual_seed(0))
        >>> second = first.roll(6, -1)                             # everything moves by 6 pixels to the right
        >>> frames = torch.cat([first, second])
        >>> flow = Candidates().better(frames, torch.zeros(2, 2, 40, 48))
        >>> flow[0, :, 20, 20], flow[1, :, 20, 20]
        (tensor([6., 0.]), tensor([-6., 0.]))

    Args:
        reach: the longest displacement, as a share of each side; half of it on the finer level.
        window: the side of the window, in pixels; odd.
        ratio: between 0 and 1.
        margin: what a mean difference of features may be by chance.

    Raises:
        ValueError: if a number is out of range.

    Source: Xu, Jia and Matsushita (2012), Motion detail preserving optical flow estimation, for the idea.
    """

    reach: float = 0.25
    window: int = 5
    ratio: float = 0.9
    margin: float = 0.02

    def __post_init__(self) -> None:
        if not (0 < self.reach < 1 and self.window >= 1 and self.window % 2 and 0 < self.ratio <= 1 and self.margin >= 0):
            raise ValueError(f"reach must lie between 0 and 1, the window be odd, ratio in (0, 1] and margin ≥ 0, got {self}.")

    def better(self, frames: Tensor, flow: Tensor) -> Tensor:  # (2 B, 1, H, W), (2 B, 2, H, W) -> (2 B, 2, H, W)
        """The flow with the candidates that were taken, unchanged on levels that are not searched.

        Args:
            frames: the first frames and then the second ones.
            flow: from the first frames to the second, and then back.
        """
        sides = (frames.shape[-2], frames.shape[-1])
        if min(sides) not in SIDES:
            return flow
        reach = self.reach if min(sides) < 2 * SIDES.start else self.reach / 2
        features = descriptors(frames)
        first, second = features.chunk(2)
        found, cost = matches(first, second, (round(reach * sides[0]), round(reach * sides[1])), self.window)
        other = torch.cat([second, first])
        present = difference(features, warp(other, flow), self.window)
        present = torch.where(inside(flow), present, SATURATION)
        there, back = found.chunk(2)
        taken = visible(found, torch.cat([back, there])) & (cost < self.ratio * present - self.margin)
        return torch.where(taken, found, flow)


def descriptors(image: Tensor) -> Tensor:  # (B, 1, H, W) -> (B, 6, H, W)
    """What is compared: half of the soft census, since the neighbors have the other half, and the gradient."""
    return torch.cat([0.5 * census(image)[:, 4:], *(5 * slope for slope in derivatives(image))], 1)


def difference(one: Tensor, other: Tensor, window: int) -> Tensor:  # 2 × (B, F, H, W) -> (B, 1, H, W)
    """The mean over features and a window of how much two images differ."""
    margin = window // 2
    apart = (one - other).abs_().mean(1, keepdim=True).clamp_(max=SATURATION)
    return avg_pool2d(pad(apart, (margin,) * 4, mode="replicate"), window, 1)


def matches(first: Tensor, second: Tensor, reach: tuple[int, int], window: int) -> tuple[Tensor, Tensor]:
    """The displacement with the smallest difference in both directions, and this difference.

    Args:
        first: features ``(B, F, H, W)``.
        second: of the same shape.
        reach: the longest displacements along rows and columns.
        window: the side of the window.

    Returns:
        ``(2 B, 2, H, W)``, first to second and then back, and ``(2 B, 1, H, W)``.
    """
    count, sides = len(first), (first.shape[-2], first.shape[-1])
    cost = torch.full((2 * count, 1, *sides), torch.inf, dtype=first.dtype, device=first.device)
    found = torch.zeros(2 * count, 2, *sides, dtype=first.dtype, device=first.device)
    for shift in itertools.product(*(range(-min(r, side - 1), min(r, side - 1) + 1) for r, side in zip(reach, sides))):
        (top, bottom), (left, right) = (overlap(s, side) for s, side in zip(shift, sides))
        here, there = (..., top, left), (..., bottom, right)
        apart = difference(first[here], second[there], window)
        for part, where, sign in ((slice(count), here, 1), (slice(count, None), there, -1)):
            known, flow = cost[part][where], found[part][where]
            better = apart < known
            known.copy_(torch.where(better, apart, known))
            flow.copy_(torch.where(better, flow.new_tensor([sign * shift[1], sign * shift[0]])[:, None, None], flow))
    return found, cost


def overlap(shift: int, side: int) -> tuple[slice, slice]:
    """The places that stay inside when they move by a shift, and where they move to."""
    return slice(max(0, -shift), side - max(0, shift)), slice(max(0, shift), side - max(0, -shift))

"""The flow of large frames in tiles, so that memory is bounded."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from energynet.energies import FlowEstimate, OpticalFlow
from energynet.energies.flow_fields import resize_flow, visible
from energynet.energies.flow_solver import Level

TILE = 1024
"""Side of a tile, in pixels; frames of twice its area are not cut up."""
OVERLAP = 96
"""Pixels that neighboring tiles share, over which their flows are blended."""


def in_tiles(flow: OpticalFlow, first: Tensor, second: Tensor, say: Callable[[str], None], tile: int = TILE) -> FlowEstimate:
    """The flow of two frames ``(1, H, W)``; where they are large, at a fraction of their size first, then tile by tile.

    A tile starts from the flow of the whole frame at the resolution where that fits into one tile. The second frame is shifted
    by the mean motion of the tile before it is cut, so that motions may be longer than a tile is wide.

    Args:
        flow: what computes the flow.
        first: ``(1, H, W)``.
        second: ``(1, H, W)``.
        say: prints a line.
        tile: side of a tile.

    Returns:
        For one pair.
    """
    height, width = first.shape[-2:]
    if height * width <= 2 * tile * tile:
        return flow.estimate(first[None], second[None], lambda level, levels: say(f"level {level} of {levels}"))
    factor = math.sqrt(tile * tile / (height * width))
    size = (max(round(factor * height), 1), max(round(factor * width), 1))
    say(f"{height} × {width} pixels: first the whole at {size[0]} × {size[1]}, then in tiles")
    one, two = (interpolate(f[None], size=size, mode="bilinear", antialias=True) for f in (first, second))
    coarse = flow.estimate(one, two, lambda level, levels: say(f"level {level} of {levels}"))
    ahead = _refined(flow, first, second, resize_flow(coarse.flow, (height, width)), tile, say)
    back = resize_flow(coarse.back, (height, width))
    return FlowEstimate(ahead, back, visible(ahead, back))


def _refined(flow: OpticalFlow, first: Tensor, second: Tensor, start: Tensor, tile: int, say: Callable[[str], None]) -> Tensor:
    total, weight = torch.zeros_like(start), torch.zeros_like(start[:, :1])
    boxes = [(top, left) for top in starts(first.shape[-2], tile) for left in starts(first.shape[-1], tile)]
    for number, (top, left) in enumerate(boxes, 1):
        rows, columns = slice(top, top + tile), slice(left, left + tile)
        guess = start[..., rows, columns]
        mean = guess.mean((-2, -1)).round()[0]
        moved = shifted(second, top + int(mean[1]), left + int(mean[0]), guess.shape[-2], guess.shape[-1])
        offset = mean[:, None, None]
        found = improved(flow, first[None, :, rows, columns], moved[None], guess - offset) + offset
        blend = ramp(guess.shape[-2])[:, None] * ramp(guess.shape[-1])
        total[..., rows, columns] += blend * found
        weight[..., rows, columns] += blend
        say(f"tile {number} of {len(boxes)}")
    return total / weight


@torch.no_grad()
def improved(flow: OpticalFlow, first: Tensor, second: Tensor, start: Tensor) -> Tensor:
    """The flow of a pair ``(1, 1, h, w)`` from one that is nearly right, on the two finest levels."""
    frames = torch.cat([first, second])
    half = interpolate(frames, scale_factor=0.5, mode="bilinear", antialias=True)
    both = torch.cat([start, -start])
    state = Level(frames, both, torch.ones_like(frames)).on(half)
    for level in (half, frames):
        state = state.on(level)
        for _ in range(flow.effort.warps):
            state = state.moved(flow.improve(state))
    return state.flow[:1]


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along one side, so that neighbors share at least `OVERLAP` pixels.

    >>> starts(2000, 1024), starts(1000, 1024)
    ([0, 488, 976], [0])
    """
    if length <= tile:
        return [0]
    count = math.ceil((length - tile) / (tile - OVERLAP)) + 1
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def shifted(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:  # (C, H, W) -> (C, height, width)
    """A window of an image that may lie outside of it, where the border is repeated."""
    rows = torch.arange(top, top + height).clamp(0, image.shape[-2] - 1)
    columns = torch.arange(left, left + width).clamp(0, image.shape[-1] - 1)
    return image[:, rows][:, :, columns]


def ramp(length: int) -> Tensor:  # (length,)
    """Weights that rise from both ends over the overlap."""
    away = torch.arange(1, length + 1, dtype=torch.float32)
    return (torch.minimum(away, away.flip(0)) / OVERLAP).clamp(max=1)

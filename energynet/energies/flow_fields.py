"""Images and flow fields: pyramids, warping, medians, occlusion, colors.

A flow ``(B, 2, H, W)`` holds for each pixel of the first frame how far it moves, in pixels, first to the right and then down.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad

OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Rows and columns to half of the eight neighbors of a pixel; the other half look back."""


def pyramid(image: Tensor, smallest: int = 16) -> list[Tensor]:  # (B, C, H, W) -> coarsest first
    """An image at half, a quarter, ... of its size, smoothed before each step, coarsest first.

    Example:
        >>> [tuple(level.shape) for level in pyramid(torch.zeros(1, 3, 90, 64))]
        [(1, 3, 23, 16), (1, 3, 45, 32), (1, 3, 90, 64)]

    Args:
        image: ``(B, C, H, W)``, of any size.
        smallest: no side of a level is shorter, unless that of the image is.

    Returns:
        The levels; the last one is the image itself.
    """
    levels = [image]
    while min(levels[-1].shape[-2:]) >= 2 * smallest:
        size = [-(-side // 2) for side in levels[-1].shape[-2:]]
        levels.append(interpolate(levels[-1], size=size, mode="bilinear", antialias=True))
    return levels[::-1]


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:  # (B, 2, h, w) -> (B, 2, H, W)
    """A flow at another resolution, in pixels of that resolution.

    Example:
        >>> resize_flow(torch.ones(1, 2, 4, 5), (8, 15))[0, :, 0, 0]
        tensor([3., 2.])

    Args:
        flow: ``(B, 2, h, w)``.
        size: (H, W).
    """
    factors = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]])
    return interpolate(flow, size=size, mode="bilinear") * factors[:, None, None]


def warp(image: Tensor, flow: Tensor) -> Tensor:  # (B, C, H, W), (B, 2, H, W) -> (B, C, H, W)
    """The image seen from the first frame: at each pixel q its value at q + flow(q), by bicubic interpolation.

    Beyond the border, the nearest pixel is repeated; ``inside`` says where. The result can be differentiated once with respect to
    both arguments.

    Example:
        >>> image = torch.arange(12.0).reshape(1, 1, 3, 4)
        >>> warp(image, torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 4))[0, 0, 0]
        tensor([1., 2., 3., 3.])

    Args:
        image: ``(B, C, H, W)``.
        flow: ``(B, 2, H, W)``.

    Raises:
        ValueError: if their sizes differ.
    """
    if image.ndim != 4 or flow.shape != (len(image), 2, *image.shape[-2:]):
        raise ValueError(f"warp needs images (B, C, H, W) and a flow (B, 2, H, W), got {_shape(image)} and {_shape(flow)}.")
    target = positions(flow)
    sides = flow.new_tensor([max(image.shape[-1] - 1, 1), max(image.shape[-2] - 1, 1)])
    grid = 2 * target.movedim(1, -1) / sides - 1
    return grid_sample(image, grid, mode="bicubic", padding_mode="border", align_corners=True)


def positions(flow: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 2, H, W)
    """Where each pixel moves to: its column and row in the second frame."""
    height, width = flow.shape[-2:]
    columns = torch.arange(width, dtype=flow.dtype, device=flow.device)
    rows = torch.arange(height, dtype=flow.dtype, device=flow.device)
    return flow + torch.stack(torch.meshgrid(columns, rows, indexing="xy"))


def inside(flow: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 1, H, W) bool
    """Which pixels move to a place inside the frame.

    Example:
        >>> inside(torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 3))
        tensor([[[[ True,  True, False]]]])
    """
    target = positions(flow)
    last = target.new_tensor([flow.shape[-1] - 1, flow.shape[-2] - 1])[:, None, None]
    return ((target >= 0) & (target <= last)).all(1, keepdim=True)


def visible(flow: Tensor, back: Tensor) -> Tensor:  # 2 × (B, 2, H, W) -> (B, 1, H, W) bool
    """Which pixels the second frame shows: those that the backward flow brings back to where they came from.

    Example:
        >>> visible(torch.full((1, 2, 1, 3), 2.0), torch.tensor([-2.0, -2.0, 3.0]).expand(1, 2, 1, 3))[0, 0]
        tensor([[False, False, False]])

    Args:
        flow: from the first frame to the second.
        back: from the second to the first.

    Source: Sundaram, Brox and Keutzer (2010), Dense point trajectories by GPU-accelerated large displacement optical flow.
    """
    returned = warp(back, flow)
    squares = flow.square().sum(1, keepdim=True) + returned.square().sum(1, keepdim=True)
    return (flow + returned).square().sum(1, keepdim=True) <= 0.01 * squares + 0.5


def median(flow: Tensor, size: int = 5) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
    """The median of each component over a window of ``size`` × ``size`` pixels; the border is repeated.

    All windows go through one network of comparisons, which is ten times as fast as sorting each.

    Example:
        >>> spike = torch.zeros(1, 2, 5, 5); spike[..., 2, 2] = 9.0
        >>> float(median(spike).abs().amax())
        0.0

    Args:
        flow: ``(B, C, H, W)``.
        size: of the window, odd.
    """
    padded, (height, width) = pad(flow, (size // 2,) * 4, mode="replicate"), flow.shape[-2:]
    wires = [padded[..., i : i + height, j : j + width] for i in range(size) for j in range(size)]
    for low, high, keeps_low, keeps_high in _comparisons(size * size):
        first, second = wires[low], wires[high]
        if keeps_low:
            wires[low] = torch.minimum(first, second)
        if keeps_high:
            wires[high] = torch.maximum(first, second)
    return wires[size * size // 2]


@functools.cache
def _comparisons(count: int) -> list[tuple[int, int, bool, bool]]:
    """What the middle wire of Batcher's sorting network needs: two wires, and whether the smaller and the larger are used."""
    network = []
    p = 1
    while p < count:
        for k in (p >> i for i in range(p.bit_length())):
            network += [(i, i + k) for j in range(k % p, count - k, 2 * k) for i in range(j, min(j + k, count - k))
                        if i // (2 * p) == (i + k) // (2 * p)]  # fmt: skip
        p *= 2
    needed, kept = {count // 2}, []
    for low, high in reversed(network):
        if {low, high} & needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return kept[::-1]


def flow_to_color(flow: Tensor, largest: float | None = None) -> Tensor:  # (B, 2, H, W) -> (B, 3, H, W)
    """A flow as a picture: the hue is the direction, the saturation the length; white is no motion.

    Right is red, down yellow to green, left cyan, up blue to violet.

    Example:
        >>> flow_to_color(torch.tensor([3.0, 0.0]).reshape(1, 2, 1, 1)).flatten().round(decimals=3)
        tensor([1., 0., 0.])

    Args:
        flow: ``(B, 2, H, W)``.
        largest: the length of full saturation, in pixels; longer ones are darker. None: the longest of each flow.
    """
    length = torch.linalg.vector_norm(flow, dim=1)  # (B, H, W)
    whole = length.amax((1, 2), keepdim=True) if largest is None else length.new_tensor(largest)
    share = length / torch.where(whole > 0, whole, 1)
    turn = torch.atan2(flow[:, 1], flow[:, 0]) / (2 * torch.pi)
    hue = turn.unsqueeze(1) + turn.new_tensor([0.0, 2 / 3, 1 / 3])[:, None, None]  # red is 0
    full = ((6 * (hue - hue.round())).abs() * -1 + 2).clamp(0, 1)
    inside = 1 - share.clamp(max=1).unsqueeze(1) * (1 - full)
    return torch.where(share.unsqueeze(1) <= 1, inside, 0.75 * full)


def both_ends(x: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:  # (..., H, W) -> 2 × (..., h, w)
    """The pixels that have a neighbor at an offset of ``OFFSETS``, and those neighbors."""
    rows, columns = offset
    height, width = x.shape[-2:]
    left, right = max(-columns, 0), max(columns, 0)
    near, far = x[..., : height - rows, left : width - right], x[..., rows:, right : width - left]
    return near, far


def filled(x: Tensor, offset: tuple[int, int]) -> Tensor:  # (..., h, w) -> (..., H, W)
    """What is known of the pixels that have a neighbor at an offset, 0 for the others."""
    rows, columns = offset
    return pad(x, (max(-columns, 0), max(columns, 0), 0, rows))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)

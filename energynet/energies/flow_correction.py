"""Learned corrections of the weights of a `FlowEnergy`: what a small network sees, and what it says."""

import torch
from torch import Tensor, nn

from energynet.energies.flow_fields import OFFSETS, both_ends, filled

OBSERVATIONS = 13


class FlowCorrection(nn.Module):
    """A small network that corrects the weights of a `FlowEnergy`, shared by all levels of a pyramid.

    It sees per pixel what is left of the data at w₀, the texture, which pixels count, and the differences between neighbors of
    the flow and of the frame. It returns logarithms of factors, between −3 and 3: one for the weight of the data, and one for
    each of four neighbors. Their mean over a frame is about 0: they say where the weights are higher, and leave the balance of
    data and smoothness to λ. They are 0 at first, so that an untrained correction changes nothing.

    Example:
        >>> from energynet.energies import FlowEnergy
        >>> energy = FlowEnergy(correction=FlowCorrection())
        >>> frames, around = torch.rand(2, 1, 1, 16, 20), torch.zeros(1, 2, 16, 20)
        >>> bool(torch.equal(energy(around, *frames, around), FlowEnergy()(around, *frames, around)))
        True

    Args:
        width: channels of the three hidden layers, which see 15 × 15 pixels.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(OBSERVATIONS, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=4, dilation=4), nn.ReLU(),
            nn.Conv2d(width, 1 + len(OFFSETS), 1),
        )  # fmt: skip
        last = self.layers[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, first: Tensor, around: Tensor, tensor: Tensor, data: Tensor) -> Tensor:  # -> (B, 5, H, W)
        said = self.layers(observe(first, around, tensor, data))
        return 3 * torch.tanh((said - said.mean((2, 3), keepdim=True)) / 3)


def observe(first: Tensor, around: Tensor, tensor: Tensor, data: Tensor) -> Tensor:  # -> (B, 13, H, W)
    """What the correction sees, each number of the order of 1."""
    xx, xy, yy, xt, yt, tt = tensor.unbind(1)
    texture = xx + yy
    direction = torch.hypot(xx - yy, 2 * xy) / (texture + 1e-3)  # 1 for an edge, 0 for a corner
    pending = torch.hypot(xt, yt) / (texture + 0.1)  # how far the data would move a pixel by themselves, about
    own = torch.stack([torch.log1p(100 * tt) / 3, torch.log1p(texture), direction, torch.log1p(pending), data[:, 0]], 1)
    bends = [filled(torch.log1p(10 * _distance(around, offset)), offset) for offset in OFFSETS]
    edges = [filled(10 * _distance(first, offset), offset) for offset in OFFSETS]
    return torch.cat([own, torch.stack(bends, 1), torch.stack(edges, 1)], 1)


def _distance(x: Tensor, offset: tuple[int, int]) -> Tensor:  # (B, C, H, W) -> (B, h, w)
    near, far = both_ends(x, offset)
    return torch.linalg.vector_norm(far - near, dim=1)

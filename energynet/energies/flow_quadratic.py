"""Quadratic energies of optical flow, with products and inverse blocks that are written out by hand."""

import torch
from torch import Tensor

from energynet.energies.flow_fields import OFFSETS, both_ends, filled

TINY = 1e-30


class FlowQuadratic:
    """A `FlowEnergy` whose potentials are squares: the quadratic that touches another one from above at some flow.

    Args:
        around: w₀, ``(B, 2, H, W)``.
        tensor: the motion tensor, ``(B, 6, H, W)``.
        data: weights of the data, ``(B, 1, H, W)``.
        smooth: weights of the smoothness, one per neighbor of ``OFFSETS``, ``(B, 4, H, W)``; 0 where there is no neighbor.
        ridge: ρ.
    """

    def __init__(self, around: Tensor, tensor: Tensor, data: Tensor, smooth: Tensor, ridge: float) -> None:
        self.around, self.tensor, self.data, self.smooth, self.ridge = around, tensor, data, smooth, ridge
        # Pixels in one row: the neighbors of all of them are then one slice, which is what makes products fast.
        self._shifts = [rows * around.shape[-1] + columns for rows, columns in OFFSETS]
        weights = [w[..., : w.shape[-1] - shift] for w, shift in zip(smooth.flatten(2).split(1, 1), self._shifts)]
        self._weights = [weight.expand(-1, 2, -1).contiguous() for weight in weights]
        xx, self._across, yy = (data * tensor[:, :3]).flatten(2).split(1, 1)
        spread = torch.full_like(xx, ridge)
        for weight, shift in zip(weights, self._shifts):
            spread[..., :-shift] += weight
            spread[..., shift:] += weight
        self._diagonal = torch.cat([xx, yy], 1) + spread
        determinant = self._diagonal[:, :1] * self._diagonal[:, 1:] - self._across.square()
        self._inverse, self._inverse_across = self._diagonal.flip(1) / determinant, self._across / determinant

    def __call__(self, flow: Tensor) -> Tensor:  # (B, 2, H, W) -> (B,)
        """The quadratic at a flow, up to a constant."""
        away = flow - self.around
        value = self.data[:, 0] * residual(away, self.tensor) + self.ridge * away.square().sum(1)
        return 0.5 * (value + (self.smooth * differences(flow)).sum(1)).sum((1, 2))

    def hessian_blocks(self, flow: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 2, 2, H, W)
        """The 2 × 2 blocks that couple the components of the flow at a pixel."""
        (xx, yy), xy = self._diagonal.unbind(1), self._across[:, 0]
        return torch.stack([torch.stack([xx, xy], 1), torch.stack([xy, yy], 1)], 1).unflatten(-1, self.around.shape[-2:])

    def product(self, p: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 2, H, W)
        """H p."""
        return self._product(p.flatten(2)).view_as(p)

    def inverse_blocks(self, p: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 2, H, W)
        """M⁻¹ p for the 2 × 2 blocks of H."""
        return self._inverse_blocks(p.flatten(2)).view_as(p)

    def _product(self, p: Tensor) -> Tensor:  # (B, 2, H W)
        image = (self._diagonal * p).addcmul_(self._across, p.flip(1))
        for weight, shift in zip(self._weights, self._shifts):
            image[..., :-shift].addcmul_(weight, p[..., shift:], value=-1)
            image[..., shift:].addcmul_(weight, p[..., :-shift], value=-1)
        return image

    def _inverse_blocks(self, p: Tensor) -> Tensor:  # (B, 2, H W)
        return (self._inverse * p).addcmul_(self._inverse_across, p.flip(1), value=-1)

    def right(self) -> Tensor:
        """H w for the minimizer w."""
        xx, xy, yy, xt, yt, _ = self.tensor.split(1, 1)
        u, v = self.around.split(1, 1)
        known = torch.cat([xx * u + xy * v - xt, xy * u + yy * v - yt], 1)
        return self.data * known + self.ridge * self.around

    def minimizer(self, start: Tensor, steps: int) -> Tensor:  # (B, 2, H, W) -> (B, 2, H, W)
        """So many steps of conjugate gradients, preconditioned by the blocks."""
        flow = start.flatten(2)
        r = self.right().flatten(2) - self._product(flow)
        p = z = self._inverse_blocks(r)
        before = _dot(r, z)
        for _ in range(steps):
            image = self._product(p)
            length = before / _dot(p, image).clamp_min(TINY)
            flow, r = torch.addcmul(flow, length, p), torch.addcmul(r, length, image, value=-1)
            z = self._inverse_blocks(r)
            after = _dot(r, z)
            p = torch.addcmul(z, after / before.clamp_min(TINY), p)
            before = after
        return flow.view_as(start)


def differences(flow: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 4, H, W)
    """The squared distance to the flow of each neighbor of ``OFFSETS``; 0 where there is none."""
    squares = []
    for offset in OFFSETS:
        near, far = both_ends(flow, offset)
        squares.append(filled((far - near).square().sum(1), offset))
    return torch.stack(squares, 1)


def residual(away: Tensor, tensor: Tensor) -> Tensor:  # (B, 2, H, W), (B, 6, H, W) -> (B, H, W)
    """The square that a motion tensor stands for, at a flow away from the one that it was made at."""
    (u, v), (xx, xy, yy, xt, yt, tt) = away.unbind(1), tensor.unbind(1)
    return (xx * u + 2 * (xy * v + xt)) * u + (yy * v + 2 * yt) * v + tt


def _dot(a: Tensor, b: Tensor) -> Tensor:  # (B, 2, H W) -> (B, 1, 1)
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))[:, None, None]

"""Optical flow from coarse to fine: lagged weights on each level, warping, medians, occlusion."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from energynet.energies.flow import OFFSETS, FlowEnergy, both_ends, filled, residual
from energynet.energies.flow_fields import median, pyramid, resize_flow, visible


class FlowQuadratic:
    """A `FlowEnergy` whose potentials are squares: the quadratic that touches another one from above at some flow.

    Args:
        around: w₀, ``(B, 2, H, W)``.
        tensor: the motion tensor, ``(B, 6, H, W)``.
        data: weights of the data, ``(B, 1, H, W)``.
        smooth: weights of the smoothness, one per neighbor of `OFFSETS`, ``(B, 4, H, W)``; 0 where there is no neighbor.
        ridge: ρ.
    """

    def __init__(self, around: Tensor, tensor: Tensor, data: Tensor, smooth: Tensor, ridge: float) -> None:
        self.around, self.tensor, self.data, self.ridge = around, tensor, data, ridge
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


def lagged_weights(energy: FlowEnergy, flow: Tensor, code: tuple[Tensor, ...], outer: int, inner: int) -> Tensor:
    """Lower the energy of a flow by minimizing quadratics that touch it from above, ``outer`` of them, inexactly."""
    for _ in range(outer):
        flow = majorizer(energy, flow, *code).minimizer(flow, inner)
    return flow


def majorizer(energy: FlowEnergy, flow: Tensor, around: Tensor, tensor: Tensor, data: Tensor, smooth: Tensor) -> FlowQuadratic:
    """The quadratic that touches the energy at a flow and lies above it: the potentials are concave in the squares."""
    data = data * energy.data_potential.slope(residual(flow - around, tensor).clamp_min(0)).unsqueeze(1)
    smooth = smooth * energy.smooth_potential.slope(differences(flow))
    return FlowQuadratic(around, tensor, data, smooth, energy.ridge)


def differences(flow: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 4, H, W)
    """The squared distance to the flow of each neighbor of `OFFSETS`; 0 where there is none."""
    squares = []
    for offset in OFFSETS:
        near, far = both_ends(flow, offset)
        squares.append(filled((far - near).square().sum(1), offset))
    return torch.stack(squares, 1)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much work is spent on a flow.

    Args:
        warps: how often the second frame is warped on each level.
        outer: how often weights are computed anew after each warp.
        inner: steps of conjugate gradients with the same weights.
        smallest: the shortest side of the coarsest level, in pixels.
        window: of the median between warps; 1 means none.
    """

    warps: int = 3
    outer: int = 5
    inner: int = 10
    smallest: int = 16
    window: int = 5


@dataclasses.dataclass(frozen=True)
class FlowEstimate:
    """The flow in both directions, and which pixels of the first frame the second one shows."""

    flow: Tensor  # (B, 2, H, W)
    back: Tensor  # (B, 2, H, W)
    visible: Tensor  # (B, 1, H, W) bool


class OpticalFlow(nn.Module):
    """The flow between two frames: `FlowEnergy` on each level of a pyramid, in both directions.

    On each level the second frame is warped several times and the energy of what is left is minimized by lagged weights, in a
    stated number of steps. After each warp a median removes outliers, and pixels whose backward flow disagrees
    count as occluded: their data have no weight. No gradients are kept.

    Example:
        >>> OpticalFlow(FlowEnergy())(torch.rand(1, 1, 32, 40), torch.rand(1, 1, 32, 40)).shape
        torch.Size([1, 2, 32, 40])

    Args:
        energy: what is minimized on each level.
        effort: how much work is spent.

    Raises:
        ValueError: by a call, if shapes do not fit.

    Source: Brox et al. (2004); Sun, Roth and Black (2014), for the median.
    """

    def __init__(self, energy: FlowEnergy, effort: Effort | None = None) -> None:
        super().__init__()
        self.energy, self.effort = energy, effort or Effort()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # 2 × (B, C, H, W) -> (B, 2, H, W)
        return self.estimate(first, second).flow

    @torch.no_grad()
    def estimate(self, first: Tensor, second: Tensor, on_level: Callable[[int, int], None] | None = None) -> FlowEstimate:
        """The flow, with that of the other direction and the visible pixels.

        Args:
            first: ``(B, C, H, W)``, of range 1; colors are averaged.
            second: of the same shape.
            on_level: called after each level with its number, from 1, and that of all.
        """
        if first.ndim != 4 or first.shape != second.shape:
            raise ValueError(
                f"optical flow needs two frames (B, C, H, W) of one shape, got {tuple(first.shape)} and {tuple(second.shape)}."
            )
        pairs = pyramid(torch.cat([first, second]).mean(1, keepdim=True), self.effort.smallest)
        state = Level.coarsest(pairs[0])
        for number, frames in enumerate(pairs, 1):
            state = state.on(frames)
            for _ in range(self.effort.warps):
                state = state.moved(self.improve(state))
            if on_level:
                on_level(number, len(pairs))
        flow, back = state.flow.chunk(2)
        return FlowEstimate(flow, back, state.seen.chunk(2)[0] > 0.5)

    def improve(self, state: "Level") -> Tensor:  # -> (2 B, 2, H, W)
        """The flow after one more warp."""
        code = self.energy.encode(*state.context)
        flow = lagged_weights(self.energy, state.flow, code, self.effort.outer, self.effort.inner)
        return median(flow, self.effort.window)


@dataclasses.dataclass(frozen=True)
class Level:
    """The state on one level: both frames, and the flow of both directions, one after the other."""

    frames: Tensor  # (2 B, 1, H, W)
    flow: Tensor  # (2 B, 2, H, W)
    seen: Tensor  # (2 B, 1, H, W), 1 where the other frame shows a pixel

    @classmethod
    def coarsest(cls, frames: Tensor) -> "Level":
        """No motion."""
        return cls(frames, torch.zeros_like(frames).repeat(1, 2, 1, 1), torch.ones_like(frames))

    @property
    def context(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the energy takes besides the flow."""
        return self.frames, _swapped(self.frames), self.flow, self.seen

    def on(self, frames: Tensor) -> "Level":
        """The state at the resolution of other frames."""
        size = (frames.shape[-2], frames.shape[-1])
        return Level(frames, resize_flow(self.flow, size), interpolate(self.seen, size=size, mode="bilinear"))

    def moved(self, flow: Tensor) -> "Level":
        """The state with another flow."""
        return Level(self.frames, flow, visible(flow, _swapped(flow)).to(flow.dtype))


def _swapped(both: Tensor) -> Tensor:
    one, other = both.chunk(2)
    return torch.cat([other, one])


def _dot(a: Tensor, b: Tensor) -> Tensor:  # (B, 2, H W) -> (B, 1, 1)
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))[:, None, None]


TINY = 1e-30

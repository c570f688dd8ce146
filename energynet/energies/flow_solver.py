"""Optical flow from coarse to fine: lagged weights on each level, warping, medians, occlusion."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from energynet.energies.flow import FlowEnergy
from energynet.energies.flow_candidates import Candidates
from energynet.energies.flow_fields import median, pyramid, resize_flow, visible


def lagged_weights(energy: FlowEnergy, flow: Tensor, code: tuple[Tensor, ...], outer: int, inner: int) -> Tensor:
    """Lower the energy of a flow by minimizing quadratics that touch it from above, ``outer`` of them, inexactly.

    These are the steps of `LaggedWeights` with `HessianBlocks`, with products that are written out by hand and without a judgment
    of the answer: a ninth of the time.
    """
    for _ in range(outer):
        flow = energy.majorizer(flow, *code).minimizer(flow, inner)
    return flow


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much work is spent on a flow.

    Args:
        warps: how often the second frame is warped on each level.
        outer: how often weights are computed anew after each warp.
        inner: steps of conjugate gradients with the same weights.
        smallest: the shortest side of the coarsest level, in pixels.
        window: of the median between warps; 1 means none.
        candidates: what may replace the flow where motions are long; None means nothing.
    """

    warps: int = 3
    outer: int = 5
    inner: int = 10
    smallest: int = 16
    window: int = 5
    candidates: Candidates | None = dataclasses.field(default_factory=Candidates)


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
    count as occluded: their data have no weight. On two coarse levels, `Candidates` replace the flow where motions are long. No
    gradients are kept.

    Example:
        >>> OpticalFlow(FlowEnergy())(torch.rand(1, 1, 32, 40), torch.rand(1, 1, 32, 40)).shape
        torch.Size([1, 2, 32, 40])

    Args:
        energy: what is minimized on each level.
        effort: how much work is spent.

    Raises:
        ValueError: by a call, if shapes do not fit.

    Source: Brox, Bruhn, Papenberg and Weickert (2004), for the warps; Sun, Roth and Black (2014), for the median.
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
            state = self.finer(state, frames)
            for _ in range(self.effort.warps):
                state = state.moved(self.improve(state))
            if on_level:
                on_level(number, len(pairs))
        flow, back = state.flow.chunk(2)
        return FlowEstimate(flow, back, state.seen.chunk(2)[0] > 0.5)

    def finer(self, state: "Level", frames: Tensor) -> "Level":
        """The state on the level of these frames, with the candidates that are better."""
        state, candidates = state.on(frames), self.effort.candidates
        return state if candidates is None else state.moved(candidates.better(frames, state.flow))

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

"""Models of optical flow: the energy with learned corrections, a fixed-point network and a feed-forward pyramid."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from energynet import FPI_NN, ConjugateGradient, ImplicitAdjoint, OneStepAdjoint, Termination, gradient, implicit
from energynet.energies import Effort, FlowCorrection, FlowEnergy, OpticalFlow, pyramid, warp
from energynet.energies.flow import derivatives
from energynet.energies.flow_fields import resize_flow
from energynet.energies.flow_solver import Level, lagged_weights

from .solves import SolveLog


def hand_energy(correction: nn.Module | None = None) -> FlowEnergy:
    """The energy whose numbers were chosen on synthetic pairs; convex on each level."""
    return FlowEnergy(smoothness=1.5, data_exponent=0.5, smooth_exponent=0.5, correction=correction)


def end_point_error(flow: Tensor, truth: Tensor) -> Tensor:  # 2 × (B, 2, H, W) -> (B, H, W)
    """The distance between the ends of two flows, pixel by pixel."""
    return torch.linalg.vector_norm(flow - truth, dim=1)


def level_loss(flow: Tensor, truth: Tensor) -> Tensor:  # (B, 2, h, w), (B, 2, H, W) -> ()
    """A power of the end-point error on a level: far outliers, which one level cannot mend, count less than in their mean.

    In pixels of the whole frame, by the square root of the scale.
    """
    size = (flow.shape[-2], flow.shape[-1])
    squares = (flow - resize_flow(truth, size)).square().sum(1)
    return (truth.shape[-1] / size[1]) ** 0.5 * ((squares + 0.01) ** 0.4 - 0.01**0.4).mean()


class FlowModel(nn.Module, ABC):
    """A model that trains on one level at a time."""

    @abstractmethod
    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # 2 × (B, 1, H, W) -> (B, 2, H, W)
        """The flow of whole frames."""

    @abstractmethod
    def step_loss(self, first: Tensor, second: Tensor, truth: Tensor) -> Tensor:  # -> ()
        """What a training step minimizes."""


class Differentiation(ABC):
    """How gradients come back through the minimization of the energy on one level."""

    @abstractmethod
    def minimum(self, model: "EnergyFlow", code: tuple[Tensor, ...]) -> Tensor:  # -> (B, 2, H, W)
        """The minimizer for a code, with a gradient."""


class Implicit(Differentiation):
    """Exact gradients of the minimum, by conjugate gradients on the Hessian.

    Args:
        rounds: of lagged weights.
        inner: steps of conjugate gradients in each.
        rtol: of the adjoint equation.
        budget: its steps at most.
    """

    def __init__(self, rounds: int = 5, inner: int = 10, rtol: float = 0.03, budget: int = 60) -> None:
        self.rounds, self.inner, self.termination = rounds, inner, Termination(rtol=rtol, budget=budget)

    def minimum(self, model: "EnergyFlow", code: tuple[Tensor, ...]) -> Tensor:
        energy, log = model.flow.energy, model.solves
        adjoint = ImplicitAdjoint(ConjugateGradient(), termination=self.termination, report=log.report)
        solve = implicit(
            lambda *code: lagged_weights(energy, code[0], code, self.rounds, self.inner),
            lambda flow, *code: gradient(energy.evaluate, flow, *code),
            symmetric=True, batch_dims=1, termination=Termination(budget=0), adjoint=adjoint, on_failure="warn",
        )  # fmt: skip
        answer: Tensor = solve(*code)
        return answer


class Unrolled(Differentiation):
    """Gradients of the last rounds of lagged weights only; with one round, a one-step gradient.

    Args:
        kept: how many rounds are differentiated.
        rounds: how many there are.
        inner: steps of conjugate gradients in each.
    """

    def __init__(self, kept: int, *, rounds: int = 5, inner: int = 10) -> None:
        self.kept, self.rounds, self.inner = kept, rounds, inner

    def minimum(self, model: "EnergyFlow", code: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            flow = lagged_weights(model.flow.energy, code[0], code, self.rounds - self.kept, self.inner)
        return lagged_weights(model.flow.energy, flow, code, self.kept, self.inner)


class EnergyFlow(FlowModel):
    """The energy, its weights corrected by a small network that all levels share."""

    def __init__(self, correction: FlowCorrection, how: Differentiation, effort: Effort) -> None:
        super().__init__()
        self.flow, self.how, self.solves = OpticalFlow(hand_energy(correction), effort), how, SolveLog()
        self.flow.energy.log_smoothness.requires_grad_(False)  # one level alone would have it larger than the whole pyramid has

    @classmethod
    def small(cls, how: Differentiation) -> "EnergyFlow":
        """With four channels, for tests."""
        return cls(FlowCorrection(4), how, Effort())

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        flow: Tensor = self.flow(first, second)
        return flow

    def step_loss(self, first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
        state = some_state(self.flow, first, second)
        code = tuple(t[: len(first)] for t in self.flow.energy.encode(*state.context))
        return level_loss(self.how.minimum(self, code), truth)


@torch.no_grad()
def some_state(flow: OpticalFlow, first: Tensor, second: Tensor) -> Level:
    """Where the flow stands before one of its warps, on one of the four finest levels, drawn at random."""
    pairs = pyramid(torch.cat([first, second]), flow.effort.smallest)
    level, warps = _draw(max(len(pairs) - 4, 0), len(pairs)), _draw(0, flow.effort.warps)
    state = Level.coarsest(pairs[0])
    for frames in pairs[: level + 1]:
        state = flow.finer(state, frames)
        for _ in range(warps if frames is pairs[level] else flow.effort.warps):
            state = state.moved(flow.improve(state))
    return state


def _draw(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


class HandEnergy(FlowModel):
    """The energy as it was written by hand; nothing is learned."""

    def __init__(self, effort: Effort) -> None:
        super().__init__()
        self.flow = OpticalFlow(hand_energy(), effort).requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        flow: Tensor = self.flow(first, second)
        return flow

    def step_loss(self, first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
        raise RuntimeError("nothing of this model is learned")


class UpdateNetwork(nn.Module):
    """One update of a flow from a local cost volume: g(w) = w₀ + 4 tanh(N(costs at w, w − w₀, slopes)/4)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        last = nn.Conv2d(width, 2, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(
            nn.Conv2d(13, width, 3, padding=1), nn.Tanh(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2), nn.Tanh(), last,
        )  # fmt: skip

    def forward(self, flow: Tensor, first: Tensor, second: Tensor, around: Tensor) -> Tensor:  # (B, 2, H, W) -> like flow
        shifts = [flow.new_tensor([x, y])[:, None, None] for y in (-1, 0, 1) for x in (-1, 0, 1)]
        costs = [5 * (warp(second, flow + shift) - first) for shift in shifts]
        seen = torch.cat([*costs, flow - around, *(20 * slope for slope in derivatives(first))], 1)
        return around + 4 * torch.tanh(self.layers(seen) / 4)


class FixedPointFlow(FlowModel):
    """`FPI_NN` of an update network, from the energy's answer or, level by level, from no motion."""

    def __init__(self, adjoint: ImplicitAdjoint | OneStepAdjoint, *, from_zero: bool) -> None:
        super().__init__()
        self.solves, self.from_zero = SolveLog(), from_zero
        if isinstance(adjoint, ImplicitAdjoint):
            adjoint = ImplicitAdjoint(termination=adjoint.termination, report=self.solves.report)
        self.hand = OpticalFlow(hand_energy(), Effort()).requires_grad_(False)
        self.layer = FPI_NN(UpdateNetwork(), termination=Termination(budget=10), adjoint=adjoint, on_failure="warn")

    @staticmethod
    def exact() -> ImplicitAdjoint:
        """Gradients through the fixed point, by a few steps of GMRES."""
        return ImplicitAdjoint(termination=Termination(rtol=0.03, budget=15))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if not self.from_zero:
            return self.solved(first, second, self.hand(first, second))
        return self._descended(first, second, 0)

    def solved(self, first: Tensor, second: Tensor, around: Tensor) -> Tensor:
        """The fixed point near a flow."""
        flow: Tensor = self.solves.add(self.layer.solve(first, second, around, x0=around)).value
        return flow

    def step_loss(self, first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
        if self.from_zero:
            return level_loss(self._descended(first, second, _draw(0, 4)), truth)
        state = some_state(self.hand, first, second)
        around, count = self.hand.improve(state), len(first)
        return level_loss(self.solved(state.frames[:count], state.frames[count:], around[:count]), truth)

    def _descended(self, first: Tensor, second: Tensor, skipped: int) -> Tensor:
        """The flow of all levels but the finest ones; the gradient is that of the last one."""
        levels = list(zip(pyramid(first), pyramid(second)))
        flow = torch.zeros_like(levels[0][0]).repeat(1, 2, 1, 1)
        for one, two in levels[: max(len(levels) - skipped, 1)]:
            flow = self.solved(one, two, resize_flow(flow.detach(), (one.shape[-2], one.shape[-1])))
        return flow


class FeedForward(FlowModel):
    """A network shared by the levels of a pyramid: both frames, the second one warped, and the flow so far give its change."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, width, 5, padding=2), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2), nn.ReLU(),
            nn.Conv2d(width, 2, 3, padding=1),
        )  # fmt: skip

    def levels(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """The flow on each level, coarsest first."""
        flows = [torch.zeros_like(pyramid(first)[0]).repeat(1, 2, 1, 1)]
        for one, two in zip(pyramid(first), pyramid(second)):
            flow = resize_flow(flows[-1], (one.shape[-2], one.shape[-1]))
            flows.append(flow + self.layers(torch.cat([one, warp(two, flow), 0.1 * flow], 1)))
        return flows[1:]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.levels(first, second)[-1]

    def step_loss(self, first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
        return sum((level_loss(flow, truth) for flow in self.levels(first, second)), start=first.new_zeros(()))

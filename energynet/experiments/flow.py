"""Optical flow: an energy with learned corrections, its rivals, and the flow of a user's own frames."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from energynet import OneStepAdjoint
from energynet.energies import Effort, FlowCorrection

from .data import Data, Rows
from .data.flow_files import LabeledPair
from .data.flow_pairs import HELD_OUT, FlowPairs, gray
from .flow_classical import DIS, ILK, TVL1, Farneback, NoMotion
from .flow_models import (
    Differentiation,
    EnergyFlow,
    FeedForward,
    FixedPointFlow,
    FlowModel,
    HandEnergy,
    Implicit,
    Unrolled,
    end_point_error,
)
from .splits import Split
from .task import Column, FittedRival, Options, Rates, Rival, Task


@dataclass(frozen=True)
class FlowOptions(Options):
    """Optical flow."""

    frames: tuple[str, ...] = ()
    """Two pictures: their flow is computed with weights that are trained already, and written to --out."""
    ground_truth: str = ""
    """The true flow of these frames, a .flo file or a PNG of KITTI."""
    weights: str = ""
    """The folder of a trained run; none: the weights that the package contains."""
    pairs: int = 200
    """Generated pairs to train on."""
    judged: int = 6
    """Generated pairs, made of other pictures, that choose the round."""
    updates: int = 80
    minutes: float = 0.0
    every: int = 20
    patience: int = 0
    batch_size: int = 1
    folds: int | None = 1


@dataclass(frozen=True)
class FlowSize:
    """Where finished weights are; empty: in the package."""

    weights: str


class OpticalFlowTask(Task):
    """Optical flow: an energy with learned corrections, trained on generated pairs and tested on real ones.

    Without --data and --method, or with --frames, it computes a flow with weights that are trained already.
    """

    name = "flow"
    options_class = FlowOptions
    size_class = FlowSize
    choice = "epe"
    larger_is_better = False
    columns: ClassVar[Mapping[str, Column]] = {
        "epe": Column("EPE", 1, 3),
        "interval": Column("±", 1, 3),
        "far": Column("> 3 px and 5 %", 100),
    }
    options: FlowOptions
    pairs: FlowPairs

    @classmethod
    def rivals(cls) -> Sequence[Rival]:
        mine = (Trained(), EnergyOneStep(), EnergyTwoSteps(), FpiNnFromZero(), FpiNnOneStep(), Pyramid())
        return (*cls.usual(), *mine, NoMotion(), TVL1(), ILK(), DIS(), Farneback())

    @classmethod
    def usual(cls) -> Sequence[Rival]:
        return (Hand(), LearnedEnergy(), FpiNnFromEnergy())

    def load(self, folder: Path | None) -> Data:
        """Numbers of pairs: those are made or read when they are needed."""
        self.pairs = FlowPairs.of(folder)
        train = [*range(self.options.pairs), *range(HELD_OUT, HELD_OUT + self.options.judged)]
        test = [-1 - k for k in range(len(self.pairs.test))] or [HELD_OUT + self.options.judged + k for k in range(8)]
        return Data("generated" if folder is None else folder.name, _numbered(train), _numbered(test))

    def size(self, data: Data) -> FlowSize:
        return FlowSize(self.options.weights)

    def split(self, data: Data, seed: int) -> list[Split]:
        numbers = torch.arange(len(data.train))
        return [Split(numbers[: self.options.pairs], numbers[self.options.pairs :])]

    def draw(self, rows: Rows) -> Rows:
        """The frames ``(B, 2, H, W)`` of the rows and their flow, mirrored at random."""
        pairs = self._pairs(rows)
        frames = torch.stack([torch.cat([gray(pair.first), gray(pair.second)]) for pair in pairs])
        flow = torch.stack([pair.flow for pair in pairs])
        for dim in (-1, -2):
            if float(torch.rand(())) < 0.5:
                frames, flow = frames.flip(dim), flow.flip(dim)
                flow[:, -1 - dim] *= -1
        return Rows(frames.to(rows.inputs.device), flow.to(rows.inputs.device))

    def loss(self, output: Tensor, batch: Rows) -> Tensor:
        return end_point_error(output, batch.targets).mean()

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Rows) -> list["Answer"]:
        """The flow of each pair; the sizes may differ."""
        model.eval()
        answers = []
        for pair in self._pairs(rows):
            began = time.process_time()
            answers.append(Answer(self._flow(model, pair, rows.inputs.device), time.process_time() - began))
        return answers

    def _pairs(self, rows: Rows) -> list[LabeledPair]:
        return [self.pairs.cached(int(number)) for number in rows.inputs[:, 0]]

    def _flow(self, model: nn.Module, pair: LabeledPair, device: torch.device) -> Tensor:
        flow: Tensor = model(gray(pair.first)[None].to(device), gray(pair.second)[None].to(device))
        return flow[0].cpu()

    def evaluate(self, output: Sequence["Answer"], rows: Rows, calibration: Mapping[str, float]) -> dict[str, float]:
        """Means over pairs of the end-point error, with half its 95 % interval, of the share of pixels that are off by more than
        3 pixels and 5 %, and of the processor's seconds; the end-point error of each pair.
        """
        pairs = self._pairs(rows)
        each = [{**pair_figures(answer.flow, pair), "seconds": answer.seconds} for answer, pair in zip(output, pairs)]
        means = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
        listed = {f"epe/{pair.name}": one["epe"] for one, pair in zip(each, pairs)}
        spread = torch.tensor([one["epe"] for one in each], dtype=torch.float64)
        interval = 1.96 * float(spread.std()) / len(each) ** 0.5 if len(each) > 1 else 0.0
        return {**means, "interval": interval, **listed}

    def pictures(self, model: nn.Module, data: Data, folder: Path) -> None:
        """The flow of some training pairs beside the true one."""
        from .flow_pictures import comparison, save_picture

        for number in data.train.inputs[:2, 0]:
            pair = self.pairs.cached(int(number))
            flow = self._flow(model, pair, data.train.inputs.device)
            save_picture(folder / f"{pair.name}.png", comparison(pair, flow))

    def use(self, out: Path | None, *, named: bool, say: Callable[[str], None]) -> bool:
        if named and not self.options.frames:
            return False
        from .flow_use import show

        frames, truth, weights = self.options.frames, self.options.ground_truth, self.options.weights
        show([Path(name) for name in frames], Path(truth) if truth else None, Path(weights) if weights else None,
             out or Path("flow"), say)  # fmt: skip
        return True


@dataclass(frozen=True)
class Answer:
    """The flow of a pair, and what it cost."""

    flow: Tensor  # (2, H, W)
    seconds: float
    """Of the processor."""


def pair_figures(flow: Tensor, pair: LabeledPair) -> dict[str, float]:
    """The figures of one pair, over the pixels whose flow is known."""
    error = end_point_error(flow[None], pair.flow[None])[0][pair.valid]
    length = torch.linalg.vector_norm(pair.flow, dim=0)[pair.valid]
    return {"epe": float(error.mean()), "far": float(((error > 3) & (error > 0.05 * length)).double().mean())}


def _numbered(numbers: Sequence[int]) -> Rows:
    column = torch.tensor(numbers, dtype=torch.long)[:, None]
    return Rows(column, column)


class Hand(FittedRival):
    """The energy as it was written by hand."""

    name = "hand-energy"

    def build(self, size: object) -> nn.Module:
        return HandEnergy(Effort())

    def fit(self, model: nn.Module, rows: Rows, rates: Rates, seed: int) -> None:
        """Nothing is learned."""


class Trained(FittedRival):
    """The energy with the weights that the package contains, or those of the run in --weights."""

    name = "trained"

    def build(self, size: FlowSize) -> nn.Module:
        from .flow_use import trained

        return trained(Path(size.weights) if size.weights else None)

    def fit(self, model: nn.Module, rows: Rows, rates: Rates, seed: int) -> None:
        """Nothing is learned."""


def step_loss(model: nn.Module, batch: Rows) -> Tensor:
    """The loss of a model on one level of a batch of frames."""
    assert isinstance(model, FlowModel)
    first, second = batch.inputs.split(1, 1)
    return model.step_loss(first, second, batch.targets)


def learned(how: Differentiation) -> nn.Module:
    """The energy with an untrained correction."""
    return EnergyFlow(FlowCorrection(), how, Effort())


class TrainedOnSteps(Rival):
    """What is trained on the steps of an estimate, level by level, at one rate."""

    rates = Rates(learning_rate=2e-3, weight_decay=0.0)

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        return step_loss(model, batch)


class LearnedEnergy(TrainedOnSteps):
    """The energy, its weights corrected by a small network, with exact implicit gradients on each level."""

    name = "energy"

    def build(self, size: object) -> nn.Module:
        return learned(Implicit())


class EnergyOneStep(TrainedOnSteps):
    """`energy` with the gradient of the last round of lagged weights only."""

    name = "energy-one-step"

    def build(self, size: object) -> nn.Module:
        return learned(Unrolled(1))


class EnergyTwoSteps(TrainedOnSteps):
    """`energy` with the gradient of the last two rounds of lagged weights."""

    name = "energy-two-steps"

    def build(self, size: object) -> nn.Module:
        return learned(Unrolled(2))


class FpiNnFromEnergy(TrainedOnSteps):
    """`FPI_NN`: an update network over a local cost volume, started from the energy's answer, with exact implicit gradients."""

    name = "fpi-nn"

    def build(self, size: object) -> nn.Module:
        return FixedPointFlow(FixedPointFlow.exact(), from_zero=False)


class FpiNnOneStep(TrainedOnSteps):
    """`fpi-nn` with the gradient of a single step at the answer."""

    name = "fpi-nn-one-step"

    def build(self, size: object) -> nn.Module:
        return FixedPointFlow(OneStepAdjoint(), from_zero=False)


class FpiNnFromZero(TrainedOnSteps):
    """`fpi-nn` on each level of a pyramid, started from no motion on the coarsest."""

    name = "fpi-nn-from-zero"

    def build(self, size: object) -> nn.Module:
        return FixedPointFlow(FixedPointFlow.exact(), from_zero=True)


class Pyramid(TrainedOnSteps):
    """A feed-forward network on each level of a pyramid, which sees both frames, the second one warped (as SPyNet)."""

    name = "pyramid"

    def build(self, size: object) -> nn.Module:
        return FeedForward()

"""Multi-label classification: the task, and its rivals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from energynet import NeumannAdjoint, OneStepAdjoint
from energynet.losses import soft_f1

from .data import Data, Rows
from .data.multilabel import digits, load
from .metrics import best_threshold, decide, figures
from .models import ContractionClassifier, EnergyClassifier, Experts, Implicit, Logistic, Perceptron, Size, agreement
from .multilabel_rivals.rivals import RIVALS
from .sklearn_rivals import Chain, LogisticRegressions
from .task import Column, Options, Rates, Rival, Task

DIAGNOSED_ROWS = 256


@dataclass(frozen=True)
class MultiLabelOptions(Options):
    """Multi-label classification."""

    loss: Literal["bce", "f1"] = "bce"
    """Cross-entropy, or soft F1 with a little of it."""
    experts: int = 1
    """Networks whose scores a neural method combines."""
    hidden: int = 512
    """Hidden units of each network."""


class MultiLabel(Task):
    """Multi-label classification: an energy, a fixed-point network and their rivals under one protocol.

    Trains each method with each seed, prints a table, and writes figures, weights and curves into a folder.
    """

    name = "multilabel"
    options_class = MultiLabelOptions
    size_class = Size
    choice = "example_f1"
    columns: ClassVar[Mapping[str, Column]] = {
        "example_f1": Column("ex-F1", 100),
        "micro_f1": Column("mi-F1", 100),
        "macro_f1": Column("ma-F1", 100),
        "exact_match": Column("exact", 100),
    }
    options: MultiLabelOptions

    @classmethod
    def rivals(cls) -> Sequence[Rival]:
        return (*cls.usual(), FpiGdOneStep(), FpiGdTruncated(), *RIVALS)

    @classmethod
    def usual(cls) -> Sequence[Rival]:
        return (FpiGd(), FpiNn(), Mlp(), LinearLayer(), LogisticRegressions(), Chain())

    @classmethod
    def first_look(cls) -> MultiLabelOptions:
        return MultiLabelOptions(updates=200, every=25, hidden=128)

    def load(self, folder: Path | None) -> Data:
        return digits() if folder is None else load(folder)

    def size(self, data: Data) -> Size:
        widths = data.train.inputs.shape[1], data.train.targets.shape[1]
        return Size(*widths, self.options.experts, self.options.hidden)

    def loss(self, output: Tensor, batch: Rows) -> Tensor:  # (B, L) -> ()
        function = cross_entropy if self.options.loss == "bce" else soft_f1_loss
        return function(output, batch.targets)

    def calibrate(self, output: Tensor, rows: Rows) -> dict[str, float]:
        return {"threshold": best_threshold(output, rows.targets)[0]}

    def evaluate(self, output: Tensor, rows: Rows, calibration: Mapping[str, float]) -> dict[str, float]:
        return figures(decide(output, calibration["threshold"]), rows.targets)


class Mlp(Rival):
    """A perceptron with one hidden layer and dropout, or the mean of several."""

    name = "mlp"

    def build(self, size: Size) -> nn.Module:
        return Perceptron(size)

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        return experts_loss(model, batch, task)


class LinearLayer(Rival):
    """One linear score per label, trained as the networks are; `weight_decay` is 1/C of scikit-learn.

    The penalty enters the gradient, so that the minimum is that of scikit-learn's LogisticRegression. A decay that is
    decoupled from Adam's scaling leads elsewhere (333 rows of Bibtex: 5 points of example-F1 lower).
    """

    name = "logistic"
    rates = Rates(learning_rate=3e-2, weight_decay=0.3)
    grid: ClassVar[Sequence[Rates]] = tuple(Rates(3e-2, decay) for decay in (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03))

    def build(self, size: Size) -> nn.Module:
        return Logistic(size)

    def optimizer(self, model: nn.Module, rates: Rates, num_rows: int) -> torch.optim.Optimizer:
        assert isinstance(model, Logistic)
        penalized = {"params": [model.scores.weight], "weight_decay": rates.weight_decay / num_rows}
        free = {"params": [model.scores.bias], "weight_decay": 0.0}
        return torch.optim.Adam([penalized, free], lr=rates.learning_rate)


class FpiGd(Rival):
    """`FPI_GD` on the strongly convex multi-label energy over the experts' scores, with exact implicit gradients."""

    name = "fpi-gd"

    def build(self, size: Size) -> nn.Module:
        return EnergyClassifier(size)

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        return experts_loss(model, batch, task)

    def diagnose(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        assert isinstance(model, EnergyClassifier)
        error = agreement(model, rows.inputs[:DIAGNOSED_ROWS])
        median, high = torch.quantile(error, torch.tensor([0.5, 0.99], dtype=error.dtype, device=error.device)).tolist()
        return {**spectrum(model, rows), "agreement_median": median, "agreement_99th_percentile": high}


class FpiGdOneStep(Rival):
    """`fpi-gd` with the gradient of a single step at the answer (Fung et al. 2022) in place of the exact one."""

    name = "fpi-gd-one-step"

    def build(self, size: Size) -> nn.Module:
        return EnergyClassifier(size, OneStepAdjoint())

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        return experts_loss(model, batch, task)

    def diagnose(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        return spectrum(model, rows)


class FpiGdTruncated(Rival):
    """`fpi-gd` with the first three terms of the Neumann series (Geng et al. 2021) in place of the exact gradient."""

    name = "fpi-gd-truncated"

    def build(self, size: Size) -> nn.Module:
        return EnergyClassifier(size, NeumannAdjoint(terms=3))

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        return experts_loss(model, batch, task)

    def diagnose(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        return spectrum(model, rows)


class FpiNn(Rival):
    """`FPI_NN` on a contracting network over the experts' scores, with exact implicit gradients."""

    name = "fpi-nn"

    def build(self, size: Size) -> nn.Module:
        return ContractionClassifier(size)

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        return experts_loss(model, batch, task)

    def diagnose(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        return spectrum(model, rows)


def experts_loss(model: nn.Module, batch: Rows, task: Task) -> Tensor:
    """The loss of the answer plus that of each expert.

    Each expert learns from its own loss, what combines them from the loss of the answer: through the joint loss the
    experts would grow alike (held-out rows of Bibtex: 0.2 points of example-F1 worse for each loss).
    """
    assert isinstance(model, Experts)
    experts = model.features(batch.inputs)
    answer = task.loss(model.combine(experts.detach()), batch)
    return sum((task.loss(expert, batch) for expert in experts.unbind(1)), start=answer)


def spectrum(model: nn.Module, rows: Rows) -> dict[str, float]:
    """The spectral radius of the iteration at the answers of some rows: mean and largest."""
    assert isinstance(model, Implicit)
    radius = model.eval().spectral_radius(rows.inputs[:DIAGNOSED_ROWS])
    return {"spectral_radius": radius.mean().item(), "largest_spectral_radius": radius.amax().item()}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:  # (B, L), (B, L) -> ()
    """Binary cross-entropy summed over labels, averaged over rows.

    >>> cross_entropy(torch.zeros(2, 1), torch.ones(2, 1))
    tensor(0.6931)
    """
    return nn.functional.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]


def soft_f1_loss(logits: Tensor, labels: Tensor) -> Tensor:  # (B, L), (B, L) -> ()
    """One minus the F1 of the probabilities, row by row, plus a little cross-entropy to keep gradients alive."""
    return 0.03 * cross_entropy(logits, labels) + (1 - soft_f1(logits.sigmoid(), labels)).mean()

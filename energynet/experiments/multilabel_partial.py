"""Partial labels: a part of the labels of each row is revealed, and the others are predicted."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from energynet import Anderson, Energy, Solution, Termination, fixed_point

from .data import Data, Rows
from .metrics import best_threshold, figures
from .models import Size
from .multilabel import MultiLabel, MultiLabelOptions
from .multilabel_rivals.base import FeatureNetwork
from .sklearn_rivals import Chain, LinearScores
from .solves import SolveLog
from .task import Column, FittedRival, Rates, Rival, Task

SHARES = (0.1, 0.25, 0.5, 0.75)
CERTAIN = 12.0
"""The logit of a label that is known."""
SOLVE = Termination(atol=1e-4, rtol=1e-4, max_steps=200)


class PartialLabels(Task):
    """Partial labels: 10, 25, 50 and 75 % of the labels of each row are revealed, and the others are predicted.

    Every method is trained once; the same positions, drawn at random, are revealed to all of them. Figures are those of the
    hidden positions: example-F1, with a threshold per share that held-out rows choose, and the log-loss per label.
    """

    name = "multilabel-partial"
    options_class = MultiLabelOptions
    size_class = Size
    choice = "f1_50"
    columns: ClassVar[Mapping[str, Column]] = {
        **{f"f1_{share * 100:.0f}": Column(f"F1, {share:.0%}", 100) for share in SHARES},
        **{f"log_loss_{share * 100:.0f}": Column(f"log-loss, {share:.0%}", 100, 2) for share in SHARES},
    }
    options: MultiLabelOptions

    @classmethod
    def rivals(cls) -> Sequence[Rival]:
        return (PairwiseEnergy(), PlainMlp(), MaskedMlp(), PartialChain())

    @classmethod
    def first_look(cls) -> MultiLabelOptions:
        return MultiLabel.first_look()

    def load(self, folder: Path | None) -> Data:
        return MultiLabel(self.options).load(folder)

    def size(self, data: Data) -> Size:
        return MultiLabel(self.options).size(data)

    def loss(self, output: Tensor, batch: Rows) -> Tensor:
        return MultiLabel(self.options).loss(output, batch)

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Rows) -> Tensor:  # -> (N, shares, L)
        """Logits for each share, NaN where a label was revealed."""
        assert isinstance(model, PartialModel)
        model.eval()
        answers = []
        for known in reveal(rows.targets):
            parts = zip(*(t.split(512) for t in (rows.inputs, known, rows.targets * known)), strict=True)
            logits = torch.cat([model.complete(*part) for part in parts])
            answers.append(logits.masked_fill(known.bool(), torch.nan))
        return torch.stack(answers, 1)

    def calibrate(self, output: Tensor, rows: Rows) -> dict[str, float]:
        """A threshold per share."""
        found = {}
        for share, logits in zip(SHARES, output.unbind(1), strict=True):
            hidden, logits = ~logits.isnan(), logits.nan_to_num(-CERTAIN)
            found[f"threshold_{share * 100:.0f}"] = best_threshold(logits, rows.targets * hidden)[0]
        return found

    def evaluate(self, output: Tensor, rows: Rows, calibration: Mapping[str, float]) -> dict[str, float]:
        told = {}
        for share, logits in zip(SHARES, output.unbind(1), strict=True):
            hidden, name = ~logits.isnan(), f"{share * 100:.0f}"
            decided = (logits.sigmoid() > calibration[f"threshold_{name}"]) & hidden
            told[f"f1_{name}"] = figures(decided, rows.targets * hidden)["example_f1"]
            losses = nn.functional.binary_cross_entropy_with_logits(logits[hidden], rows.targets[hidden])
            told[f"log_loss_{name}"] = losses.item()
        return told


def reveal(labels: Tensor) -> list[Tensor]:  # (N, L) -> shares × (N, L)
    """Which labels are revealed, 1 or 0: the same number in each row, more for each share, drawn with a fixed seed."""
    order = torch.rand(labels.shape, generator=torch.Generator().manual_seed(len(labels))).argsort(1).to(labels.device)
    return [(order < round(share * labels.shape[1])).to(labels.dtype) for share in SHARES]


class PartialModel(nn.Module, ABC):
    """A model that can be told some labels."""

    @abstractmethod
    def complete(self, z: Tensor, known: Tensor, labels: Tensor) -> Tensor:  # (B, D), (B, L), (B, L) -> (B, L)
        """Logits of all labels, given those that are known: `labels` where `known` is 1; zero elsewhere."""


class Plain(PartialModel):
    """A perceptron that takes no notice of what is known."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.features = FeatureNetwork(size)

    def forward(self, z: Tensor) -> Tensor:  # (B, D) -> (B, L)
        scores: Tensor = self.features(z)[1]
        return scores

    def complete(self, z: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        return self(z)


class Masked(PartialModel):
    """A perceptron that is given the known labels, 1 or −1, and 0 for the others, beside the features."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.features = FeatureNetwork(size)
        self.told = nn.Linear(size.num_labels, size.hidden, bias=False)

    def complete(self, z: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        dropout, linear, *rest = self.features.body
        hidden = linear(dropout(z)) + self.told(known * (2 * labels - 1))
        for layer in rest:
            hidden = layer(hidden)
        scores: Tensor = self.features.head(hidden)
        return scores


class Pairs(Energy):
    r"""The free energy of independent labels y = σ(u) that act on each other in pairs:

    .. math::
        E(u; s) = -s^\top y - \tfrac12 y^\top M y - H(y), \quad M = M^\top, \; M_{ii} = 0.

    It is stationary at u = s + M y, the fixed point of a mirror descent step of size 1, `step`. With y known, s + M y are the
    logits of each label given all others. Labels that are known stay as they are in every step.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.pairs = nn.Parameter(torch.zeros(num_labels, num_labels))
        self.bias, self.scale = nn.Parameter(torch.zeros(num_labels)), nn.Parameter(torch.ones(()))

    def matrix(self) -> Tensor:  # (L, L)
        """M."""
        return self.pairs.triu(1) + self.pairs.triu(1).T

    def local(self, scores: Tensor) -> Tensor:  # (B, L) -> (B, L)
        """s, from the scores of a network."""
        return self.scale * scores + self.bias

    def encode(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return self.local(scores), self.matrix()

    def evaluate(self, u: Tensor, local: Tensor, matrix: Tensor) -> Tensor:  # (B, L), (B, L), (L, L) -> (B,)
        y = u.sigmoid()
        entropy = nn.functional.softplus(u) - u * y
        return -((local + 0.5 * y @ matrix) * y + entropy).sum(-1)

    @staticmethod
    def step(u: Tensor, local: Tensor, matrix: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        """s + M y with y = σ(u), but the label where it is known; there the logit is that of certainty."""
        moved = local + torch.lerp(u.sigmoid(), labels, known) @ matrix
        return torch.lerp(moved, CERTAIN * (2 * labels - 1), known)


class Clamped(PartialModel):
    """The minimizer of a pairwise energy over label logits, with known labels clamped, as a fixed point.

    On 256 rows of Bibtex the fixed point takes 4 steps and 0.02 CPU seconds, and the same minimum by `minimize` with known
    labels held by ``Box(value, value)`` takes 10 steps of `ProjectedLBFGS` and 4 seconds.

    The energy learns by the pseudo-likelihood of the true labels, each given all others, and knows nothing of which will be
    revealed. It learns over scores of networks that have not seen the row: two are trained on a half of the rows each, and
    score the other half. Over fitted scores, which leave nothing for the pairs to explain, the log-loss on held-out rows of
    Bibtex was 8 % worse (50 % revealed, after 1,000 updates).

    Source: Besag (1975), Statistical analysis of non-lattice data, on pseudo-likelihood.
    """

    probe: Tensor  # (D,)

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.features, self.energy, self.solves = FeatureNetwork(size), Pairs(size.num_labels), SolveLog()
        self.halves = nn.ModuleList(FeatureNetwork(size) for _ in range(2))
        self.register_buffer("probe", 10 * torch.randn(size.num_features))

    def complete(self, z: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        return self.solve(self.features(z)[1], known, labels).value

    def solve(self, scores: Tensor, known: Tensor, labels: Tensor) -> Solution:
        """The logits, and how the solve went."""
        local, matrix = self.energy.encode(scores)
        return self.solves.add(fixed_point(self.energy.step, local, local, matrix, known, labels, solver=Anderson(),
                                           termination=SOLVE, on_failure="warn"))  # fmt: skip

    def side(self, z: Tensor) -> Tensor:  # (B, D) -> (B, 1)
        """Which half of the rows each belongs to: a function of its features, as good as random."""
        return ((z @ self.probe).floor() % 2 == 0).unsqueeze(1)

    def seen_and_unseen(self, z: Tensor) -> tuple[Tensor, Tensor]:  # (B, D) -> 2 × (B, L)
        """Scores by the network that is trained on a row, and, without dropout and gradients, by the other."""
        first, second = (network(z)[1] for network in self.halves)
        self.halves.eval()
        with torch.no_grad():
            calm_first, calm_second = (network(z)[1] for network in self.halves)
        self.halves.train(self.training)
        side = self.side(z)
        return torch.where(side, first, second), torch.where(side, calm_second, calm_first)

    def conditional(self, scores: Tensor, labels: Tensor) -> Tensor:  # (B, L), (B, L) -> (B, L)
        """The logits of each label given all others."""
        return self.energy.local(scores) + labels @ self.energy.matrix()


class PlainMlp(Rival):
    """A perceptron as it is: what is revealed tells it nothing."""

    name = "mlp"

    def build(self, size: Size) -> nn.Module:
        return Plain(size)


class MaskedMlp(Rival):
    """A perceptron that is trained with revealed labels and their mask as further inputs; the share is drawn per row."""

    name = "mlp-masked"

    def build(self, size: Size) -> nn.Module:
        return Masked(size)

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        assert isinstance(model, Masked)
        share = torch.rand(len(batch), 1, device=batch.targets.device)
        known = (torch.rand_like(batch.targets) < share).to(batch.targets.dtype)
        return task.loss(model.complete(batch.inputs, known, batch.targets * known), batch)


class PairwiseEnergy(Rival):
    """An energy with label pairs, minimized with the revealed labels clamped; it is not trained for revealed labels."""

    name = "fpi-gd-pairs"

    def build(self, size: Size) -> nn.Module:
        return Clamped(size)

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        assert isinstance(model, Clamped)
        seen, unseen = model.seen_and_unseen(batch.inputs)
        answers = model.features(batch.inputs)[1], seen, model.conditional(unseen, batch.targets)
        return sum((task.loss(answer, batch) for answer in answers), start=batch.inputs.new_zeros(()))


class PartialScores(PartialModel):
    """A linear chain whose decisions are replaced by the labels that are known."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.scores = LinearScores(size)

    def complete(self, z: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        chain = self.scores
        scores, decided = z @ chain.weight.T + chain.bias, labels.clone()
        for label in range(scores.shape[1]):
            scores[:, label] += decided[:, :label] @ chain.coupling[label, :label]
            decided[:, label] = torch.where(known[:, label] > 0, labels[:, label], (scores[:, label] > 0).to(z.dtype))
        return scores


class PartialChain(FittedRival):
    """A classifier chain in the order of the labels, which takes a label that is known as it is, and decides the others."""

    name = "sklearn-chain"
    rates = Chain.rates
    grid: ClassVar[Sequence[Rates]] = Chain.grid

    def build(self, size: Size) -> nn.Module:
        return PartialScores(size)

    def fit(self, model: nn.Module, rows: Rows, rates: Rates, seed: int) -> None:
        assert isinstance(model, PartialScores)
        Chain().fit(model.scores, rows, rates, seed)

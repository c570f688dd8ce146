"""Training one classifier with one seed: the same loop, loss and averaging for every method."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from .data import MultiLabelData, Split, split_rows
from .metrics import best_threshold
from .models import Classifier, MethodName, Scores, Size, SolveCount, build


class LossName(StrEnum):
    """The losses by the names they have on the command line."""

    BCE = "bce"
    F1 = "f1"


@dataclass(frozen=True)
class Recipe:
    """How a run is trained; the same for every method. A resumed run must have the same recipe."""

    method: MethodName
    loss: LossName
    seed: int
    epochs: int
    experts: int = 1
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    averaging: float = 0.99  # of the exponential moving average of the weights


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch; `loss` and step counts are means over its training batches, None without a solve."""

    epoch: int
    loss: float
    held_out_f1: float
    threshold: float
    forward_steps: float | None = None
    adjoint_steps: float | None = None
    converged: float | None = None


@dataclass(frozen=True)
class Best:
    """The epoch that held-out rows chose, and its averaged weights."""

    epoch: Epoch
    weights: dict[str, Tensor]


def loss_function(name: LossName) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss by name: binary cross-entropy, or 1 − soft F1 plus 0.03 of it; cross-entropy is summed over labels.

    Args:
        name: which one.

    Returns:
        A function of logits (B, L) and labels (B, L) that gives a 0-d tensor.

    >>> loss_function(LossName.BCE)(torch.zeros(2, 1), torch.ones(2, 1))
    tensor(0.6931)
    """
    return cross_entropy if name is LossName.BCE else soft_f1_loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:  # (B, L), (B, L) -> ()
    """Binary cross-entropy summed over labels, averaged over rows."""
    return nn.functional.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]


def soft_f1_loss(logits: Tensor, labels: Tensor) -> Tensor:  # (B, L), (B, L) -> ()
    """One minus the F1 of the probabilities, row by row, plus a little cross-entropy to keep gradients alive."""
    probabilities = logits.sigmoid()
    total = probabilities.sum(1) + labels.sum(1)
    soft_f1 = 2 * (probabilities * labels).sum(1) / total.clamp(min=1e-6)
    return 0.03 * cross_entropy(logits, labels) + (1 - soft_f1).mean()


def total_loss(loss_of: Callable[[Tensor, Tensor], Tensor], scores: Scores, labels: Tensor) -> tuple[Tensor, float]:
    """The loss to descend: that of the answer plus, where experts made it, that of each expert.

    Args:
        loss_of: a loss of logits (B, L) and labels (B, L).
        scores: the answer and its experts.
        labels: 0 or 1, shape (B, L).

    Returns:
        The sum, a 0-d tensor, and the loss of the answer alone, which is comparable between methods.
    """
    answer = loss_of(scores.logits, labels)
    experts = () if scores.experts is None else scores.experts.unbind(1)
    return sum((loss_of(expert, labels) for expert in experts), start=answer), answer.item()


class Trainer:
    """One run in progress: everything that the next epoch depends on, so that it can be saved and restored.

    Dropout and the order of the batches draw from PyTorch's global generator; `run_epoch` puts this run's state there
    and takes it back, so that runs do not disturb each other or the caller.

    Args:
        data: the data set; only its training rows are touched.
        recipe: how to train.
    """

    def __init__(self, data: MultiLabelData, recipe: Recipe) -> None:
        self.data, self.recipe = data, recipe
        self.size = Size(data.features.shape[1], data.labels.shape[1], recipe.experts)
        self.split: Split = split_rows(len(data.features), recipe.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = build(recipe.method, self.size)
            self.averaged = build(recipe.method, self.size).eval()
            self.rng_state = torch.get_rng_state()
        self.averaged.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.num_updates = 0
        self.history: list[Epoch] = []
        self.best: Best | None = None

    def run_epoch(self, on_batch: Callable[[], None] = lambda: None) -> Epoch:
        """Train one epoch and judge the averaged weights on the held-out rows.

        Args:
            on_batch: called after each batch, for a progress bar.

        Returns:
            The epoch's figures, which are also appended to `history`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.rng_state)
            tally = self._train(on_batch)
            self.rng_state = torch.get_rng_state()
        threshold, f1 = best_threshold(self.logits(self.split.held_out), self.data.labels[self.split.held_out])
        epoch = tally.epoch(len(self.history) + 1, f1, threshold)
        self.history.append(epoch)
        if self.best is None or f1 > self.best.epoch.held_out_f1:
            self.best = Best(epoch, {name: value.clone() for name, value in self.averaged.state_dict().items()})
        return epoch

    def logits(self, rows: Tensor) -> Tensor:  # (N,) -> (N, L)
        """Score training rows by the averaged weights."""
        return predict(self.averaged, self.data.features[rows])

    def best_model(self) -> Classifier:
        """The classifier of the chosen epoch.

        Raises:
            RuntimeError: before the first epoch.
        """
        if self.best is None:
            raise RuntimeError("no epoch has been trained yet; call run_epoch first.")
        model = build(self.recipe.method, self.size).eval()
        model.load_state_dict(self.best.weights)
        return model

    @property
    def num_batches(self) -> int:
        """The number of batches per epoch."""
        return -(-len(self.split.fit) // self.recipe.batch_size)

    def _train(self, on_batch: Callable[[], None]) -> "_Tally":
        self.model.train()
        loss_of, tally = loss_function(self.recipe.loss), _Tally()
        order = self.split.fit[torch.randperm(len(self.split.fit))]
        for rows in torch.split(order, self.recipe.batch_size):
            scores = self.model(self.data.features[rows])
            loss, answer_loss = total_loss(loss_of, scores, self.data.labels[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self._average()
            tally.add(answer_loss, scores.count, self.model.adjoint_steps())
            on_batch()
        return tally

    @torch.no_grad()
    def _average(self) -> None:
        self.num_updates += 1
        # The average's memory grows with its age, so that the random start is soon forgotten.
        decay = min(self.recipe.averaging, (1 + self.num_updates) / (10 + self.num_updates))
        for average, current in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            average.lerp_(current, 1 - decay)


@torch.no_grad()
def predict(model: Classifier, features: Tensor, *, batch_size: int = 512) -> Tensor:  # (N, D) -> (N, L)
    """Score rows in evaluation mode.

    Args:
        model: a classifier.
        features: inputs, shape (N, D).
        batch_size: rows scored at once.

    Returns:
        Logits, shape (N, L).
    """
    model.eval()
    return torch.cat([model(rows).logits for rows in torch.split(features, batch_size)])


class _Tally:
    """Means over the batches of one epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.forward: list[SolveCount] = []
        self.adjoint: list[float] = []

    def add(self, loss: float, forward: SolveCount | None, adjoint: float | None) -> None:
        self.losses.append(loss)
        self.forward += [forward] if forward is not None else []
        self.adjoint += [adjoint] if adjoint is not None else []

    def epoch(self, number: int, f1: float, threshold: float) -> Epoch:
        return Epoch(
            number, _mean(self.losses) or 0.0, f1, threshold, _mean([count.steps for count in self.forward]),
            _mean(self.adjoint), _mean([count.converged for count in self.forward]),
        )  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

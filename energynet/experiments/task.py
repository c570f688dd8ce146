"""What an experiment says of itself: a `Task`, and the `Rival`s that it compares."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .data import Data, Rows
from .splits import Split, draw_splits


@dataclass(frozen=True)
class Rates:
    """What `--tune` chooses for a method.

    `weight_decay` is that of AdamW unless the rival gives it another meaning, such as 1/C of scikit-learn.
    """

    learning_rate: float = 2e-3
    weight_decay: float = 0.01


GRID = tuple(Rates(rate, decay) for rate in (1e-3, 4e-3) for decay in (0.0, 0.5))
"""What `--tune` tries for every method that is trained by gradients."""


@dataclass(frozen=True)
class Options:
    """How every method of a task is trained. A task with options of its own inherits from this class."""

    updates: int = 4000
    """Updates of the weights at most."""
    minutes: float = 0.0
    """Minutes of training per run at most; 0: no limit."""
    every: int = 50
    """Updates per round; after each round the held-out rows are judged."""
    patience: int = 15
    """Stop after this many rounds without a better held-out figure; 0: never."""
    batch_size: int = 64
    """Rows per update."""
    learning_rate: float | None = None
    """Of AdamW; none: the method's own."""
    weight_decay: float | None = None
    """Of AdamW; none: the method's own."""
    final_rate: float = 0.1
    """The share of the learning rate that is left after all updates (cosine decay)."""
    clip: float = 10.0
    """The largest norm of a gradient; longer ones are shortened. 0: never."""
    averaging: float = 0.99
    """The decay of the moving average of the weights."""
    held_out: float = 0.1
    """The share of the training rows that chooses round, threshold and rates."""
    train_share: float = 1.0
    """The share of the training rows that is used at all, drawn with the seed."""
    folds: int | None = None
    """Cross-validate on this many parts instead, and fit all rows again; none: 5 below 1,000 rows."""

    def rates(self, rival: "Rival") -> Rates:
        """The rates of a rival, unless the options give others."""
        own = rival.rates
        rate = own.learning_rate if self.learning_rate is None else self.learning_rate
        return Rates(rate, own.weight_decay if self.weight_decay is None else self.weight_decay)


@dataclass(frozen=True)
class NoSize:
    """The models of a task that are all of one size."""


@dataclass(frozen=True)
class Column:
    """One column of a task's table: its heading, and how a figure is written.

    >>> Column("ex-F1", scale=100).write(0.4725)
    '47.2'
    """

    heading: str
    scale: float = 1.0
    digits: int = 1

    def write(self, value: float) -> str:
        """The figure in the column's unit."""
        return f"{self.scale * value:.{self.digits}f}"


class Task(ABC):
    """One experiment: data, rivals, loss, figures. Subclasses are final.

    Args:
        options: an instance of the class's `options_class`.
    """

    name: ClassVar[str]
    """What the task is called in tables and folders."""
    options_class: ClassVar[type[Options]] = Options
    """The dataclass of its options; each field is an option of the command line."""
    size_class: ClassVar[type] = NoSize
    """The dataclass that `size` returns."""
    choice: ClassVar[str]
    """The figure of `evaluate` by which held-out rows choose round and rates."""
    larger_is_better: ClassVar[bool] = True
    """The direction of `choice`."""
    columns: ClassVar[Mapping[str, Column]]
    """Which figures the table shows, and how."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @classmethod
    @abstractmethod
    def rivals(cls) -> Sequence["Rival"]:
        """Everything that is compared."""

    @classmethod
    def usual(cls) -> Sequence["Rival"]:
        """Those that run when no method is named; all of them, unless a task says otherwise."""
        return cls.rivals()

    @classmethod
    def first_look(cls) -> Options:
        """The options where no data set is named: a budget that ends soon, if a task says so."""
        return cls.options_class()

    @abstractmethod
    def load(self, folder: Path | None) -> Data:
        """Read the data set in a folder that the user names, or the embedded default."""

    def size(self, data: Data) -> Any:
        """What a rival must know to build its model: a frozen dataclass of numbers, an instance of `size_class`."""
        return NoSize()

    @abstractmethod
    def loss(self, output: Any, batch: Rows) -> Tensor:
        """The training loss, a mean over the rows of the batch, 0-d."""

    @abstractmethod
    def evaluate(self, output: Any, rows: Rows, calibration: Mapping[str, float]) -> dict[str, float]:
        """The figures of a model's output on some rows."""

    def calibrate(self, output: Any, rows: Rows) -> dict[str, float]:
        """Numbers that held-out rows choose after training, such as a threshold; none by default."""
        return {}

    def split(self, data: Data, seed: int) -> list[Split]:
        """Which training rows are held out: one split, or several to cross-validate on."""
        options = self.options
        return draw_splits(len(data.train), seed, share=options.train_share, fraction=options.held_out, folds=options.folds)

    def draw(self, rows: Rows) -> Rows:
        """A training batch made of the rows drawn: add noise or crop here; PyTorch's generator is seeded."""
        return rows

    @torch.no_grad()
    def predict(self, model: nn.Module, rows: Rows) -> Any:
        """The model's output on rows, in evaluation mode."""
        model.eval()
        return torch.cat([model(inputs) for inputs in torch.split(rows.inputs, 512)])

    def predict_test(self, model: nn.Module, rows: Rows) -> Any:
        """The model's output on test rows, if more is asked of it there than on held-out ones."""
        return self.predict(model, rows)

    def pictures(self, model: nn.Module, data: Data, folder: Path) -> None:
        """Draw what the finished model does on training rows into a folder; nothing by default."""

    def use(self, out: Path | None, *, named: bool, say: Callable[[str], None]) -> bool:
        """Apply finished weights, in place of training, where the options ask for that.

        Args:
            out: the folder for results, if one is named.
            named: whether the command line names data or methods; a task may show what it can do where it names neither.
            say: prints a line.

        Returns:
            Whether anything was done; if not, methods are trained and compared.

        Raises:
            OSError, ValueError: if a file cannot be used; the message is printed without a traceback.
        """
        return False

    def better(self, one: float, other: float) -> bool:
        """Whether the first value of the chosen figure is strictly better."""
        return one > other if self.larger_is_better else one < other


class Rival(ABC):
    """One method: a name, how its model is built and, where it has one, its own training loss. Subclasses are final."""

    name: ClassVar[str]
    """What it is called in tables and on the command line."""
    rates: ClassVar[Rates] = Rates()
    """Its own learning rate and weight decay, used without `--tune`."""
    grid: ClassVar[Sequence[Rates]] = GRID
    """What `--tune` tries."""

    @abstractmethod
    def build(self, size: Any) -> nn.Module:
        """An untrained model, its weights drawn from PyTorch's global generator."""

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        """The loss of a batch; the task's loss of the model's output unless the method has its own."""
        return task.loss(model(batch.inputs), batch)

    def optimizer(self, model: nn.Module, rates: Rates, num_rows: int) -> torch.optim.Optimizer:
        """What updates the weights; the trainer scales the learning rates of all its groups by the same decay."""
        return torch.optim.AdamW(model.parameters(), lr=rates.learning_rate, weight_decay=rates.weight_decay)

    def diagnose(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        """Numbers about the trained model on held-out rows, such as a spectral radius; none by default."""
        return {}


class FittedRival(Rival):
    """A method that is fitted by itself, such as a model of scikit-learn; `build` makes a module that holds the result."""

    @abstractmethod
    def fit(self, model: nn.Module, rows: Rows, rates: Rates, seed: int) -> None:
        """Fit the rows and put the result into the model's buffers."""

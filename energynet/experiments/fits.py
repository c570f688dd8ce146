"""One model in training: its updates, its average, and the state from which it goes on."""

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from energynet import FPI_GD, FPI_NN, Compiled, ConvergenceWarning

from .data import Data
from .find import place_of
from .processes import Alone, Processes
from .solves import SolveCount, take_solves
from .task import FittedRival, Options, Rates, Rival, Task


@dataclass(frozen=True)
class Setup:
    """All that a run's result depends on."""

    task: Task
    data: Data
    rival: Rival
    rates: Rates
    seed: int
    processes: Processes = field(default_factory=Alone)
    compiled: bool = False

    @property
    def place(self) -> str:
        """What `--method` takes for the rival: its name, or its place where the task does not list it."""
        names = [rival.name for rival in self.task.rivals()]
        return self.rival.name if self.rival.name in names else place_of(type(self.rival))

    def build(self) -> nn.Module:
        """An untrained model on the device of the data; its weights are drawn from PyTorch's global generator."""
        model = self.rival.build(self.task.size(self.data)).to(self.data.train.inputs.device)
        if self.compiled:
            compile_model(model)
        return model


@dataclass
class Tally:
    """What the updates of one round gave."""

    losses: list[float] = field(default_factory=list)
    failed: int = 0
    solves: SolveCount = field(default_factory=SolveCount)

    @property
    def loss(self) -> float:
        """The mean loss; 0 without updates."""
        return sum(self.losses) / max(len(self.losses), 1)

    def add(self, loss: float, *, failed: bool) -> None:
        """Take in an update."""
        self.losses.append(loss)
        self.failed += failed

    @classmethod
    def sum(cls, tallies: Sequence["Tally"]) -> "Tally":
        """Several tallies as one."""
        losses = [loss for tally in tallies for loss in tally.losses]
        return cls(losses, sum(tally.failed for tally in tallies), SolveCount.mean([tally.solves for tally in tallies]))


class Fit(ABC):
    """A model that learns from some of the training rows; `judged` is the one that is evaluated."""

    judged: nn.Module
    num_updates: int = 0

    @abstractmethod
    def train(self, updates: int, on_update: Callable[[], None]) -> Tally:
        """Learn for so many updates."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that `train` depends on."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back."""

    @classmethod
    def of(cls, setup: Setup, rows: Tensor, part: int) -> "Fit":
        """The fit of a setup's rival on the training rows of these numbers; `part` tells the fits of a run apart."""
        if isinstance(setup.rival, FittedRival):
            return OwnFit(setup, setup.rival, rows)
        return GradientFit(setup, rows, part)


class OwnFit(Fit):
    """A rival that fits itself, at once."""

    def __init__(self, setup: Setup, rival: FittedRival, rows: Tensor) -> None:
        self.setup, self.rival, self.rows = setup, rival, rows
        self.judged = setup.build()

    def train(self, updates: int, on_update: Callable[[], None]) -> Tally:
        self.rival.fit(self.judged, self.setup.data.train[self.rows], self.setup.rates, self.setup.seed)
        return Tally()

    def state(self) -> dict[str, Tensor]:
        return dict(self.judged.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.judged.load_state_dict(state)


class GradientFit(Fit):
    """One model in training on some of the training rows.

    The order of the rows and all other random numbers are functions of the seed, the part and the number of updates, so
    nothing but tensors and that number need be saved, and runs do not disturb each other or the caller.

    Args:
        setup: what is trained and on what.
        rows: row numbers of the training rows.
        part: tells the fits of one run apart.
    """

    def __init__(self, setup: Setup, rows: Tensor, part: int) -> None:
        self.setup, self.rows, self.part = setup, rows, part
        with seeded(setup.seed, part, "start"):
            self.model = setup.build()
        self.averaged = AveragedModel(self.model, multi_avg_fn=_averaging(setup.task.options.averaging), use_buffers=True)
        self.optimizer = setup.rival.optimizer(self.model, setup.rates, len(rows))
        self.full_rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def judged(self) -> nn.Module:  # type: ignore[override]
        """The averaged weights."""
        return self.averaged.module

    def train(self, updates: int, on_update: Callable[[], None]) -> Tally:
        tally = Tally()
        self.model.train()
        rank = self.setup.processes.rank
        with seeded(self.setup.seed, self.part, self.num_updates, *([rank] if rank else [])):
            for _ in range(updates):
                self._update(tally)
                on_update()
        tally.solves = take_solves(self.model)
        return tally

    def state(self) -> dict[str, Tensor]:
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"averaged/{name}": value for name, value in self.averaged.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
        return tensors | {"num_updates": torch.tensor(self.num_updates)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(under(state, "model/"))
        self.averaged.load_state_dict(under(state, "averaged/"))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in under(state, "optimizer/").items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.num_updates = int(state["num_updates"])

    def _update(self, tally: Tally) -> None:
        task, options = self.setup.task, self.setup.task.options
        for group, rate in zip(self.optimizer.param_groups, self.full_rates):
            group["lr"] = rate * _decay(self.num_updates, options)
        rows, weight = self.setup.processes.share(self._batch_rows())
        batch = task.draw(self.setup.data.train[rows])
        with convergence_warnings() as failures:
            loss = self.setup.rival.training_loss(self.model, batch, task)
            self.optimizer.zero_grad()
            (weight * loss).backward()
        self.setup.processes.average_gradients(self.model)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip or math.inf)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.averaged.update_parameters(self.model)
        self.num_updates += 1
        tally.add(loss.item(), failed=bool(failures) or not finite)

    def _batch_rows(self) -> Tensor:
        """The next batch in the order of the present pass over the rows; the batches of a pass differ by at most one row."""
        size = self.setup.task.options.batch_size
        per_pass = -(-len(self.rows) // size)
        number, batch = divmod(self.num_updates, per_pass)
        order = torch.randperm(len(self.rows), generator=_generator(self.setup.seed, self.part, "pass", number))
        return self.rows[torch.tensor_split(order, per_pass)[batch]]


def compile_model(model: nn.Module) -> None:
    """Run the solves of a model as compiled programs; compile a model without solves as a whole."""
    layers = [module for module in model.modules() if isinstance(module, FPI_GD | FPI_NN)]
    for layer in layers:
        layer.driver = Compiled()
    if not layers:
        model.compile()


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """PyTorch's global generators seeded by a key within the block, and as they were after it."""
    with torch.random.fork_rng():
        torch.manual_seed(_generator(*key).initial_seed())
        yield


@contextmanager
def convergence_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the warnings of solves that did not converge; others are passed on."""
    failures: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield failures
    failures += [one for one in caught if issubclass(one.category, ConvergenceWarning)]
    for one in caught:
        if not issubclass(one.category, ConvergenceWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _decay(update: int, options: Options) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * min(update / options.updates, 1.0)))
    return options.final_rate + (1 - options.final_rate) * cosine


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    # The average's memory grows with its age, so that the first weights are soon forgotten.
    @torch.no_grad()
    def update(averages: Sequence[Tensor], currents: Sequence[Tensor], age: Tensor | int) -> None:
        weight = 1 - min(decay, (1 + int(age)) / (10 + int(age)))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(list(averages), list(currents), weight)
        else:
            for average, current in zip(averages, currents):
                average.copy_(current)

    return update


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

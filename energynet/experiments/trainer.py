"""Training one method with one seed: the same loop for every task and every method."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .data import Rows
from .fits import Fit, OwnFit, Setup, Tally, seeded
from .solves import take_solves
from .splits import Split


@dataclass(frozen=True)
class Round:
    """What one round gave. `loss` and steps are means over its updates, None without a solve; seconds add up."""

    round: int
    updates: int
    loss: float
    figures: dict[str, float]
    calibration: dict[str, float]
    forward_steps: float | None = None
    adjoint_steps: float | None = None
    converged: float | None = None
    failed: int = 0
    seconds: float = field(default=0.0, compare=False)
    memory_mib: float = field(default=0.0, compare=False)


class Trainer:
    """One run in progress: a fit for each split, judged together on the rows that they did not see.

    Args:
        setup: what is trained.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.splits: Sequence[Split] = setup.task.split(setup.data, setup.seed)
        self.fits = [Fit.of(setup, split.fit, part) for part, split in enumerate(self.splits)]
        self.history: list[Round] = []
        self.best: Round | None = None
        self.best_weights: dict[str, Tensor] = {}
        held_out = torch.cat([split.held_out for split in self.splits])
        self.held_out = setup.data.train[held_out]

    @property
    def finished(self) -> bool:
        """Whether the budget is spent or patience has run out; a method that fits itself has one round."""
        if not self.history or self.best is None:
            return False
        options, last = self.setup.task.options, self.history[-1]
        impatient = 0 < options.patience <= last.round - self.best.round
        late = 0 < 60 * options.minutes <= last.seconds
        return self.fitted_alone or impatient or late or last.updates >= options.updates

    @property
    def fitted_alone(self) -> bool:
        """Whether the rival fits itself."""
        return isinstance(self.fits[0], OwnFit)

    @property
    def still_rising(self) -> bool:
        """Whether the chosen round is the last one, so that more updates would likely help."""
        return self.best is not None and self.best == self.history[-1] and not self.fitted_alone

    def run_round(self, on_update: Callable[[], None] = lambda: None) -> Round:
        """Train each fit for one round and judge them; returns what is also appended to `history`."""
        began, options = time.perf_counter(), self.setup.task.options
        done = self.fits[0].num_updates
        updates = min(options.every, options.updates - done)
        tallies = [fit.train(updates, on_update) for fit in self.fits]
        seconds = time.perf_counter() - began + (self.history[-1].seconds if self.history else 0.0)
        seconds = self.setup.processes.agree(seconds)
        outputs = [self.predict(fit.judged, self.setup.data.train[split.held_out]) for fit, split in zip(self.fits, self.splits)]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        calibration = self.setup.task.calibrate(output, self.held_out)
        figures = self.setup.task.evaluate(output, self.held_out, calibration)
        whole = Tally.sum(tallies)
        one = Round(
            len(self.history) + 1, self.fits[0].num_updates, whole.loss, figures, calibration, whole.solves.forward_steps,
            whole.solves.adjoint_steps, whole.solves.converged, whole.failed, seconds, peak_memory_mib(),
        )  # fmt: skip
        self.history.append(one)
        choice = self.setup.task.choice
        if self.best is None or self.setup.task.better(figures[choice], self.best.figures[choice]):
            self.best = one
            self.best_weights = {name: value.clone() for name, value in self.fits[0].judged.state_dict().items()}
        return one

    def final_model(self, on_update: Callable[[], None] = lambda: None) -> nn.Module:
        """The model of the chosen round; after a cross-validation, one trained on all rows for as many updates.

        Raises:
            RuntimeError: before the first round.
        """
        if len(self.fits) == 1 or self.best is None:
            return self.chosen_model()
        split = self.splits[0]
        whole = Fit.of(self.setup, torch.cat([split.fit, split.held_out]).sort().values, len(self.fits))
        whole.train(self.best.updates, on_update)
        return whole.judged.eval()

    def chosen_model(self) -> nn.Module:
        """The model of the chosen round, on the rows of the first split.

        Raises:
            RuntimeError: before the first round.
        """
        if self.best is None:
            raise RuntimeError("no round has been trained yet; call run_round first.")
        with seeded(self.setup.seed):
            model = self.setup.build()
        model.load_state_dict(self.best_weights)
        return model.eval()

    def predict(self, model: nn.Module, rows: Rows) -> Any:
        """The model's output on rows; its solves do not count as those of training."""
        output = self.setup.task.predict(model, rows)
        take_solves(model)
        return output


def peak_memory_mib() -> float:
    """The most memory that this process has held so far: on the accelerator if it is used, otherwise in the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

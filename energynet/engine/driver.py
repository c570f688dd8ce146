"""Drivers, which run the loop; the one in this module runs it in Python."""

import dataclasses
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from energynet._torch.numbers import check_function, check_number, check_whole
from energynet.engine.binding import Binding
from energynet.engine.loop import RUNNING, LoopState
from energynet.engine.options import expect
from energynet.engine.tasks import Task
from energynet.step import Step

T = TypeVar("T")


class Driver(ABC):
    """Runs the loop. All drivers give the same results up to rounding."""

    @abstractmethod
    def bind(self, step: Step) -> Binding:
        """The step with its tensors as explicit inputs."""

    @abstractmethod
    def examined(self, binding: Binding, tensors: Any, examine: Callable[[], T]) -> T:
        """The result of ``examine()``, which a driver may cache for arguments of the same kind."""

    @abstractmethod
    def call(self, function: Task, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Evaluate the function on plain tensors."""


def _printed(steps: int, running: int, error: float) -> None:
    print(f"energynet: step {steps}, {running} still running, estimated distance {error:.2g}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Reports the progress of a long solve, for `Eager` only: a compiled program runs no Python code that could report it.

    Solves with ``trace=True`` or `UnrolledAdjoint` report no progress.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> seen = []
        >>> progress = Progress(seconds=0.0, show=lambda steps, running, error: seen.append((steps, running)))
        >>> x = minimize(lambda x: (x - 3).square().sum(-1), torch.zeros(2, 1), driver=Eager(progress=progress))
        >>> seen
        [(0, 2), (1, 0)]

    Args:
        seconds: the time between two reports, and before the first one, so that a short solve reports nothing.
        show: a function that is called with the largest number of steps taken so far, the number of running samples, and the
            largest estimated distance to the solution among them (for an adjoint solve, the residual). By default it prints a
            line to stderr.

    Raises:
        ValueError: if seconds < 0.
    """

    seconds: float = 2.0
    show: Callable[[int, int, float], None] = _printed

    def __post_init__(self) -> None:
        check_number(self, "seconds", "≥ 0", lambda v: v >= 0)
        check_function(self.show, "show")

    def watch(self) -> Callable[[LoopState], None]:
        """A callback that receives the states of one solve."""
        due = time.monotonic() + self.seconds

        def look(state: LoopState) -> None:
            nonlocal due
            if time.monotonic() < due:
                return
            running = state.status == RUNNING
            errors = state.error[running]
            self.show(int(state.steps.amax()) if state.steps.numel() else 0, int(running.sum()),
                      float(errors.amax()) if errors.numel() else 0.0)  # fmt: skip
            due = time.monotonic() + self.seconds

        return look


@dataclasses.dataclass(frozen=True)
class Eager(Driver):
    """Runs the loop in Python, one operation at a time: nothing is compiled, and any energy works.

    Once most samples of a large batch have finished, the remaining ones continue as a smaller batch.

    Example:
        >>> Eager(check_every=4)
        Eager(check_every=4, progress=None)

    Args:
        check_every: the number of updates between two checks whether any sample is still running, because each check
            synchronizes with an accelerator; None: 1 on a CPU, 8 elsewhere. Finished samples are frozen, so solutions and step
            counts do not depend on it.
        progress: reports the progress of solves that take several seconds; None: no reports, at no cost.

    Raises:
        ValueError: if check_every < 1.
    """

    check_every: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        expect(self.progress, Progress, "progress")
        check_whole(self, "check_every", optional=True)

    def bind(self, step: Step) -> Binding:
        return Binding.of(step)

    def examined(self, binding: Binding, tensors: Any, examine: Callable[[], T]) -> T:
        return examine()

    def call(self, function: Task, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        observe = None if self.progress is None else self.progress.watch()
        return function.checked(self.check_every, observe)(*tensors)

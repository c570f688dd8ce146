"""Who runs the loop: here, Python."""

import dataclasses
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from energynet.engine.binding import Binding
from energynet.engine.loop import RUNNING, LoopState
from energynet.engine.options import expect
from energynet.engine.tasks import Task
from energynet.step import Step

T = TypeVar("T")


class Driver(ABC):
    """Who runs the loop. The results are the same up to rounding."""

    @abstractmethod
    def bind(self, step: Step) -> Binding:
        """The step's tensors as inputs."""

    @abstractmethod
    def examined(self, binding: Binding, tensors: Any, examine: Callable[[], T]) -> T:
        """What a look at the user's function says, once for each kind of arguments if the driver can tell."""

    @abstractmethod
    def call(self, function: Task, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Evaluate the function on plain tensors."""


def _printed(steps: int, running: int, error: float) -> None:
    print(f"energynet: step {steps}, {running} still running, estimated distance {error:.2g}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Tells how a long solve is going, for `Eager`; a compiled program runs no Python that could tell.

    Solves with ``trace=True`` or `UnrolledAdjoint` do not tell.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> seen = []
        >>> progress = Progress(seconds=0.0, show=lambda steps, running, error: seen.append((steps, running)))
        >>> x = minimize(lambda x: (x - 3).square().sum(-1), torch.zeros(2, 1), driver=Eager(progress=progress))
        >>> seen
        [(0, 2), (1, 0)]

    Args:
        seconds: between two reports, and before the first one: a short solve tells nothing.
        show: called with the most steps that a sample has taken, how many samples still run, and the largest estimated distance
            to the answer among them (of an adjoint solve, the residual); by default it prints a line to stderr.

    Raises:
        ValueError: if seconds < 0.
    """

    seconds: float = 2.0
    show: Callable[[int, int, float], None] = _printed

    def __post_init__(self) -> None:
        if not self.seconds >= 0:
            raise ValueError(f"Progress needs seconds ≥ 0, got {self.seconds}.")

    def watch(self) -> Callable[[LoopState], None]:
        """Someone to be shown the states of one solve."""
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
    """Python runs the loop, one operation at a time: nothing is compiled, and any energy works.

    When most samples of a large batch have finished, the others continue alone.

    Example:
        >>> Eager(check_every=4)
        Eager(check_every=4, progress=None)

    Args:
        check_every: updates between two checks whether any sample is still running, since a check makes an accelerator wait;
            None: 1 on a CPU, 8 elsewhere. Finished samples are frozen, so answers and steps do not depend on it.
        progress: who tells how solves of several seconds are going; None: nobody, which costs nothing.

    Raises:
        ValueError: if check_every < 1.
    """

    check_every: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        expect(self.progress, Progress, "progress")
        if self.check_every is not None and self.check_every < 1:
            raise ValueError(f"Eager needs check_every ≥ 1 or None, got {self.check_every}.")

    def bind(self, step: Step) -> Binding:
        return Binding.of(step)

    def examined(self, binding: Binding, tensors: Any, examine: Callable[[], T]) -> T:
        return examine()

    def call(self, function: Task, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        observe = None if self.progress is None else self.progress.watch()
        return function.checked(self.check_every, observe)(*tensors)

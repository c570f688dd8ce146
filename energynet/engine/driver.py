"""Who runs the loop: here, Python."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from energynet.engine.binding import Binding
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


@dataclasses.dataclass(frozen=True)
class Eager(Driver):
    """Python runs the loop, one operation at a time: nothing is compiled, and any energy works.

    When most samples of a large batch have finished, the others continue alone.

    Example:
        >>> Eager(check_every=4)
        Eager(check_every=4)

    Args:
        check_every: updates between two checks whether any sample is still running, since a check makes an accelerator wait;
            None: 1 on a CPU, 8 elsewhere. Finished samples are frozen, so answers and steps do not depend on it.

    Raises:
        ValueError: if check_every < 1.
    """

    check_every: int | None = None

    def __post_init__(self) -> None:
        if self.check_every is not None and self.check_every < 1:
            raise ValueError(f"Eager needs check_every ≥ 1 or None, got {self.check_every}.")

    def bind(self, step: Step) -> Binding:
        return Binding.of(step)

    def examined(self, binding: Binding, tensors: Any, examine: Callable[[], T]) -> T:
        return examine()

    def call(self, function: Task, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return function.checked(self.check_every)(*tensors)

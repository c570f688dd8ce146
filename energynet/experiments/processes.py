"""Several processes that train one model, as ``accelerate launch -m energynet run ...`` starts them."""

import os
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Processes(ABC):
    """How a batch is shared and how gradients are put together; the result is that of one process with the whole batch."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, rows: Tensor) -> tuple[Tensor, float]:  # (B,) -> (b,)
        """The rows of this process, and the weight of their mean loss in the mean over all processes."""
        own = torch.tensor_split(rows, self.count)[self.rank]
        return (own, len(own) * self.count / len(rows)) if len(own) else (rows[:1], 0.0)

    @abstractmethod
    def average_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its mean over all processes."""

    @abstractmethod
    def agree(self, number: float) -> float:
        """The main process's number."""


class Alone(Processes):
    """One process."""

    def average_gradients(self, model: nn.Module) -> None:
        """Nothing to do."""

    def agree(self, number: float) -> float:
        return number


class Together(Processes):
    """The processes that accelerate has started."""

    def __init__(self) -> None:
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    def average_gradients(self, model: nn.Module) -> None:
        from accelerate.utils import reduce

        for parameter in model.parameters():
            if parameter.requires_grad:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = reduce(own, "mean")

    def agree(self, number: float) -> float:
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(number, dtype=torch.float64, device=self.device)))


def started_processes() -> Processes:
    """Those that `accelerate launch` or `torchrun` has started, or this one alone."""
    return Together() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()

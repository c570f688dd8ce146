"""What a solver is: a pure rule for moving, blind to tolerances and adjoints."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from energynet.problem import Problem


class Solver(ABC):
    """How to move. Stateless; `init` and `update` are pure functions on tensors of fixed shapes.

    A state is a named tuple with at least ``residual``, the optimality condition at the current point.
    """

    exact_residual: ClassVar[bool] = True
    """Whether ``state.residual`` was evaluated at the current point and not carried along by a recurrence."""

    @abstractmethod
    def init(self, problem: Problem, x0: Tensor) -> Any:
        """The state at ``x0``, ``(*batch, n)``."""

    @abstractmethod
    def update(self, problem: Problem, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next point and its state."""

    def breakdown(self, state: Any) -> Tensor:
        """``(*batch)`` bool: samples for which the solver cannot go on."""
        return torch.zeros(state.residual.shape[:-1], dtype=torch.bool, device=state.residual.device)

    def check(self, linear: bool, symmetric: bool) -> None:
        """Raise TypeError if such a problem lacks what this solver needs."""

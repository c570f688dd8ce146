"""What the solves of a model cost: the trainer reads it from the model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import nn

from energynet import AdjointReport, Solution


@dataclass(frozen=True)
class SolveCount:
    """Mean steps of the forward and of the adjoint solves, and the share of samples that converged; None without solves."""

    forward_steps: float | None = None
    adjoint_steps: float | None = None
    converged: float | None = None

    @classmethod
    def mean(cls, counts: Sequence["SolveCount"]) -> "SolveCount":
        """The means over those that know them."""
        names = [field.name for field in fields(cls)]
        return cls(*(mean([getattr(count, name) for count in counts]) for name in names))


class SolveLog:
    """Collects the solves of a model, which keeps it as its attribute `solves`; the trainer reads and empties it.

    Hand `report` to the adjoint, and each solution to `add`:

        self.solves = SolveLog()
        self.layer = FPI_GD(energy, adjoint=ImplicitAdjoint(report=self.solves.report))
        ...
        solution = self.solves.add(self.layer.solve(z))
    """

    def __init__(self) -> None:
        self.report = AdjointReport()
        self._steps: list[float] = []
        self._converged: list[float] = []

    def add(self, solution: Solution) -> Solution:
        """Take in a forward solve; returns it."""
        self.add_steps(solution.num_steps.double().mean().item(), solution.converged.double().mean().item())
        return solution

    def add_steps(self, steps: float, converged: float) -> None:
        """Take in a solve by its mean steps and the share of samples that converged."""
        self._steps.append(steps)
        self._converged.append(converged)

    def take(self) -> SolveCount:
        """The means since the last call."""
        adjoint = [record.num_steps.double().mean().item() for record in self.report.records]
        count = SolveCount(mean(self._steps), mean(adjoint), mean(self._converged))
        self.report.clear()
        self._steps, self._converged = [], []
        return count


def take_solves(model: nn.Module) -> SolveCount:
    """The solves of a model and of its parts since the last call."""
    logs = [log for module in model.modules() if isinstance(log := getattr(module, "solves", None), SolveLog)]
    return SolveCount.mean([log.take() for log in logs])


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

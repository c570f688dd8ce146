"""energynet, with each driver."""

from abc import ABC
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from energynet import FPI_GD, AdjointReport, Compiled, Driver, Eager, Energy, ImplicitAdjoint, Picard, Solver, Termination

from .. import ops
from ..harness import OURS
from ..work import Formula, Problem, Task, Work
from .torch_based import Differentiable, gradient


class Written(Energy):
    """The formula as an energy."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.formula.encode(ops.OURS, *inputs)

    def evaluate(self, x: Tensor, *code: Tensor) -> Tensor:
        energies: Tensor = self.formula.evaluate(ops.OURS, x, *code)
        return energies


class _Ours(Differentiable, ABC):
    """Gradient steps of the same length, or another solver, stopped by the distance; conjugate gradients backward."""

    def __init__(self, driver: Driver, solver: Solver | None = None) -> None:
        self.driver, self.forward_solver = driver, solver or Picard()

    def layer(self, work: Work, report: AdjointReport | None = None) -> FPI_GD:
        problem = work.problem
        backward = Termination(rtol=problem.adjoint_tolerance, max_steps=problem.max_steps)
        return FPI_GD(
            Written(problem.formula), work.step_size, start=problem.x0, solver=self.forward_solver, driver=self.driver,
            termination=Termination(atol=work.distance, rtol=0.0, max_steps=problem.max_steps),
            adjoint=ImplicitAdjoint(termination=backward, report=report),
        )  # fmt: skip

    def solver(self, work: Work) -> Callable[..., Tensor]:
        return self.layer(work)

    def steps(self, work: Work, task: Task) -> str:
        report = AdjointReport()
        layer = self.layer(work, report)
        forward = int(layer.solve(*work.problem.inputs).num_steps.max())
        if task is Task.FORWARD:
            return str(forward)
        gradient(layer, work.problem)
        return f"{forward} + {int(report.records[0].num_steps.max())}"

    def jacobian(self, solve: Callable[..., Tensor], problem: Problem) -> Any:
        (value,) = (problem.inputs[k] for k in problem.wanted)
        return torch.func.jacrev(lambda value: solve(*problem.with_wanted([value])))(value)

    def hessian(self, solve: Callable[..., Tensor], problem: Problem) -> Any:
        (value,) = (problem.inputs[k] for k in problem.wanted)
        return torch.func.hessian(lambda value: problem.loss(solve(*problem.with_wanted([value]))))(value)


class OursEager(_Ours):
    name: ClassVar[str] = "energynet eager"

    def __init__(self) -> None:
        super().__init__(Eager())


class OursCompiled(_Ours):
    """All tasks share the driver: the program of the forward is compiled once."""

    name: ClassVar[str] = OURS

    def __init__(self) -> None:
        super().__init__(Compiled(strict=True))

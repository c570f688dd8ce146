"""W1: one small problem, where everything is overhead."""

from typing import ClassVar

import torch

from .harness import Options
from .least_squares import LeastSquares, conditioned
from .work import Problem, Task
from .workload import FixedStepWorkload


class Single(FixedStepWorkload):
    name: ClassVar[str] = "W1"
    title: ClassVar[str] = "one problem, 32 unknowns, ½‖Ax - b‖² + 0.1 Σ log cosh x, A 40×32, float64, tol 1e-10"
    tasks: ClassVar[dict[Task, float | None]] = {
        Task.FORWARD: 0.03, Task.GRADIENT: 0.03, Task.JACOBIAN: 0.02, Task.HESSIAN: 0.1,
    }  # fmt: skip

    def problem(self, options: Options) -> Problem:
        torch.manual_seed(0)
        m, n = (6, 4) if options.quick else (40, 32)
        condition, tolerance = (3, 1e-4) if options.quick else (20, 1e-10)
        A = conditioned(m, n, condition, torch.float64, options.device)
        b = torch.randn(m, dtype=torch.float64).to(options.device)
        return Problem(LeastSquares(), A.new_zeros(n), (A, b), (1,), tolerance=tolerance, adjoint_tolerance=tolerance)

"""W2: a batch of small problems."""

from typing import ClassVar

import torch

from .harness import Options
from .least_squares import LeastSquares, conditioned
from .work import Problem, Task
from .workload import FixedStepWorkload


class Batch(FixedStepWorkload):
    name: ClassVar[str] = "W2"
    title: ClassVar[str] = "256 problems, 64 unknowns, shared A 80×64, own b, float32, tol 1e-5"
    tasks: ClassVar[dict[Task, float | None]] = {Task.FORWARD: 0.25, Task.GRADIENT: 0.15}

    def problem(self, options: Options) -> Problem:
        return batch(4, 8, options.device, condition=3, tolerance=1e-3) if options.quick else batch(256, 64, options.device)


def batch(size: int, n: int, device: str, *, condition: float = 20, tolerance: float = 1e-5) -> Problem:
    torch.manual_seed(0)
    m = n + n // 4
    A = conditioned(m, n, condition, torch.float32, device)
    b = torch.randn(size, m).to(device)
    return Problem(LeastSquares(), A.new_zeros(size, n), (A, b), (1,), tolerance=tolerance, adjoint_tolerance=tolerance)

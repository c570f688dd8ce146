"""What it saves that the last samples of a large batch go on alone: ``python -m tests.benchmarks.compaction``.

Batches of which a part needs thirty times the steps of the others, solved by the eager driver with and without it; medians in
float32, after a check that both give the same.
"""

import os
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from energynet import Picard, Solution, Termination, minimize

from . import command
from .hoisting import seconds

NEVER = 10**9


def energy(x: Tensor, z: Tensor, a: Tensor, A: Tensor) -> Tensor:
    """½ a ‖x − z‖² + 0.01 a Σ log cosh(x Aᵀ): the smaller a, the slower."""
    return (0.5 * a * (x - z).square() + 0.01 * a * torch.log(torch.cosh(x @ A.T))).sum(-1)


def problem(size: int, n: int, share: float) -> Callable[[], Solution]:
    generator = torch.Generator().manual_seed(0)
    z, A = torch.randn(size, n, generator=generator), torch.randn(n, n, generator=generator) / n
    a = torch.where(torch.rand(size, 1, generator=generator) < share, 0.02, 0.8)
    termination = Termination(atol=1e-4, rtol=0.0)
    return lambda: minimize(energy, torch.zeros_like(z), z, a, A, step_size=1.0, solver=Picard(), termination=termination)


def together(task: Callable[[], Solution]) -> Solution:
    """No sample goes on alone."""
    with mock.patch("energynet.engine.tasks.CROWD", NEVER), mock.patch("energynet.engine.loop.CROWD", NEVER):
        return task()


def main() -> None:
    parser = command.parser("compaction", __doc__)
    parser.add_argument("--repeats", type=command.positive, default=5)
    parser.add_argument("--sizes", type=command.positive, nargs="+", default=[1024, 4096, 16384])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, medians of {options.repeats}")
    for size in options.sizes:
        for share in (0.05, 0.4):
            task = problem(size, 64, share)
            apart, joint = task(), together(task)
            torch.testing.assert_close(apart.value, joint.value, rtol=1e-5, atol=1e-5)
            times = seconds([task, lambda task=task: together(task)], options.repeats, time.perf_counter)
            print(f"{size:6} samples, {share:4.0%} slow, {int(apart.num_steps.max())} steps: "
                  f"{times[0]:.2f} s, together {times[1]:.2f} s, ratio {times[0] / times[1]:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

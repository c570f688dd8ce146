"""What `Energy.encode` saves: ``python -m tests.benchmarks.hoisting``.

`StructuredEnergy` of the size of Bibtex (batch 80, 159 labels, 512 hidden units, 1,836 features), solved with its own `encode`
and with the same work done anew in every evaluation: first a fixed number of gradient steps, then a solve to default
tolerances with its gradient; the last way is compiled as well. Medians in float32, after a check that all give the same.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from energynet import Compiled, Driver, Eager, Picard, Termination, minimize
from energynet.energies import StructuredEnergy

from . import command


class Concatenated(nn.Module):
    """The same energy with one weight on [z; σ(u)], as the formula is usually written."""

    def __init__(self, energy: StructuredEnergy) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([energy.features.weight, energy.labels.weight], 1).detach())
        self.bias = nn.Parameter(energy.features.bias.detach().clone())
        self.ridge = energy.ridge

    def forward(self, u: Tensor, z: Tensor) -> Tensor:
        hidden = nn.functional.softplus(torch.cat([z, torch.sigmoid(u)], 1) @ self.weight.T + self.bias)
        return hidden.square().mean(-1) + 0.5 * self.ridge * u.square().sum(-1)


class InTwoParts(nn.Module):
    """`StructuredEnergy` as a plain module, which has no `encode`: V z anew in every evaluation."""

    def __init__(self, energy: StructuredEnergy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, u: Tensor, z: Tensor) -> Tensor:
        return self.energy(u, z)


def seconds(tasks: list[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> list[float]:
    """Medians; the tasks take turns."""
    times: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, seen in zip(tasks, times):
            start = clock()
            task()
            seen.append(clock() - start)
    return [statistics.median(seen) for seen in times]


def main() -> None:
    parser = command.parser("hoisting", __doc__)
    parser.add_argument("--repeats", type=command.positive, default=5)
    parser.add_argument("--steps", type=command.positive, default=150)
    parser.add_argument("--threads", type=command.positive, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.cpu_time else time.perf_counter
    hoisted = StructuredEnergy(1836, 159)
    ways: dict[str, tuple[nn.Module, Driver]] = {
        "one weight on [z; σ(u)]": (Concatenated(hoisted), Eager()),
        "two weights": (InTwoParts(hoisted), Eager()),
        "two weights, encode": (hoisted, Eager()),
        "two weights, encode, compiled": (hoisted, Compiled(strict=True)),
    }
    z = (torch.rand(80, 1836) < 0.04).float()
    start = hoisted.start(z)
    so_many = Termination(atol=0.0, rtol=0.0, max_steps=options.steps)

    def steps(energy: nn.Module, driver: Driver) -> Tensor:
        with torch.no_grad():
            return minimize(
                energy, start, z, step_size=20.0, solver=Picard(), termination=so_many, driver=driver, on_failure="ignore"
            ).value

    def training_step(energy: nn.Module, driver: Driver) -> Tensor:
        u = minimize(energy, start, z, driver=driver).value
        u.square().mean().backward()
        return u.detach()

    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.threads} threads, medians of {options.repeats}")
    tasks = {f"{options.steps} gradient steps, no gradient": steps, "solve by LBFGS, and its gradient": training_step}
    for title, task in tasks.items():
        for way in ways.values():  # what is compiled is compiled here
            torch.testing.assert_close(task(*way), task(hoisted, Eager()), rtol=1e-2, atol=1e-3)
        times = seconds([lambda w=way, t=task: t(*w) for way in ways.values()], options.repeats, clock)
        print(f"\n{title}")
        for name, took in zip(ways, times):
            print(f"  {name:31}{took:8.3f} s, {times[0] / took:5.1f} × as fast as the first", flush=True)


if __name__ == "__main__":
    main()

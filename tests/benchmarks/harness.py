"""How the contenders are timed: checked first, then called in turn; what was seen is a `Row` each."""

import contextlib
import ctypes
import dataclasses
import gc
import re
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .work import Task, Work

Call = Callable[[], Any]

SHORTEST = 0.005
"""Seconds that a sample of a timing lasts at least: a faster call is repeated within it."""


SETTLED = 0.1
"""Seconds of calls before a sample on a CPU: another library's threads leave these ones badly placed for so long."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says."""

    repeats: int = 7
    quick: bool = False
    skip_peers: bool = False
    device: str = "cpu"
    budget: float = 20.0
    """Seconds that a contender may use up in one race; it sits out the rounds after that."""


@dataclasses.dataclass
class Row:
    """One contender at one task."""

    case: str
    task: str
    contender: str
    steps: str = ""
    error: float | None = None
    right: bool = False
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    repeats: int = 0
    ratio: float | None = None
    first_seconds: float | None = None
    """The first call less the median one: tracing and compiling."""
    peak_mib: float | None = None
    """By how much the process grew at most while it ran."""
    target: float | None = None
    note: str = ""


class Contender(ABC):
    """A way to do the work."""

    name: ClassVar[str]

    @abstractmethod
    def call(self, work: Work, task: Task) -> Call:
        """What is timed; everything that is done once a model stands before.

        Raises:
            NotImplementedError: where this contender cannot do the task; the message says why.
        """

    def tensors(self, result: Any) -> tuple[Tensor, ...]:
        """What the call returned, for the check."""
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    def steps(self, work: Work, task: Task) -> str:
        """Iterations "forward" or "forward + backward" where they are known."""
        return ""


class Watcher:
    """Is told what happens; the command line shows it."""

    def doing(self, what: str) -> None:
        """A step of the work begins."""

    def seen(self, rows: Sequence[Row]) -> None:
        """A race has ended."""


@dataclasses.dataclass
class Racer:
    """A contender that has been found right and is ready to run."""

    row: Row
    call: Call
    count: int = 1
    used: float = 0.0
    lasted: float = 0.0
    samples: list[float] = dataclasses.field(default_factory=list)

    def sample(self, device: str) -> float:
        """Seconds a call, the mean over as many as last long enough."""
        if device == "cpu" and self.lasted < SETTLED:
            started = time.perf_counter()
            while time.perf_counter() - started < SETTLED:
                self.call()
        lasted = timed(self.call, self.count, device)
        self.used += lasted
        self.lasted = lasted / self.count
        return self.lasted


def timed(call: Call, count: int, device: str) -> float:
    """Seconds for so many calls; on an accelerator as its own events tell."""
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - started
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    synchronize(device)
    return 1e-3 * first.elapsed_time(last)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def compete(case: str, work: Work, tasks: dict[Task, float | None], contenders: Sequence[Contender], options: Options,
            watch: Watcher) -> list[Row]:  # fmt: skip
    """All contenders at each task with its target: first checked, then timed in turn."""
    rows: list[Row] = []
    for task, target in tasks.items():
        racers = []
        for contender in contenders:
            watch.doing(f"{case}: {task.value}: {contender.name} is checked")
            row = Row(case, task.value, contender.name, target=target if contender.name == OURS else None)
            rows.append(row)
            call = check(row, contender, work, task, options)
            if call is not None:
                racers.append(Racer(row, call))
        race(racers, options, lambda what: watch.doing(f"{case}: {task.value}: {what}"))  # noqa: B023
        watch.seen(rows)
    return rows


OURS = "energynet compiled"
BASE = "plain eager loop"
SECOND_BASE = "unrolled autograd"
"""Where the plain loop cannot do the task."""


def check(row: Row, contender: Contender, work: Work, task: Task, options: Options) -> Call | None:
    """The call, if it runs and what it returns is right; the row says otherwise."""
    try:
        with quiet():
            call = contender.call(work, task)
            started = time.perf_counter()
            result = call()
            synchronize(options.device)
            row.first_seconds = time.perf_counter() - started
            row.error = work.error(task, contender.tensors(result))
            del result
            row.steps = contender.steps(work, task)
    except NotImplementedError as error:
        row.note = f"cannot: {error}"
        return None
    except Exception as error:  # whatever a peer raises
        row.note = f"fails: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]
        return None
    row.right = row.error <= accuracy(work, task)
    if not row.right:
        row.note = "wrong" if row.error > WRONG else "inexact"
    return call if row.right else None


WRONG = 1e-2


def accuracy(work: Work, task: Task) -> float:
    """The relative error that is allowed: ten times the tolerance of its own kind."""
    forward = work.distance / float(work.problem.rows(work.answers[Task.FORWARD][0]).norm(dim=1).min())
    return 10 * (forward if task is Task.FORWARD else max(forward, work.problem.adjoint_tolerance))


def race(racers: Sequence[Racer], options: Options, doing: Callable[[str], None], *others: str) -> None:
    """Call them in turn, round by round, so that what slows the machine slows all; medians, and medians of ratios."""
    with quiet():
        for racer in racers:
            doing(f"{racer.row.contender} is warmed up")
            racer.row.peak_mib = peak(racer.call, options.device)
            lasted = racer.sample(options.device)
            racer.count = max(1, round(SHORTEST / max(lasted, 1e-7)))
        for k in range(options.repeats):
            for racer in racers:
                if k == 0 or racer.used < options.budget:
                    doing(f"round {k + 1} of {options.repeats}, {racer.row.contender}")
                    racer.samples.append(racer.sample(options.device))
    names = {racer.row.contender: racer for racer in racers}
    base = next((names[name] for name in (BASE, SECOND_BASE, *others) if name in names), None)
    for racer in racers:
        _summarize(racer, base)


def _summarize(racer: Racer, base: Racer | None) -> None:
    row, samples = racer.row, racer.samples
    row.seconds, row.repeats = statistics.median(samples), len(samples)
    ordered = sorted(samples)
    row.quartiles = (ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4])
    if row.first_seconds is not None:
        row.first_seconds = max(0.0, row.first_seconds - row.seconds)
    if base is not None:  # within a round both ran under the same conditions
        row.ratio = statistics.median(a / b for a, b in zip(samples, base.samples, strict=False))


@contextlib.contextmanager
def quiet() -> Iterable[None]:  # type: ignore[misc]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peak(call: Call, device: str) -> float | None:
    """By how many MiB the process, or the device's memory, grows at most while the call runs."""
    gc.collect()
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        call()
        synchronize(device)
        return (torch.accelerator.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
    except (OSError, AttributeError):  # not Linux
        call()
        return None
    call()
    return max(0, _status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])

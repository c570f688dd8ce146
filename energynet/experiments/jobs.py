"""`--jobs N`: runs spread over processes, the progress of all shown."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LINE = re.compile(r"update (\d+)/(\d+): (.*)")


class JobError(RuntimeError):
    """A process failed; the message has its last lines."""


@dataclass(frozen=True)
class Job:
    """One process: the arguments of `energynet run`, and the job that must have ended before."""

    name: str
    arguments: tuple[str, ...]
    after: "Job | None" = None


def run_jobs(console: Console, jobs: Sequence[Job], count: int) -> None:
    """Run each job as a process of its own, at most `count` at a time.

    Args:
        console: where progress is shown: one bar per running process, or plain lines where it is not a terminal.
        jobs: what to run; one that comes after another stands behind it.
        count: number of processes at a time; each gets its share of the CPU threads.

    Raises:
        JobError: when a process fails; the others end first.
        KeyboardInterrupt: passed on after all processes have saved their state and ended.
    """
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=8), TextColumn("{task.fields[figures]}"))
    progress = Progress(*columns, console=console, transient=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), "COLUMNS": "200"}
    futures: dict[Job, Future[None]] = {}

    def run(job: Job) -> None:
        if job.after is not None:
            futures[job.after].result()
        _run(job, progress, console, environment)

    if console.is_terminal:
        progress.start()
    try:
        with ThreadPoolExecutor(count) as pool:
            # First those that wait for nothing: a thread that waits for a job that has no thread would wait for ever.
            for job in sorted(jobs, key=lambda job: job.after is not None):
                futures[job] = pool.submit(run, job)
            failed = [error for future in futures.values() if (error := future.exception()) is not None]
    finally:
        progress.stop()
    if failed:
        raise failed[0]


def _run(job: Job, progress: Progress, console: Console, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "energynet", "run", *job.arguments]
    bar = progress.add_task(job.name, total=None, figures="")
    last: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", env=environment
    ) as process:
        for line in _lines(process.stdout):
            last = [*last[-19:], line]
            if found := _LINE.search(line):
                progress.update(bar, completed=int(found[1]), total=int(found[2]), figures=found[3])
            if not console.is_terminal:
                console.print(line, soft_wrap=True, highlight=False, markup=False)
    progress.remove_task(bar)
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        raise JobError(f"{job.name} ended with {process.returncode}:\n" + "\n".join(last))


def _lines(stream: Iterable[str] | None) -> Iterable[str]:
    for line in stream or ():
        yield line.rstrip()

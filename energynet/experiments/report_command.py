"""``energynet report FOLDER...``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from .find import find_task
from .plot import plot_curves, plot_times
from .report import Found, ReportError, Run, by_method, compare, diagnosis_lines, find_runs, result_table
from .task import Task


@dataclass(frozen=True)
class Report:
    """Tables, tests, plots of runs."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")]
    """Results folders, or folders of them."""
    format: Literal["terminal", "markdown", "latex", "csv"] = "terminal"
    """How tables are written."""
    compare: tuple[str, ...] = ()
    """Two methods, by their names in the table: a paired t test over seeds."""
    plots: Path | None = None
    """Write curves, and the figure against training time, into this folder."""
    diagnoses: bool = False
    """Also print what each run found about its solution."""


def report(arguments: Sequence[str]) -> None:
    """Print tables of all runs below the folders, one for each task and data set.

    Raises:
        ReportError: when there is no run, or two methods cannot be compared.
    """
    wanted = tyro.cli(Report, args=list(arguments), prog="energynet report")
    console = Console()
    groups: dict[tuple[str, str], list[Found]] = {}
    for found in find_runs(wanted.folders):
        groups.setdefault((found.task, found.metrics["data"]), []).append(found)
    for (place, data), runs in groups.items():
        _report(console, wanted, find_task(place), data, runs)


def _report(console: Console, wanted: Report, task: type[Task], data: str, found: Sequence[Found]) -> None:
    runs: list[Run] = [one.metrics for one in found]
    table = result_table(task, runs)
    written = {"markdown": table.markdown, "latex": table.latex, "csv": table.csv}
    if wanted.format in written:
        print(written[wanted.format]())
    else:
        table.show(console)
    if wanted.compare:
        if len(wanted.compare) != 2:
            raise ReportError(f"--compare takes two methods, got {len(wanted.compare)}: {', '.join(wanted.compare)}.")
        print(compare(task, runs, *wanted.compare))
    for line in diagnosis_lines(runs) if wanted.diagnoses else ():
        print(line)
    if wanted.plots is not None:
        wanted.plots.mkdir(parents=True, exist_ok=True)
        names = {id(run): name for name, own in by_method(runs).items() for run in own}
        histories = {(names[id(one.metrics)], one.metrics["seed"]): one.folder.history() for one in found}
        plot_curves(histories, task, data, wanted.plots / f"{data}-curves.png")
        plot_times(by_method(runs), task, data, wanted.plots / f"{data}-times.png")
        print(f"Plots in {wanted.plots}")

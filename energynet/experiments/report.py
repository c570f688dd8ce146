"""What runs gave: tables, comparisons of two methods, plots; ``energynet report FOLDER...``."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from .results import RunFolder, read_json
from .tables import ResultTable
from .task import Task

Run = Mapping[str, Any]
"""The `metrics.json` of a run."""
_OWN = ("experts", "learning_rate", "weight_decay")  # options that the method's name or its rates tell


class ReportError(ValueError):
    """There is nothing to report, or two methods cannot be compared."""


@dataclass(frozen=True)
class Found:
    """A finished run and its folder."""

    metrics: Run
    folder: RunFolder

    @property
    def task(self) -> str:
        """The place of its task."""
        return str(read_json(self.folder.path / "config.json")["task"])


def find_runs(folders: Iterable[Path]) -> list[Found]:
    """All finished runs below some folders, without those of tuning.

    Raises:
        ReportError: when there is none.
    """
    folders = list(folders)
    paths = {path for folder in folders for path in sorted(folder.rglob("seed-*/metrics.json")) if "tuning" not in path.parts}
    if not paths:
        raise ReportError(f"no finished run below {', '.join(map(str, folders))}; a run leaves METHOD/seed-N/metrics.json.")
    return [Found(read_json(path), RunFolder(path.parent)) for path in sorted(paths)]


def result_table(task: type[Task], runs: Sequence[Run], logged: int | None = None) -> ResultTable:
    """The figures of all methods, mean ± standard deviation over seeds.

    Args:
        task: what was run.
        runs: the metrics of each run, of one data set.
        logged: how many evaluations on test rows the log holds; None without a log.

    Returns:
        A table that fits 80 columns for four figures.
    """
    rows = rows_of(runs)
    headings = ("method", *(column.heading for column in task.columns.values()), "s", "steps", "conv.")
    groups = by_method(runs)
    seeds = max(len(own) for own in groups.values())
    title = f"{runs[0]['data']}, {rows.replace('_', '-')} rows, {seeds} seed{'s' if seeds > 1 else ''}"
    cells = [(f"{name} ↑" if rising(own) else name, *_cells(task, own, rows)) for name, own in groups.items()]
    return ResultTable(title, headings, cells, caption(groups, logged))


def rows_of(runs: Sequence[Run]) -> str:
    """Which rows can be reported: test rows where all runs have them."""
    return "test" if all("test" in run for run in runs) else "held_out"


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method; where runs differ in other options than the method's own, these stand in its name."""
    options = [run["options"] for run in runs]
    varying = [key for key in options[0] if key not in _OWN and len({repr(one.get(key)) for one in options}) > 1]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        experts = run["options"].get("experts", 1)
        name = run["method"] + (f" ×{experts}" if experts != 1 and not run["method"].startswith("sklearn") else "")
        told = ", ".join(f"{key} {run['options'].get(key)}" for key in varying)
        groups.setdefault(f"{name} ({told})" if told else name, []).append(run)
    return groups


def rising(runs: Sequence[Run]) -> bool:
    """Whether the chosen round of some run is its last one."""
    return any(run["still_rising"] for run in runs)


def caption(groups: Mapping[str, Sequence[Run]], logged: int | None) -> str:
    """The sentences below the table."""
    runs = [run for own in groups.values() for run in own]
    told = ["s: seconds of training; steps: mean forward + adjoint steps per training batch; conv.: samples converged (%)."]
    if rising(runs):
        told.append("↑ still rising: the chosen round is the last one; raise --updates.")
    if failed := sum(run["failed_updates"] for run in runs):
        told.append(f"{failed} updates had a solve that did not converge or a gradient that was not finite.")
    costs = {name: cost for name, own in groups.items() if (cost := own[0].get("tuning_seconds")) is not None}
    if costs:
        told.append(f"Tuning took {', '.join(f'{cost:.0f} s for {name}' for name, cost in costs.items())}.")
    if logged is not None:
        told.append(f"Evaluations on test rows in the log so far: {logged}.")
    return " ".join(told)


def compare(task: type[Task], runs: Sequence[Run], one: str, other: str) -> str:
    """Whether two methods differ in the chosen figure, by a paired t test over the seeds that both have.

    Args:
        task: what was run.
        runs: the metrics of each run.
        one: the name of a method in the table.
        other: that of the other.

    Returns:
        A sentence with the mean difference, its spread and the p-value.

    Raises:
        ReportError: when a method has no run, or fewer than two seeds are common.
    """
    groups, rows, column = by_method(runs), rows_of(runs), task.columns[task.choice]
    for name in (one, other):
        if name not in groups:
            raise ReportError(f"there is no run of {name!r}; there are runs of {', '.join(groups)}.")
    values = [{run["seed"]: column.scale * run[rows][task.choice] for run in groups[name]} for name in (one, other)]
    seeds = sorted(values[0].keys() & values[1].keys())
    if len(seeds) < 2:
        raise ReportError(f"{one} and {other} have {len(seeds)} seeds in common; a paired test needs two.")
    pairs = [[value[seed] for seed in seeds] for value in values]
    gains = [a - b for a, b in zip(*pairs)]
    p_value = ttest_rel(*pairs).pvalue if statistics.pstdev(gains) > 0 else (1.0 if gains[0] == 0 else 0.0)
    return (
        f"{one} − {other}: {statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f} {column.heading} "
        f"over {len(seeds)} seeds, p = {p_value:.2g} (paired t test, {rows.replace('_', '-')} rows)."
    )


def diagnosis_lines(runs: Sequence[Run]) -> list[str]:
    """For each run that diagnosed itself: its numbers, such as the spectral radius at the solution."""
    lines = []
    for run in runs:
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in run["diagnostics"].items())
        lines += [f"{run['method']} seed {run['seed']}: {told}."] if told else []
    return lines


def _cells(task: type[Task], runs: Sequence[Run], rows: str) -> list[str]:
    cells = []
    for figure, column in task.columns.items():
        values = [run[rows][figure] for run in runs if math.isfinite(run[rows].get(figure, math.nan))]
        spread = f"±{column.write(statistics.stdev(values))}" if len(values) > 1 else ""
        cells.append(f"{column.write(statistics.mean(values))}{spread}" if values else "–")
    return [*cells, f"{statistics.mean(run['seconds'] for run in runs):.0f}", *_solves(runs)]


def _solves(runs: Sequence[Run]) -> tuple[str, str]:
    solved = [run for run in runs if run["forward_steps"] is not None]
    if not solved:
        return "–", "–"
    forward, adjoint, converged = (
        sum(run[name] or 0.0 for run in solved) / len(solved) for name in ("forward_steps", "adjoint_steps", "converged")
    )
    return f"{forward:.1f}+{adjoint:.1f}", f"{100 * converged:.1f}"

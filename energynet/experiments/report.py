"""Tables over runs."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .task import Task

Runs = Sequence[Mapping[str, Any]]
"""The `metrics.json` of each run."""


def result_table(task: type[Task], runs: Runs, logged: int | None = None) -> Table:
    """The figures of all methods, mean ± standard deviation over seeds.

    Args:
        task: what was run.
        runs: the `metrics.json` of each run, of one data set.
        logged: how many evaluations on test rows the log holds; None without a log.

    Returns:
        A table that fits 80 columns.
    """
    rows = "test" if all("test" in run for run in runs) else "held_out"
    seeds = len({run["seed"] for run in runs})
    told = f"{runs[0]['data']}, {rows.replace('_', '-')} rows, {seeds} seed{'s' if seeds > 1 else ''}"
    table = Table(title=told, caption=caption(runs, logged), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in (*(column.heading for column in task.columns.values()), "s", "steps", "conv."):
        table.add_column(heading, justify="right")
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        table.add_row(name_of(own), *row_of(task, own, rows))
    return table


def row_of(task: type[Task], runs: Runs, rows: str) -> list[str]:
    """The cells of one method."""
    cells = []
    for figure, column in task.columns.items():
        values = [run[rows][figure] for run in runs if figure in run[rows]]
        spread = f"±{column.write(statistics.stdev(values))}" if len(values) > 1 else ""
        cells.append(f"{column.write(statistics.mean(values))}{spread}" if values else "–")
    return [*cells, f"{statistics.mean(run['seconds'] for run in runs):.0f}", *_solves(runs)]


def name_of(runs: Runs) -> str:
    """A method's name, with the number of networks if it combines several, and a mark if it was still rising."""
    experts = runs[0]["options"].get("experts", 1)
    name = runs[0]["method"] + (f" ×{experts}" if experts != 1 else "")
    return f"{name} ↑" if any(run["still_rising"] for run in runs) else name


def caption(runs: Runs, logged: int | None) -> str:
    """The sentences below the table."""
    note = "s: seconds of training; steps: mean forward + adjoint steps per training batch; conv.: samples converged (%)."
    if any(run["still_rising"] for run in runs):
        note += " ↑: still rising: the chosen round is the last one; raise --updates."
    failed = sum(run["failed_updates"] for run in runs)
    note += f" {failed} updates had a solve that did not converge or a gradient that was not finite." if failed else ""
    return note if logged is None else f"{note} Evaluations on test rows in the log so far: {logged}."


def show(console: Console, table: Table) -> None:
    """A table where it fits, and otherwise one line per number: a narrow table would truncate them."""
    if Measurement.get(console, console.options.update(width=1000), table).maximum <= console.width:
        console.print(table)
        return
    console.print(str(table.title), highlight=False)
    headings = [str(column.header) for column in table.columns[1:]]
    for name, *figures in zip(*(column.cells for column in table.columns)):
        lines = [f"  {heading:7} {value}" for heading, value in zip(headings, figures)]
        console.print(str(name), *lines, sep="\n", highlight=False)
    console.print(str(table.caption), highlight=False)


def diagnosis_lines(runs: Runs) -> list[str]:
    """For each run with a solve: its spectral radius, and how its answers agree with a float64 solve at 1e-10."""
    lines = []
    for run in runs:
        told = {name.replace("_", " "): value for name, value in run["diagnostics"].items()}
        if told:
            text = ", ".join(f"{name} {value:.3g}" for name, value in told.items())
            lines.append(f"{run['method']} seed {run['seed']}: {text}.")
    return lines


def _solves(runs: Runs) -> tuple[str, str]:
    solved = [run for run in runs if run["forward_steps"] is not None]
    if not solved:
        return "–", "–"
    forward, adjoint, converged = (
        sum(run[name] or 0.0 for run in solved) / len(solved) for name in ("forward_steps", "adjoint_steps", "converged")
    )
    return f"{forward:.1f}+{adjoint:.1f}", f"{100 * converged:.1f}"

"""What a person sees: the progress bar, the table of results, and plain lines where the output is not a terminal."""

from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from .models import MethodName
from .multilabel import Plan, Watcher
from .training import Epoch, Recipe

_FIGURES = {"example_f1": "ex-F1", "micro_f1": "mi-F1", "macro_f1": "ma-F1", "exact_match": "exact"}


class Display:
    """A progress bar on a terminal, one line per epoch elsewhere; a context manager.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=8), TextColumn("{task.percentage:3.0f} %"))
        self.progress = Progress(*columns, TextColumn("{task.fields[figures]}"), console=console, transient=True)
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def watcher(self) -> Watcher:
        """The callbacks that training is given."""
        return Watcher(self._run, self._batch, self._epoch)

    def _run(self, recipe: Recipe, done: int, num_batches: int) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        total = recipe.epochs * num_batches
        name = f"{recipe.method.value} seed {recipe.seed}"
        self.task = self.progress.add_task(name, total=total, completed=done * num_batches, figures="")

    def _batch(self) -> None:
        if self.task is not None:
            self.progress.advance(self.task)

    def _epoch(self, recipe: Recipe, epoch: Epoch) -> None:
        text = describe(epoch)
        if self.task is not None:
            self.progress.update(self.task, figures=text)
        if not self.console.is_terminal:
            run = f"{recipe.method.value} seed {recipe.seed} epoch {epoch.epoch}/{recipe.epochs}"
            self.console.print(f"{run}: {text}", soft_wrap=True, highlight=False)


def describe(epoch: Epoch) -> str:
    """One epoch's figures in a line.

    >>> describe(Epoch(1, 0.5, 0.25, 0.2, 6.0, 4.0, 1.0))
    'loss 0.500, F1 25.0, steps 6.0 + 4.0, converged 100.0 %'
    """
    text = f"loss {epoch.loss:.3f}, F1 {100 * epoch.held_out_f1:.1f}"
    if epoch.forward_steps is None or epoch.converged is None:
        return text
    adjoint = 0.0 if epoch.adjoint_steps is None else epoch.adjoint_steps
    return f"{text}, steps {epoch.forward_steps:.1f} + {adjoint:.1f}, converged {100 * epoch.converged:.1f} %"


def result_table(plan: Plan, name: str, metrics: list[dict[str, Any]], logged: int | None) -> Table:
    """The metrics of all methods, mean ± standard deviation over seeds, in percent.

    Args:
        plan: what was asked for.
        name: the data set.
        metrics: the `metrics.json` of each run.
        logged: how many evaluations on test rows the log holds; None without a log.

    Returns:
        A table that fits 80 columns.
    """
    rows = "test" if plan.test else "held_out"
    epochs = f"{plan.epochs} epochs, {plan.seeds} seed{'s' if plan.seeds > 1 else ''}"
    table = Table(title=f"{name}, {rows.replace('_', '-')} rows, {plan.loss.value} loss, {epochs} (%)", caption=_caption(logged))
    table.add_column("method", no_wrap=True)
    for heading in (*_FIGURES.values(), "steps", "conv."):
        table.add_column(heading, justify="right")
    for method in plan.methods:
        runs = [run for run in metrics if run["method"] == method.value]
        figures = [_mean_and_deviation([100 * run[rows][figure] for run in runs]) for figure in _FIGURES]
        table.add_row(_name(method, runs), *figures, *_solves(runs))
    return table


def show(console: Console, table: Table) -> None:
    """A table where it fits, and otherwise one line per number: a narrow table would truncate them."""
    if Measurement.get(console, console.options.update(width=1000), table).maximum <= console.width:
        console.print(table)
        return
    console.print(str(table.title), highlight=False)
    headings = [str(column.header) for column in table.columns[1:]]
    for name, *figures in zip(*(column.cells for column in table.columns)):
        lines = [f"  {heading:6} {value}" for heading, value in zip(headings, figures)]
        console.print(str(name), *lines, sep="\n", highlight=False)
    console.print(str(table.caption), highlight=False)


def agreement_lines(metrics: list[dict[str, Any]]) -> list[str]:
    """For each run of FPI_GD: its steps, and how its answers agree with a float64 solve at tolerance 1e-10."""
    return [
        f"{run['method']} seed {run['seed']}: {run['forward_steps']:.1f} forward and {run['adjoint_steps'] or 0:.1f} "
        f"adjoint steps per training batch, {100 * run['converged']:.2f} % converged; against a float64 solve at 1e-10 "
        "the answers of "
        f"{run['agreement']['rows']} held-out rows differ by {run['agreement']['median']:.1e} (median; limit 1e-3), "
        f"{run['agreement']['99th percentile']:.1e} (99th percentile; limit 1e-2), relative."
        for run in metrics
        if "agreement" in run
    ]


def _caption(logged: int | None) -> str:
    note = "steps: mean forward + adjoint steps per training batch; conv.: samples converged; ×N: N networks."
    return note if logged is None else f"{note} Evaluations on test rows in the log so far: {logged}."


def _name(method: MethodName, runs: list[dict[str, Any]]) -> str:
    experts = runs[0]["experts"] if runs else 1
    return method.value if experts == 1 else f"{method.value} ×{experts}"


def _solves(runs: list[dict[str, Any]]) -> tuple[str, str]:
    solved = [run for run in runs if run["forward_steps"] is not None]
    if not solved:
        return "–", "–"
    forward, adjoint, converged = (
        sum(run[name] or 0.0 for run in solved) / len(solved) for name in ("forward_steps", "adjoint_steps", "converged")
    )
    return f"{forward:.1f}+{adjoint:.1f}", f"{100 * converged:.1f}"


def _mean_and_deviation(values: list[float]) -> str:
    figures = torch.tensor(values, dtype=torch.float64)
    return f"{figures.mean():.1f}±{figures.std():.1f}" if len(values) > 1 else f"{figures.mean():.1f}"

"""The curves of one run or of several, as a PNG."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import replace_by
from .task import Task
from .trainer import Round

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[tuple[str, int], list[Round]]
"""The rounds of each (method, seed)."""


def plot_curves(runs: Runs, task: type[Task], title: str, path: Path) -> None:
    """Draw loss, the chosen held-out figure, steps and share converged against updates, one line per run.

    Args:
        runs: the rounds of each (method, seed).
        task: what was run.
        title: the figure's heading.
        path: where the PNG goes; written atomically.
    """
    column = task.columns[task.choice]
    figure = _figure()
    loss, chosen, steps, converged = figure.subplots(2, 2).flatten()
    _lines(loss, runs, "training loss", lambda one: one.loss if one.updates else None)  # what is fitted at once has none
    _lines(chosen, runs, f"held-out {column.heading}", lambda one: column.scale * one.figures[task.choice])
    _lines(steps, runs, "mean steps per training batch", lambda one: one.forward_steps)
    _lines(steps, runs, "mean steps per training batch", lambda one: one.adjoint_steps, dashed=True)
    _lines(converged, runs, "samples converged (%)", lambda one: None if one.converged is None else 100 * one.converged)
    chosen.legend(frameon=False, fontsize=9)
    _explain_steps(steps)
    if not converged.lines:
        for axes in (steps, converged):
            axes.text(0.5, 0.5, "no solve in this method", transform=axes.transAxes, ha="center", color="#6b7280")
    else:
        steps.set_ylim(bottom=0)
        converged.set_ylim(min([98.9, *(min(_values(line)) for line in converged.lines)]) - 0.1, 100.1)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    replace_by(path, lambda temporary: figure.savefig(temporary))


def plot_times(runs: Mapping[str, Sequence[Mapping[str, Any]]], task: type[Task], title: str, path: Path) -> None:
    """Draw the chosen figure of each run against its training time, one color per method.

    Args:
        runs: the metrics of the runs of each method.
        task: what was run.
        title: the figure's heading.
        path: where the PNG goes; written atomically.
    """
    figure = _figure()
    axes, column = figure.subplots(), task.columns[task.choice]
    for number, (method, own) in enumerate(runs.items()):
        values = [column.scale * run.get("test", run["held_out"])[task.choice] for run in own]
        axes.plot([run["seconds"] for run in own], values, "o", color=_color(number), label=method)
    _style(axes, f"{column.heading} against seconds of training", "seconds")
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    replace_by(path, lambda temporary: figure.savefig(temporary))


def _figure() -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own canvas: pyplot would keep it alive and would touch the caller's backend.
    figure = Figure(figsize=(9.6, 6.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _lines(
    axes: "Axes",
    runs: Runs,
    label: str,
    figure_of: Callable[[Round], float | None],
    *,
    dashed: bool = False,
) -> None:
    methods = list(dict.fromkeys(method for method, _ in runs))
    named: set[str] = set()
    for (method, _), history in runs.items():
        points = [(one.updates, value) for one in history if (value := figure_of(one)) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=_color(methods.index(method)), linewidth=1.6,
                linestyle="--" if dashed else "-", label=None if method in named or dashed else method,
                marker="o", markersize=2.5 if len(points) > 1 else 6,
            )  # fmt: skip
            named.add(method)
    _style(axes, label, "updates")


def _style(axes: "Axes", title: str, across: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(across, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _color(number: int) -> Any:
    """The same for the same place in the order of methods."""
    from matplotlib import colormaps

    return colormaps["tab20"](number % 20)


def _explain_steps(axes: "Axes") -> None:
    if axes.lines:
        axes.plot([], [], color="#111827", label="forward")
        axes.plot([], [], color="#111827", linestyle="--", label="adjoint")
        handles = axes.lines[-2:]
        axes.legend(handles=handles, frameon=False, fontsize=9)


def _values(line: object) -> list[float]:
    return [float(value) for value in line.get_ydata()]  # type: ignore[attr-defined]

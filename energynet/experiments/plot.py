"""The curves of one run or of several, as a PNG."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .results import replace_by
from .training import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {"fpi-gd": "#0b6e99", "fpi-nn": "#d9730d", "mlp": "#6b7280", "logistic": "#b08968"}


def plot_curves(runs: Mapping[tuple[str, int], list[Epoch]], title: str, path: Path) -> None:
    """Draw loss, held-out example-F1, steps and fraction converged against epochs, one line per run.

    Args:
        runs: the epochs of each (method, seed).
        title: the figure's heading.
        path: where the PNG goes; written atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own canvas: pyplot would keep it alive and would touch the caller's backend.
    figure = Figure(figsize=(9.6, 6.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss, f1, steps, converged = figure.subplots(2, 2).flatten()
    _lines(loss, runs, "training loss", lambda epoch: epoch.loss)
    _lines(f1, runs, "held-out example-F1 (%)", lambda epoch: 100 * epoch.held_out_f1)
    _lines(steps, runs, "mean steps a training batch", lambda epoch: epoch.forward_steps)
    _lines(steps, runs, "mean steps a training batch", lambda epoch: epoch.adjoint_steps, dashed=True)
    _lines(converged, runs, "samples converged (%)", lambda epoch: _percent(epoch.converged))
    f1.legend(frameon=False, fontsize=9)
    _explain_steps(steps)
    if not converged.lines:
        for axes in (steps, converged):
            axes.text(0.5, 0.5, "no solve in this method", transform=axes.transAxes, ha="center", color="#6b7280")
    else:
        steps.set_ylim(bottom=0)
        converged.set_ylim(min([98.9, *(min(_values(line)) for line in converged.lines)]) - 0.1, 100.1)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    replace_by(path, lambda temporary: figure.savefig(temporary))


def _lines(
    axes: "Axes",
    runs: Mapping[tuple[str, int], list[Epoch]],
    label: str,
    figure_of: Callable[[Epoch], float | None],
    *,
    dashed: bool = False,
) -> None:
    from matplotlib.ticker import MaxNLocator

    named: set[str] = set()
    for (method, _), history in runs.items():
        points = [(epoch.epoch, value) for epoch in history if (value := figure_of(epoch)) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), color=_COLORS.get(method), linestyle="--" if dashed else "-",
                linewidth=1.6, label=None if method in named or dashed else method, marker="o", markersize=2.5,
            )  # fmt: skip
            named.add(method)
    axes.set_title(label, fontsize=10, loc="left")
    axes.set_xlabel("epoch", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _explain_steps(axes: "Axes") -> None:
    if axes.lines:
        axes.plot([], [], color="#111827", label="forward")
        axes.plot([], [], color="#111827", linestyle="--", label="adjoint")
        handles = axes.lines[-2:]
        axes.legend(handles=handles, frameon=False, fontsize=9)


def _values(line: object) -> list[float]:
    return [float(value) for value in line.get_ydata()]  # type: ignore[attr-defined]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value

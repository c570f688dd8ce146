"""Plots of a solve with matplotlib (``pip install energynet[plot]``). None of the functions calls ``plt.show()``."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from energynet._torch.autodiff import recording
from energynet.diagnostics.linearized import Linearized, StepLike
from energynet.energy import EnergyLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_trace(trace: Any, ax: "Axes | None" = None) -> "Axes":
    """Plot the estimated errors over the steps on a log scale, and the energies, if there are any, on a second axis.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> trace = SimpleNamespace(error=torch.logspace(0, -3, 4)[:, None], energy=None)     # (T + 1, B)
        >>> plot_trace(trace).get_yscale()
        'log'

    Args:
        trace: the trace of a solve with ``trace=True``: ``error`` ``(T + 1, B)`` and ``energy``, of the same shape or None.
        ax: the axes to draw on; default: new axes. The energies are drawn as dashed lines on a twin of these axes.

    Returns:
        The axes of the errors.
    """
    ax = _axes(ax)
    error = trace.error.detach().cpu().reshape(len(trace.error), -1)  # (T + 1, B)
    count = error.shape[1]
    alpha = max(0.15, min(1.0, 8 / max(count, 1)))
    for k, column in enumerate(error.T):
        shown = torch.where(column > 0, column, torch.nan)[: _moving(column)]  # a log scale cannot show 0
        ax.plot(shown.tolist(), color=_color(k), alpha=alpha, marker="o" if len(shown) <= 20 else None, markersize=3,
                label=f"sample {k}")  # fmt: skip
    ax.set(yscale="log", xlabel="step", ylabel="error")
    ax.grid(alpha=0.3)
    ax.locator_params(axis="x", integer=True)
    front = ax
    if trace.energy is not None:
        front = _plot_energies(trace.energy.detach().cpu().reshape(len(error), -1), ax, alpha)
    if 1 < count <= 8:
        front.legend(*ax.get_legend_handles_labels(), framealpha=0.9, fontsize="small", loc="lower left")
    return ax


def _moving(column: Tensor) -> int:
    """The number of points until a sample stops moving; later points are not drawn."""
    changes = (column != column[-1]).nonzero()
    return int(changes.amax()) + 2 if len(changes) else 1


def _plot_energies(energy: Tensor, ax: "Axes", alpha: float) -> "Axes":
    twin = ax.twinx()
    for k, column in enumerate(energy.T):
        twin.plot(column.tolist(), color=_color(k), alpha=alpha, linestyle="--", linewidth=1)
    twin.set_ylabel("energy (dashed)")
    return twin


def plot_landscape(
    energy: EnergyLike,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    *context: Any,
    path: Any = None,
    ax: "Axes | None" = None,
    points: int = 200,
) -> "Axes":
    """Plot level lines of an energy of two variables, and the path of the iterates.

    Levels are evenly spaced. If a few percent of the area lie far below the rest, as in the valley of the Rosenbrock
    function, they are evenly spaced in the logarithm of the height above the lowest point.

    Example:
        >>> import torch
        >>> energy = lambda x, z: (x - z).square().sum(-1)                       # (B, 2) -> (B,)
        >>> plot_landscape(energy, (-1, 1), (-1, 1), torch.zeros(1, 2)).get_xlim()
        (np.float64(-1.0), np.float64(1.0))

    Args:
        energy: E(x, \\*context) -> ``(B,)`` for x ``(B, 2)``.
        xlim: the range of the first variable.
        ylim: the range of the second variable.
        context: the energy's other arguments for one sample: ``(1, ...)``.
        path: iterates ``(T + 1, 2)``, or ``(T + 1, B, 2)`` for several samples, like ``Trace.value``.
        ax: the axes to draw on; default: new axes.
        points: the number of grid points along each side.

    Returns:
        The axes.

    Raises:
        ValueError: if the path does not have two variables.
    """
    ax = _axes(ax)
    x, y = torch.linspace(*xlim, points, dtype=torch.float64), torch.linspace(*ylim, points, dtype=torch.float64)
    height = _heights(energy, x, y, context)
    _draw_levels(x, y, height, ax)
    if path is not None:
        _plot_path(path, ax)
    ax.set(xlim=xlim, ylim=ylim, xlabel="$x_1$", ylabel="$x_2$")
    return ax


def _heights(energy: EnergyLike, x: Tensor, y: Tensor, context: tuple[Any, ...]) -> Tensor:  # -> (len(y), len(x))
    with recording(context) as context, torch.no_grad():
        tensors = [t for t in context if isinstance(t, Tensor) and t.is_floating_point()]
        like = (tensors or list(_parameters(energy)) or [x])[0]
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2).to(like)
        # One sample at a time, so that the context for one sample suffices, whatever its shapes.
        height = torch.func.vmap(lambda p: energy(p[None], *context).sum(), chunk_size=4096)(grid)
    return height.reshape(len(y), len(x)).double().cpu()


def _parameters(energy: EnergyLike) -> Any:
    return energy.parameters() if isinstance(energy, torch.nn.Module) else ()


def _draw_levels(x: Tensor, y: Tensor, height: Tensor, ax: "Axes") -> None:
    from matplotlib.colors import BoundaryNorm

    levels = _levels(height)
    if len(levels) < 2:  # a constant energy
        return
    # One color per band, independent of the spacing of the levels.
    norm = BoundaryNorm(levels, 256, extend="both")
    grid = x.tolist(), y.tolist(), height.tolist()
    bands = ax.contourf(*grid, levels=levels, norm=norm, cmap="viridis", alpha=0.55, extend="both")
    ax.contour(*grid, levels=levels, colors="black", linewidths=0.4, alpha=0.6)
    ax.figure.colorbar(bands, ax=ax, format="%.3g", ticks=levels[::3], label="energy")


def _levels(height: Tensor, count: int = 19) -> list[float]:
    """The heights of the level lines in ascending order; none for a constant energy."""
    low = height[torch.isfinite(height)].amin()
    above = (height - low)[torch.isfinite(height) & (height > low)]
    if not len(above):
        return []
    top, bottom, valley = (float(v) for v in (above.amax(), *_quantiles(above, 0.002, 0.05)))
    if top > 50 * valley:
        spaced = torch.logspace(math.log10(bottom), math.log10(top), count, dtype=torch.float64)
    else:
        spaced = torch.linspace(0, top, count + 1, dtype=torch.float64)[1:]
    return (low + spaced[:-1]).unique().tolist()


def _quantiles(values: Tensor, *fractions: float) -> list[Tensor]:
    ordered = values.sort().values
    return [ordered[int(q * len(ordered))] for q in fractions]


def _plot_path(path: Tensor, ax: "Axes") -> None:
    if not isinstance(path, Tensor) or path.shape[-1] != 2 or path.ndim not in (2, 3):
        seen = tuple(path.shape) if isinstance(path, Tensor) else type(path).__name__
        raise ValueError(f"path must be of shape (T + 1, 2) or (T + 1, B, 2), the iterates of two variables, got {seen}.")
    ways = path.detach().cpu().reshape(len(path), -1, 2)
    for k in range(ways.shape[1]):
        first, second = ways[:, k].T.tolist()
        color = "crimson" if ways.shape[1] == 1 else _color(k)
        ax.plot(first, second, color=color, linewidth=1.2, marker=".", markersize=4)
        ax.plot(first[0], second[0], "o", color=color, markerfacecolor="white", markersize=7, label=_once("start", k))
        ax.plot(first[-1], second[-1], "*", color=color, markersize=12, label=_once("end", k))
    ax.legend(frameon=True, framealpha=0.9, fontsize="small")


def _once(label: str, k: int) -> str | None:
    return None if k else label


def plot_spectrum(step: StepLike, x: Any, *inputs: Any, batch_dims: int = 1, ax: "Axes | None" = None) -> "Axes":
    """Plot the eigenvalues of ∂g/∂x in the complex plane: the iteration converges if all lie inside the unit circle.

    This function forms the matrix by n products, so use it only for small n.

    Example:
        >>> import torch
        >>> plot_spectrum(lambda x: 0.5 * x, torch.zeros(1, 2)).get_title()
        'spectral radius 0.5'

    Args:
        step: g, or a `Step`; an energy as ``GradientStep(energy, step_size)``.
        x: the point, usually x*: ``(B, ...)``, a pytree of such, or a `Solution`.
        inputs: the step's other arguments.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem; an energy determines it itself.
        ax: the axes to draw on; default: new axes.

    Returns:
        The axes.

    Raises:
        ValueError: if the step has no step size, or does not return the shapes of x.
    """
    ax = _axes(ax)
    values = _eigenvalues(Linearized.of(step, x, inputs, batch_dims))  # (B, n)
    turn = torch.linspace(0, 2 * torch.pi, 200)
    ax.plot(turn.cos().tolist(), turn.sin().tolist(), color="gray", linewidth=1)
    ax.axhline(0, color="gray", linewidth=0.5)
    ax.axvline(0, color="gray", linewidth=0.5)
    for k, row in enumerate(values):
        label = f"sample {k}" if 1 < len(values) <= 8 else None
        ax.scatter(row.real.tolist(), row.imag.tolist(), s=24, color=_color(k), alpha=0.6, label=label, zorder=3)
    ax.set(aspect="equal", xlabel="real part", ylabel="imaginary part", title=f"spectral radius {float(values.abs().amax()):.3g}")
    if 1 < len(values) <= 8:
        ax.legend(frameon=True, framealpha=0.9, fontsize="small")
    return ax


def _eigenvalues(at: Linearized) -> Tensor:  # -> (B, n), complex
    n = at.x.shape[-1]
    with torch.no_grad():
        columns = [p - at.gamma * at.product(p) for p in (row.expand_as(at.x) for row in torch.eye(n).to(at.x))]
        values: Tensor = torch.linalg.eigvals(torch.stack(columns, -1).double())
    return values.cpu().reshape(-1, n)


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is not installed. Try: pip install energynet[plot]") from error
    return plt.subplots(layout="constrained")[1]


def _color(k: int) -> str:
    return f"C{k % 10}"

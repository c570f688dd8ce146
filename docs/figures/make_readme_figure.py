"""Draw the figure of the README: ``python docs/figures/make_readme_figure.py`` writes readme.png beside it.

Left, an energy with four minima and the iterates of `minimize` from four starts, solved as one batch. Right, the gradient of
an answer against central differences of solves, by the distance between them: the difference falls with the square of the
distance, as it must if the gradient is exact, until rounding takes over.
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from energynet import GradientDescent, Termination, minimize
from energynet.plotting import plot_landscape

COLORS = ("#d55e00", "#0b3d91", "#a3006e", "#111111")
TIGHT = Termination(atol=1e-14, rtol=1e-14, max_steps=20_000)


def energy(x: Tensor, z: Tensor) -> Tensor:  # (B, 2), (B, 2) -> (B,)
    """Himmelblau's function, tilted by z."""
    a, b = x.unbind(-1)
    return (a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2 - 10 * (z * x).sum(-1)


def landscape(axes: Axes) -> None:
    starts = torch.tensor([[5.0, 4.6], [-0.9, 5.3], [-5.4, -0.6], [0.6, -5.2]], dtype=torch.float64)
    z = torch.zeros_like(starts)
    trace = minimize(energy, starts, z, solver=GradientDescent(), trace=True).trace
    assert trace is not None
    plot_landscape(energy, (-6, 6), (-6, 6), z[:1], path=trace.value, ax=axes)
    for line in axes.lines:
        line.set(linewidth=1.8 if line.get_linestyle() != "None" else 1)
    axes.set(title="minimize(energy, x0, z): four problems, one batch", aspect="equal")


def check(axes: Axes) -> None:
    """Relative difference of the gradient from (x*(z + h) − x*(z − h)) / 2h, one direction a sample."""
    start = torch.tensor([[3.0, 2.0], [-2.8, 3.1], [-3.8, -3.3], [3.6, -1.8]], dtype=torch.float64)
    z = torch.zeros_like(start, requires_grad=True)
    weight = torch.tensor([1.0, -0.5], dtype=torch.float64)
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:  # (B,): of each answer
        return minimize(energy, start, z, termination=TIGHT, on_failure="ignore").value @ weight

    (gradient,) = torch.autograd.grad(loss(z).sum(), z)
    distances = torch.logspace(0, -9, 28, dtype=torch.float64)
    with torch.no_grad():
        central = torch.stack([(loss(z + h * direction) - loss(z - h * direction)) / (2 * h) for h in distances])  # (H, B)
    exact = gradient @ direction
    errors = ((central - exact) / exact).abs().clamp_min(1e-16)
    for k, color in enumerate(COLORS):
        axes.loglog(distances, errors[:, k], "o-", color=color, markeredgecolor="0.3", markeredgewidth=0.4, markersize=4.5,
                    linewidth=1, label=f"answer {k + 1}")  # fmt: skip
    guide = distances[1:13]
    axes.loglog(guide, 12 * errors[3].mean() * (guide / distances[3]) ** 2, "--", color="0.3", linewidth=1, label="h²")
    axes.invert_xaxis()
    axes.set(title="backward() against central differences", xlabel="distance h", ylabel="relative difference")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    assert errors.amin(0).amax() < 1e-8, errors.amin(0)


def main() -> None:
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLORS)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained", width_ratios=(1.15, 1))
    figure.get_layout_engine().set(w_pad=0.12)
    landscape(left)
    check(right)
    figure.savefig(Path(__file__).with_name("readme.png"), dpi=110, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()

"""Draw the bar chart of speed: ``python docs/figures/make_speed_chart.py`` writes speed.png from docs/results/benchmarks.json.

One panel per workload, one bar per library: how many times as fast as a plain PyTorch loop it computes the answers and one
gradient. The axis is logarithmic and the bars begin at 1, the speed of the plain loop.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks.json"
OURS, PALE, TORCH, JAX = "#0b3d91", "#6f9bd8", "#9a9a9a", "#d9a441"
LIBRARIES = {  # the rows, from top to bottom
    "energynet compiled": OURS,
    "energynet eager": PALE,
    "TorchOpt": TORCH,
    "xitorch": TORCH,
    "torchdeq": TORCH,
    "jaxopt": JAX,
    "optimistix": JAX,
}
PANELS = {
    "W1": "one problem, 32 unknowns",
    "W2": "256 problems, 64 unknowns",
    "W3": "training step, 80 × 159 labels",
    "W4": "images, 4 × 64 × 64 pixels",
}
TASK = "forward + gradient"


def speeds(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Library to speed, 1 for the plain loop."""
    return {row["contender"]: 1 / row["ratio"] for row in rows if row["task"] == TASK and row["ratio"] is not None}


def panel(axes: Axes, found: dict[str, float]) -> None:
    for place, (library, color) in enumerate(LIBRARIES.items()):
        speed = found[library]
        axes.barh(place, speed - 1, left=1, color=color, height=0.72)
        words = f"{speed:#.2g}×" if speed < 10 else f"{speed:.0f}×"
        axes.annotate(words, (max(speed, 1), place), (4, 0), textcoords="offset points", va="center", fontsize=9,
                      fontweight="bold" if color == OURS else "normal")  # fmt: skip
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set_xscale("log")
    axes.set(xlim=(0.2, 400), xticks=[0.3, 1, 10, 100], xticklabels=["0.3", "1", "10", "100"])
    axes.set_yticks(range(len(LIBRARIES)), list(LIBRARIES))
    axes.minorticks_off()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def digest() -> str:
    """Of the measurements: it is written into the picture, so that a test sees when the picture is out of date."""
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()


def main() -> None:
    results = json.loads(RESULTS.read_text())
    figure, all_axes = plt.subplots(1, len(PANELS), figsize=(11.5, 3.3), sharey=True, layout="constrained")
    for axes, (name, title) in zip(all_axes, PANELS.items(), strict=True):
        panel(axes, speeds(results[name]["rows"]))
        axes.set_title(f"{name}: {title}", fontsize=10)
    all_axes[0].invert_yaxis()  # of all, since they share it
    all_axes[0].get_yticklabels()[0].set(fontweight="bold", color=OURS)
    figure.supxlabel("speed of answers and one gradient relative to a plain PyTorch loop (= 1, longer is faster; logarithmic)",
                     fontsize=10)  # fmt: skip
    kinds = {"energynet": OURS, "energynet without compilation": PALE, "other PyTorch libraries": TORCH, "JAX libraries": JAX}
    figure.legend(handles=[Patch(color=color, label=kind) for kind, color in kinds.items()], loc="outside upper center", ncols=4,
                  frameon=False, fontsize=9)  # fmt: skip
    figure.savefig(RESULTS.parent.parent / "figures" / "speed.png", dpi=110, metadata={"Source": digest()},
                   pil_kwargs={"optimize": True})  # fmt: skip


if __name__ == "__main__":
    main()

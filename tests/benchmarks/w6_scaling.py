"""W6: how time and memory grow with the batch, the unknowns, the image and the iterations."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from .contenders.ours import OursCompiled, OursEager
from .contenders.plain import Plain
from .harness import Contender, Options, Racer, Row, Watcher, quiet, race
from .least_squares import WEIGHT
from .w2_batch import batch
from .w4_images import images
from .work import Problem, Task, Work, bounded, extremes
from .workload import Workload

PATIENCE = 60.0
"""Seconds: a contender that took longer than this for one call is not asked for the next size."""
SIZES = {
    "batch": [1, 16, 256, 4096, 65_536],
    "unknowns": [8, 64, 512, 4096],
    "image side": [32, 64, 128, 256, 512],
    "iterations, times": [1, 4, 16],
}
QUICK = {"batch": [1, 4], "unknowns": [4, 8], "image side": [8, 12], "iterations, times": [1, 4]}
UNITS = {"batch": "sample", "unknowns": "unknown", "image side": "pixel", "iterations, times": "iteration"}


class Scaling(Workload):
    name: ClassVar[str] = "W6"
    title: ClassVar[str] = (
        "scaling, forward + gradient: W2 over its batch (64 unknowns) and its unknowns (batch 16), W4 over its image (one "
        "image) and its iterations (step size 1, 1/4, 1/16 of the best)"
    )

    def run(self, options: Options, watch: Watcher) -> list[Row]:
        rows: list[Row] = []
        for axis, sizes in (QUICK if options.quick else SIZES).items():
            field: list[Contender] = [Plain(), OursEager(), OursCompiled()]
            for size in sizes:
                field = self._timed(f"{axis} {size:,}", work(axis, size, options), field, options, watch, rows)
                watch.seen(rows)
        return rows

    def _timed(self, case: str, work: Work, field: Sequence[Contender], options: Options, watch: Watcher,
               rows: list[Row]) -> list[Contender]:  # fmt: skip
        """Time those still in the field; who was too slow leaves it."""
        racers = []
        for contender in field:
            watch.doing(f"{case}: {contender.name}")
            row = Row(case, Task.GRADIENT.value, contender.name, right=True)
            rows.append(row)
            call = contender.call(work, Task.GRADIENT)
            with quiet():
                call()
                row.steps = contender.steps(work, Task.GRADIENT)
            racers.append(Racer(row, call))
        race(racers, dataclasses.replace(options, repeats=min(options.repeats, 3)), lambda what: watch.doing(f"{case}: {what}"))
        return [c for c, racer in zip(field, racers, strict=True) if (racer.row.seconds or 0.0) < PATIENCE]


def work(axis: str, size: int, options: Options) -> Work:
    device = options.device
    if axis in ("batch", "unknowns"):
        small, condition, tolerance = (8, 3, 1e-3) if options.quick else (64, 20, 1e-5)
        samples, unknowns = (size, small) if axis == "batch" else (16, size)
        return bounded(batch(samples, unknowns, device, condition=condition, tolerance=tolerance), 1.0, condition + WEIGHT)
    side, filters, tolerance = (8, 3, 1e-2) if options.quick else (64, 32, 1e-4)
    problem = images(1, size if axis == "image side" else side, device, filters=filters, tolerance=tolerance)
    found = bounded(problem, 1.0, largest_curvature(filters, device))
    if axis == "image side":
        return found
    # Shorter steps by a factor: as many times the iterations to the same distance.
    shorter = dataclasses.replace(problem, tolerance=problem.tolerance / size)
    return dataclasses.replace(found, problem=shorter, step_size=found.step_size / size)


def largest_curvature(filters: int, device: str) -> float:
    """Of the image energy: where an image is flat, whatever its size."""
    flat: Problem = images(1, 16, device, filters=filters).double()
    return 1.02 * extremes(flat, torch.zeros_like(flat.x0))[1]


def points(rows: Sequence[dict], axis: str, contender: str) -> Iterator[tuple[int, float, float]]:
    """Size, seconds and MiB, from the rows as they are in the JSON."""
    for row in rows:
        if row["case"].startswith(axis) and row["contender"] == contender and row["seconds"] is not None:
            yield int(row["case"].removeprefix(axis).replace(",", "")), row["seconds"], row["peak_mib"] or 0.0


def plot(rows: Sequence[dict], path: Path) -> None:
    """Time and peak memory over size, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots(2, len(SIZES), sharex="col", sharey="row")
    for column, axis in enumerate(SIZES):
        for contender, marker in (("plain eager loop", "s"), ("energynet eager", "^"), ("energynet compiled", "o")):
            found = list(points(rows, axis, contender))
            if found:
                size, seconds, peak = zip(*found, strict=True)
                axes[0, column].loglog(size, seconds, marker=marker, label=contender, markersize=4)
                axes[1, column].loglog(size, [max(p, 1.0) for p in peak], marker=marker, markersize=4)
        axes[1, column].set_xlabel(axis)
        axes[1, column].set_xticks(SIZES[axis], [f"{size:,}" for size in SIZES[axis]], fontsize=8)
        axes[1, column].set_xticks([], minor=True)
        for ax in axes[:, column]:
            ax.grid(True, which="major", alpha=0.3)
    axes[0, 0].set_ylabel("seconds, forward + gradient")
    axes[1, 0].set_ylabel("peak memory, MiB (at least 1)")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=150)

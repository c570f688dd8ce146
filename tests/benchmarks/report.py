"""Tables for people and JSON for the documentation."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .harness import Options, Row
from .workload import Workload

PACKAGES = ["torch", "torchdeq", "torchopt", "xitorch", "jax", "jaxopt", "optimistix", "scipy", "numpy"]


def table(workload: Workload, rows: Sequence[Row]) -> Table:
    """What has been seen so far."""
    made = Table(title=f"{workload.name}: {workload.title}", title_justify="left", title_style="bold")
    made.add_column("", overflow="fold")
    for heading in ("steps", "error", "time", "ratio", "target", "compile", "peak"):
        made.add_column(heading, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        title = row.task if row.case == workload.name else f"{row.case}, {row.task}"
        if title != before:
            made.add_section()
            made.add_row(f"[bold]{title}")
            before = title
        made.add_row(*_cells(row))
    return made


def _cells(row: Row) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:.0e}" if row.right else f"[red]{row.error:.0e}"
    name = row.contender + (f" [red]({row.note})" if row.note else "")
    if row.seconds is None:
        return name, row.steps, error
    met = row.ratio is not None and row.target is not None and row.ratio <= row.target
    target = "" if row.target is None else f"[{'green' if met else 'red'}]{row.target:g} {'✓' if met else '✗'}"
    return (
        name, row.steps, error, duration(row.seconds), "" if row.ratio is None else f"{row.ratio:.3g}", target,
        "" if row.first_seconds is None or row.first_seconds < 0.1 else duration(row.first_seconds),
        "" if row.peak_mib is None else "< 1 MiB" if row.peak_mib < 1 else f"{row.peak_mib:.0f} MiB",
    )  # fmt: skip


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def machine(device: str) -> dict[str, Any]:
    """What the numbers were taken on."""
    names = "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    settings = {name: os.environ[name] for name in names if name in os.environ}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": None if device == "cpu" else torch.cuda.get_device_name(),
        "system": platform.system(),
        "openmp": settings or "as the libraries have it",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Record:
    """The file of a run: what has been seen lies beside it at once, and takes the place of an earlier run when it is complete."""

    def __init__(self, path: Path | None, workload: Workload, options: Options) -> None:
        self.path, self.workload, self.options = path, workload, options
        self.unfinished = path and path.with_suffix(".unfinished.json")

    def seen(self, rows: Sequence[Row]) -> None:
        if self.unfinished and rows:
            write(self.unfinished, self.workload, rows, self.options)

    def complete(self, rows: Sequence[Row]) -> None:
        if self.path and self.unfinished:
            write(self.path, self.workload, rows, self.options)
            self.unfinished.unlink(missing_ok=True)


def write(path: Path, workload: Workload, rows: Sequence[Row], options: Options) -> None:
    """Put a workload into the file, in the place of an earlier run of it; each says when and where it was run."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content[workload.name] = {
        "title": workload.title,
        "date": datetime.date.today().isoformat(),
        "machine": machine(options.device),
        "versions": versions(),
        "options": dataclasses.asdict(options),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(content.items())), indent=1, ensure_ascii=False) + "\n")

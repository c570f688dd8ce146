"""``python -m tests.benchmarks.accelerator``: W1 to W4 on a GPU, in float32, and the largest image in a memory.

Times are the device's own. Keep the device to it: with a second process on it every look at a result waits for a time slice.
Writes ``docs/results/accelerator.json``.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the memory at once
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # float32 proper, as PyTorch's products are

import torch
from rich.console import Console

from . import command, report
from .contenders.handwritten import HandWritten
from .contenders.ours import OursCompiled, OursEager
from .contenders.plain import Plain
from .harness import Call, Contender, Options, Row, Watcher, compete, peak, quiet, synchronize, timed
from .w1_single import Single
from .w2_batch import Batch
from .w3_labels import Labels, LabelsApart
from .w4_images import Images, images
from .w6_scaling import largest_curvature
from .work import Problem, Task, bounded, prepare
from .workload import FixedStepWorkload, Workload, installed_peers

FIXED: list[FixedStepWorkload] = [Single(), Batch(), Labels(), LabelsApart(), Images()]
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "accelerator.json"


class InFloat32(Workload):
    """A workload of fixed steps, in float32; of the drivers also how many kernels they launch."""

    def __init__(self, workload: FixedStepWorkload) -> None:
        self.workload = workload
        self.name, self.title = workload.name, workload.title.replace("float64, tol 1e-10", "float32, tol 1e-5")  # type: ignore[misc]

    def run(self, options: Options, watch: Watcher) -> list[Row]:
        watch.doing(f"{self.name}: the float64 reference")
        tasks = {t: goal for t, goal in self.workload.tasks.items() if t in (Task.FORWARD, Task.GRADIENT)}
        work = prepare(single(self.workload.problem(options)), [Task.FORWARD, Task.GRADIENT])
        drivers: list[Contender] = [Plain(), OursEager(), OursCompiled()]
        rows = compete(self.name, work, tasks, [*drivers, HandWritten(), *([] if options.skip_peers else installed_peers())],
                       options, watch)  # fmt: skip
        for row in rows:
            contender = next((c for c in drivers if c.name == row.contender), None)
            if contender is not None and row.right:
                with quiet():
                    count, busy = kernels(contender.call(work, Task(row.task)), options.device)
                each = count / sum(map(int, row.steps.split("+")))
                row.note = f"{each:.1f} kernels an iteration, device busy {100 * busy / (row.seconds or 1):.0f} %"
        watch.seen(rows)
        return rows


def single(problem: Problem) -> Problem:
    """In float32, with tolerances that it can reach."""
    if problem.x0.dtype == torch.float32:
        return problem
    return dataclasses.replace(problem.to(torch.float32), tolerance=1e-5, adjoint_tolerance=1e-5)


def kernels(call: Call, device: str) -> tuple[int, float]:
    """How many a call has the device run, and the seconds that they take."""
    from torch.profiler import ProfilerActivity, profile

    if device == "cpu":
        return 0, 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        synchronize(device)
    on_device = [e for e in seen.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    found = [e.time_range.elapsed_us() for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    return len(found), 1e-6 * sum(found)


class Largest(Workload):
    name: ClassVar[str] = "largest image"
    title: ClassVar[str] = "the largest image of W4's energy, forward + gradient, in a given memory"

    def __init__(self, gib: float) -> None:
        self.gib = gib

    def run(self, options: Options, watch: Watcher) -> list[Row]:
        rows: list[Row] = []
        for contender in (Plain(), OursEager(), OursCompiled()):
            rows.append(self._largest(contender, options, watch))
            watch.seen(rows)
        return rows

    def _largest(self, contender: Contender, options: Options, watch: Watcher) -> Row:
        """From what a smaller image takes to one that fills the memory; a little smaller where it does not fit."""
        small = 16 if options.quick else 1024
        watch.doing(f"largest image: {contender.name} at {small} × {small}")
        row = self._row(contender, small, options)
        if row.seconds is None:
            return row
        pixels = small**2 * self.gib * 1024 / max(1.0, row.peak_mib or 0.0)
        for part in (0.98, 0.9, 0.8):
            side = 64 if options.quick else int((part * pixels) ** 0.5) // 64 * 64
            watch.doing(f"largest image: {contender.name} at {side} × {side}")
            row = self._row(contender, side, options)
            if row.seconds is not None:
                break
        return row

    def _row(self, contender: Contender, side: int, options: Options) -> Row:
        row = Row(self.name, f"{self.gib:g} GiB", contender.name, right=True)
        if options.device != "cpu":
            torch.accelerator.empty_cache()
        try:
            with quiet():
                call = image(contender, side, options)
                row.peak_mib = peak(call, options.device)
                row.seconds = timed(call, 1, options.device)
        except RuntimeError as error:  # out of memory, or a kernel that cannot count so far
            row.note = f"{side} × {side}: {str(error).splitlines()[0][:100]}"
            return row
        row.note = f"{side} × {side}, {2**20 * (row.peak_mib or 0) / side**2:.0f} bytes a pixel"
        return row


def image(contender: Contender, side: int, options: Options) -> Call:
    """Per pixel as accurate as W4, whose images have 64 × 64."""
    filters, tolerance = (3, 1e-2) if options.quick else (32, 1e-4)
    problem = images(1, side, options.device, filters=filters, tolerance=tolerance * max(1.0, side / 64))
    return contender.call(bounded(problem, 1.0, largest_curvature(filters, "cpu")), Task.GRADIENT)


def main() -> None:
    arguments, console = parse(), Console(width=140)
    device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    if device == "cpu" and not arguments.quick:
        raise SystemExit("No GPU or other accelerator is seen on this machine. `--quick` runs toys on the CPU.")
    torch.backends.cudnn.allow_tf32 = False  # everyone in float32 proper
    options = Options(arguments.repeats, arguments.quick, arguments.skip_peers, device, arguments.budget)
    for workload in (*map(InFloat32, FIXED), Largest(arguments.gib)):
        if workload.name not in arguments.only:
            continue
        record = report.Record(None if options.quick else arguments.output, workload, options)
        rows = workload.run(options, Printed(record))
        console.print(report.table(workload, rows))
        record.complete(rows)


class Printed(Watcher):
    """A line for each step of the work but the rounds; what has been seen is in a file at once, should time run out."""

    def __init__(self, record: report.Record) -> None:
        self.record = record

    def doing(self, what: str) -> None:
        if "round" not in what:
            print(what, file=sys.stderr, flush=True)

    def seen(self, rows: Sequence[Row]) -> None:
        self.record.seen(rows)


def parse() -> argparse.Namespace:
    parser = command.parser("accelerator", "W1 to W4 on a GPU.")
    names = [*(w.name for w in FIXED), Largest.name]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="W", help=f"of {', '.join(names)}")
    parser.add_argument("--repeats", type=command.positive, default=7, help="rounds in which all are called in turn (default 7)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a contender may use up in one race (default 20)")
    parser.add_argument("--gib", type=float, default=100.0, help="memory that the largest image may take (default 100)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does everything run? Writes no file")
    parser.add_argument("--skip-peers", action="store_true", help="energynet and the loops by hand only")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()

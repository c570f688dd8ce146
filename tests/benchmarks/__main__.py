"""``python -m tests.benchmarks``: the table, live, and ``docs/results/benchmarks.json``."""

import argparse
import atexit
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Before PyTorch is imported: compiled code of an earlier run would make compilation look free.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="energynet-benchmarks-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner

from . import command, report
from .harness import Options, Row, Watcher
from .w1_single import Single
from .w2_batch import Batch
from .w3_labels import Labels, LabelsApart
from .w4_images import Images
from .w5_accuracy import Accuracy
from .w6_scaling import Scaling, plot
from .workload import Workload, missing_peers

WORKLOADS: list[Workload] = [Single(), Batch(), Labels(), LabelsApart(), Images(), Accuracy(), Scaling()]
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "benchmarks.json"
LOCAL = Path("results") / "benchmarks.json"  # of a run without all peers: not in the place of the table in docs/


class Screen(Watcher):
    """The table of a workload as it grows, and below it what happens now; what has been measured is kept at once."""

    def __init__(self, workload: Workload, live: Live, record: report.Record) -> None:
        self.workload, self.live, self.rows, self.started = workload, live, list[Row](), time.perf_counter()
        self.record = record
        self.spinner = Spinner("dots")

    def doing(self, what: str) -> None:
        if not self.live.console.is_terminal:  # a log shows no spinner
            self.live.console.print(f"{time.perf_counter() - self.started:4.0f} s  {what}", highlight=False)
        self.spinner.update(text=f"{time.perf_counter() - self.started:4.0f} s  {what}")
        self._show()

    def seen(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.record.seen(rows)
        self._show()

    def _show(self) -> None:
        parts = [report.table(self.workload, self.rows)] if self.rows else []
        self.live.update(Group(*parts, self.spinner))


def parse() -> argparse.Namespace:
    parser = command.parser("", "energynet and its peers on the same work.")
    names = [w.name for w in WORKLOADS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="W", help=f"of {', '.join(names)}")
    parser.add_argument("--repeats", type=command.positive, default=7, help="rounds in which all are called in turn (default 7)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does everything run? Writes no file")
    parser.add_argument("--skip-peers", action="store_true", help="energynet and the loops by hand only")
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator such as cuda")
    parser.add_argument("--output", type=Path, help=f"where the JSON goes (default {RESULTS.relative_to(RESULTS.parents[2])}, "
                        f"or {LOCAL} where a peer is missing)")  # fmt: skip
    arguments = parser.parse_args()
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    return arguments


def main() -> None:
    arguments, console = parse(), Console()
    console = console if console.is_terminal else Console(width=140)
    options = Options(arguments.repeats, arguments.quick, arguments.skip_peers, arguments.device)
    missing = [] if options.skip_peers else missing_peers()
    output = arguments.output or (None if options.quick else LOCAL if missing or options.skip_peers else RESULTS)
    where = report.machine(options.device)
    console.print(f"{where['processor']}, {where['cores']} cores, {where['threads']} threads, OpenMP {where['openmp']}; "
                  f"{', '.join(f'{k} {v}' for k, v in report.versions().items())}")  # fmt: skip
    if missing:
        console.print(f"Not installed, so not among the peers: {', '.join(missing)}. The extra [bench] has them.")
    for workload in (w for w in WORKLOADS if w.name in arguments.only):
        rows = run(workload, options, report.Record(output, workload, options), console)
        if output is not None and isinstance(workload, Scaling):
            plot([dataclasses.asdict(row) for row in rows], output.with_name("scaling.png"))


def run(workload: Workload, options: Options, record: report.Record, console: Console) -> list[Row]:
    """A workload, its table, and its place in the file; one that is interrupted shows what it has seen."""
    with Live(console=console, refresh_per_second=4, transient=True, auto_refresh=console.is_terminal) as live:
        screen = Screen(workload, live, record)
        try:
            rows = workload.run(options, screen)
        except KeyboardInterrupt:
            rows, kept = screen.rows, f" What was seen is in {record.unfinished}." if record.unfinished and screen.rows else ""
            console.print(report.table(workload, rows), f"{workload.name} was interrupted, and is not complete.{kept}")
            sys.exit(130)
    console.print(report.table(workload, rows))
    record.complete(rows)
    if record.path:
        console.print(f"{workload.name} is in {record.path}.", highlight=False)
    return rows


if __name__ == "__main__":
    main()

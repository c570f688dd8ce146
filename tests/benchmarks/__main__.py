"""``python -m tests.benchmarks``: the table, live, and ``docs/results/benchmarks.json``."""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Before PyTorch is imported: compiled code of an earlier run would make compilation look free.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="energynet-benchmarks-"))

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner

from . import report
from .harness import Options, Row, Watcher
from .w1_single import Single
from .w2_batch import Batch
from .w3_labels import Labels, LabelsApart
from .w4_images import Images
from .w5_accuracy import Accuracy
from .w6_scaling import Scaling, plot
from .workload import Workload

WORKLOADS: list[Workload] = [Single(), Batch(), Labels(), LabelsApart(), Images(), Accuracy(), Scaling()]
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "benchmarks.json"


class Screen(Watcher):
    """The table of a workload as it grows, and below it what happens now; what has been measured is kept at once."""

    def __init__(self, workload: Workload, live: Live, keep: Callable[[Sequence[Row]], None]) -> None:
        self.workload, self.live, self.rows, self.started = workload, live, list[Row](), time.perf_counter()
        self.keep = keep
        self.spinner = Spinner("dots")

    def doing(self, what: str) -> None:
        if not self.live.console.is_terminal:  # a log shows no spinner
            self.live.console.print(f"{time.perf_counter() - self.started:4.0f} s  {what}", highlight=False)
        self.spinner.update(text=f"{time.perf_counter() - self.started:4.0f} s  {what}")
        self._show()

    def seen(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.keep(rows)
        self._show()

    def _show(self) -> None:
        parts = [report.table(self.workload, self.rows)] if self.rows else []
        self.live.update(Group(*parts, self.spinner))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="energynet and its peers on the same work.")
    names = [w.name for w in WORKLOADS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="W", help=f"of {', '.join(names)}")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which all are called in turn (default 7)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does everything run? Writes no file")
    parser.add_argument("--skip-peers", action="store_true", help="energynet and the loops by hand only")
    parser.add_argument("--device", default="cpu", help="cpu, or an accelerator such as cuda")
    parser.add_argument("--output", type=Path, help=f"where the JSON goes (default {RESULTS.relative_to(RESULTS.parents[2])})")
    return parser.parse_args()


def main() -> None:
    arguments, console = parse(), Console()
    console = console if console.is_terminal else Console(width=140)
    options = Options(arguments.repeats, arguments.quick, arguments.skip_peers, arguments.device)
    output = arguments.output or (None if options.quick else RESULTS)
    where = report.machine(options.device)
    console.print(f"{where['processor']}, {where['cores']} cores, {where['threads']} threads, OpenMP {where['openmp']}; "
                  f"{', '.join(f'{k} {v}' for k, v in report.versions().items())}")  # fmt: skip
    for workload in WORKLOADS:
        if workload.name not in arguments.only:
            continue

        def keep(rows: Sequence[Row]) -> None:
            if output is not None and rows:
                report.write(output, workload, rows, options)  # noqa: B023

        with Live(console=console, refresh_per_second=4, transient=True, auto_refresh=console.is_terminal) as live:
            rows = workload.run(options, Screen(workload, live, keep))
        console.print(report.table(workload, rows))
        keep(rows)
        if output is not None and isinstance(workload, Scaling):
            plot([dataclasses.asdict(row) for row in rows], output.with_name("scaling.png"))


if __name__ == "__main__":
    main()

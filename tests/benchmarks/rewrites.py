"""What each change to the recorded programs and to Inductor's output gains: all of them against all but one.

    python -m tests.benchmarks.rewrites --json docs/results/rewrites.json
"""

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
from torch._inductor.decomposition import select_decomp_table

from energynet import Compiled, Newton, Picard, Solver
from energynet.compiled import decompositions, inductor

from . import command
from .contenders.ours import OursCompiled
from .harness import Call, Options
from .w1_single import Single
from .w2_batch import Batch
from .w3_labels import Labels
from .w4_images import Images
from .work import Task, Work, prepare
from .workload import FixedStepWorkload

IN_PLACE = "energynet.compiled.inductor.in_place"


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One change, and how it is left out: names of functions and what stands for them."""

    title: str
    without: dict[str, Callable[..., Any]]
    when_called: bool = False
    """Whether it is also left out when a compiled solve is called, and not only when it is compiled."""

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, stand_in in self.without.items():
                stack.enter_context(mock.patch(name, stand_in))
            yield


def same(source: Any) -> Any:
    return source


def without(*operators: Any) -> Callable[[], dict[Any, Any]]:
    """The table of operations that are recorded in another form, less these."""
    theirs, ours = select_decomp_table(), decompositions.recorded_as()
    kept = {**inductor.recorded_as(), **{operator: theirs[operator] for operator in operators if operator in theirs}}
    return lambda: {op: form for op, form in kept.items() if op in theirs or (op in ours and op not in operators)}


def table(*operators: Any) -> dict[str, Callable[..., Any]]:
    return {"energynet.compiled.inductor.recorded_as": without(*operators)}


aten = torch.ops.aten
REWRITES = [
    Rewrite("reuse of loop memory", {IN_PLACE: same}),
    Rewrite("sums of doubles in registers", {"energynet.compiled.inductor.folded": same}),
    Rewrite("large products by oneDNN", {"energynet.compiled.inductor.mkl_is_slow": lambda: False}),
    Rewrite("parallel parts of a batch", {"energynet.compiled.cache.how_many": lambda *_: 1}, when_called=True),
    Rewrite("expensive functions computed once", {"energynet.compiled.inductor.dear_once": lambda graph: None}),
    Rewrite("constants moved out of loops", {"energynet.compiled.loops._hoist": lambda graph, captured, carried: captured}),
    Rewrite("products with shared or thin matrices", table(aten.mm.default, aten.bmm.default)),
    Rewrite("zeroth powers, and `ones_like`", table(aten.pow.Tensor_Scalar, aten.ones_like.default)),
    Rewrite("cosh and sinh by one exponential", table(aten.cosh.default, aten.sinh.default)),
]
WORKLOADS: list[tuple[type[FixedStepWorkload], Task, Solver]] = [
    (Single, Task.GRADIENT, Picard()), (Single, Task.JACOBIAN, Picard()), (Batch, Task.GRADIENT, Picard()),
    (Labels, Task.GRADIENT, Picard()), (Images, Task.GRADIENT, Picard()), (Single, Task.GRADIENT, Newton()),
    (Batch, Task.GRADIENT, Newton()),
]  # fmt: skip


class Ours(OursCompiled):
    """With programs of its own, since drivers of another capacity share none."""

    def __init__(self, capacity: int, solver: Solver) -> None:
        super().__init__()
        self.driver, self.forward_solver = Compiled(strict=True, capacity=capacity), solver


def calls(work: Work, task: Task, solver: Solver) -> list[tuple[Rewrite | None, Call]]:
    """What is timed, compiled: first with all changes, then with all but one."""
    found: list[tuple[Rewrite | None, Call]] = []
    for k, rewrite in enumerate([None, *REWRITES]):
        with rewrite.left_out() if rewrite else contextlib.nullcontext():
            call = Ours(1000 + k, solver).call(work, task)
            call()
        found.append((rewrite, call))
    return found


def seconds(call: Call, rewrite: Rewrite | None, clock: Callable[[], float], least: float) -> float:
    """Of one call, the mean over as many as take so long."""
    with rewrite.left_out() if rewrite and rewrite.when_called else contextlib.nullcontext():
        count, begin = 0, clock()
        while (lasted := clock() - begin) < least or not count:
            call()
            count += 1
    return lasted / count


def main() -> None:
    parser = command.parser("rewrites", __doc__)
    parser.add_argument("--repeats", type=command.positive, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time, on a busy machine")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--only", nargs="*", help="workloads whose titles begin so, such as W1")
    parser.add_argument("--json", type=Path, help="where to keep the ratios, beside those that are there")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    kept: dict[str, dict[str, float]] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    torch._inductor.config.fx_graph_cache = False  # a program of an earlier run would hide what is left out
    for workload, task, solver in WORKLOADS:
        title = f"{workload.name} {task.value}" + ("" if solver == Picard() else f", {type(solver).__name__}")
        if options.only and not any(title.startswith(name) for name in options.only):
            continue
        work = prepare(workload().problem(Options(quick=options.quick)), [Task.FORWARD, task])
        racers = calls(work, task, solver)
        (_, everything), *others = racers
        print(f"\n{title}: {seconds(everything, None, clock, 0.5) * 1e3:.3f} ms with all; without", flush=True)
        for rewrite, call in others:
            assert rewrite is not None
            ratios = []  # of neighbors in time, since the speed of the machine drifts
            for _ in range(options.repeats):
                before = seconds(everything, None, clock, 0.05)
                took = seconds(call, rewrite, clock, 0.05)
                ratios.append(2 * took / (before + seconds(everything, None, clock, 0.05)))
            ratio = kept.setdefault(rewrite.title, {})[title] = round(statistics.median(ratios), 3)
            print(f"  {rewrite.title:46}{ratio:7.2f} times as long", flush=True)
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

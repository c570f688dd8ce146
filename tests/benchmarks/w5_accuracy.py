"""W5: time to a solution of given accuracy, each with its best way."""

import bisect
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from energynet import LBFGS, BarzilaiBorwein, Compiled, Eager, GradientDescent, Newton, NewtonCG

from .contenders.minimizers import (
    JaxOptMinimizer,
    Minimizer,
    OptimistixMinimizer,
    OptimistixNewton,
    Ours,
    SciPy,
    SciPyNewtonCG,
    TorchLBFGS,
)
from .harness import Options, Racer, Row, Watcher, quiet, race
from .least_squares import LeastSquares, conditioned
from .work import Problem, Task, Work, answered
from .workload import Workload

ACCURACY = 1e-6
"""‖x - x*‖ / ‖x*‖ that is asked for."""
TOLERANCES = [10.0**-k for k in range(2, 15)]
"""Each solver has tolerances of its own meaning: it gets the loosest one of these that reaches the accuracy."""


class Accuracy(Workload):
    name: ClassVar[str] = "W5"
    title: ClassVar[str] = (
        f"time to ‖x - x*‖ ≤ {ACCURACY:g} ‖x*‖, one problem of 256 unknowns, float64; steps are evaluations of the energy's "
        "gradient (+ Hessian products); ratio to the fastest peer, target: energynet's best below 1"
    )

    def run(self, options: Options, watch: Watcher) -> list[Row]:
        rows: list[Row] = []
        for condition in (10, 1_000) if options.quick else (10, 1_000, 100_000):
            rows += self._raced(condition, options, watch, rows)
            watch.seen(rows)
        return rows

    def _raced(self, condition: float, options: Options, watch: Watcher, before: list[Row]) -> list[Row]:
        case = f"condition {condition:,}"
        work = answered(problem(condition, options))
        rows, racers, minimizers = [], [], everyone(options)
        for minimizer in minimizers:
            watch.doing(f"{case}: {minimizer.name} is checked")
            row = Row(case, "solve", minimizer.name)
            rows.append(row)
            call = loosest(minimizer, work, row)
            if call is not None:
                racers.append(Racer(row, call))
        race(racers, options, lambda what: watch.doing(f"{case}: {what}"))
        judge([row for row, m in zip(rows, minimizers, strict=True) if not m.peer],
              [row for row, m in zip(rows, minimizers, strict=True) if m.peer])  # fmt: skip
        return rows


def problem(condition: float, options: Options) -> Problem:
    torch.manual_seed(0)
    m, n = (10, 8) if options.quick else (320, 256)
    A = conditioned(m, n, condition, torch.float64)
    return Problem(LeastSquares(), A.new_zeros(n), (A, torch.randn(m, dtype=torch.float64)), (1,),
                   tolerance=ACCURACY, adjoint_tolerance=ACCURACY)  # fmt: skip


def everyone(options: Options) -> list[Minimizer]:
    solvers = (LBFGS(), LBFGS(memory=40), NewtonCG(), Newton(), GradientDescent(BarzilaiBorwein()))
    compiled = [Ours(solver, Compiled(strict=True)) for solver in solvers]
    peers: list[Minimizer] = [SciPy(by_hand=False), SciPy(by_hand=True), SciPyNewtonCG(), TorchLBFGS()]
    if not options.skip_peers:
        for module, peer in (("jaxopt", JaxOptMinimizer), ("optimistix", OptimistixMinimizer)):
            peers += [peer(kind) for kind in ("LBFGS", "BFGS")] if importlib.util.find_spec(module) else []
        peers += [OptimistixNewton()] if importlib.util.find_spec("optimistix") else []
    return [Ours(LBFGS(), Eager()), *compiled, *peers]


def loosest(minimizer: Minimizer, work: Work, row: Row) -> Any:
    """The call with the loosest tolerance that is accurate enough, by bisection; None, and a note, if there is none."""

    def error(call: Callable[[], Any]) -> float:
        return work.error(Task.FORWARD, [minimizer.tensor(call())])

    try:
        with quiet():
            place = bisect.bisect_left(TOLERANCES, True, key=lambda t: error(minimizer.trial(work.problem, t)) <= ACCURACY)
            for tolerance in TOLERANCES[place : place + 2]:  # the second one, where compiled code rounds otherwise
                call = minimizer.call(work.problem, tolerance)
                started = time.perf_counter()
                row.error = error(call)
                row.first_seconds = time.perf_counter() - started
                row.right = row.error <= ACCURACY
                if row.right:
                    gradients, products = minimizer.evaluations(work.problem, tolerance)
                    row.steps = f"{gradients} + {products}" if products else str(gradients)
                    return call
    except Exception as failure:  # whatever a peer raises
        row.note = f"fails: {type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"[:160]
        return None
    row.note = "not accurate enough at any tolerance"
    return None


def judge(ours: Sequence[Row], peers: Sequence[Row]) -> None:
    """Ratios to the fastest peer; the target is the fastest of ours'."""
    timed = [row.seconds for row in peers if row.seconds is not None]
    for row in (*ours, *peers):
        row.ratio = row.seconds / min(timed) if row.seconds is not None and timed else None
    done = [row for row in ours if row.seconds is not None]
    if not done:
        return
    best = min(done, key=lambda row: row.seconds or 0.0)
    best.target = 1.0
    scipy = [row for row in peers if row.contender.startswith("SciPy L-BFGS-B") and row.right]
    fewest = min(sum(map(int, row.steps.split("+"))) for row in done)
    if scipy:
        best.note = f"fewest evaluations of ours {fewest}, of SciPy's L-BFGS-B {scipy[0].steps}"

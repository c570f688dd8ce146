"""The figures of docs/choosing.md: ``python -m tests.benchmarks.choosing --json docs/results/choosing.json``.

Steps, evaluations and products by solver and condition number, by adjoint solver and contraction; the error of a gradient by
tolerance. They are counts and errors in float64, but for rounding the same on every machine. With ``--driver`` also times of
the two drivers.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from energynet import (
    GMRES,
    LBFGS,
    MINRES,
    AdjointReport,
    Anderson,
    BarzilaiBorwein,
    BiCGSTAB,
    Broyden,
    Compiled,
    ConjugateGradient,
    Dense,
    Driver,
    Eager,
    Energy,
    GradientDescent,
    ImplicitAdjoint,
    Nesterov,
    NeumannAdjoint,
    Newton,
    NewtonCG,
    OneStepAdjoint,
    Picard,
    Solution,
    Solver,
    Termination,
    fixed_point,
    minimize,
)
from energynet._torch.autodiff import wrappers
from energynet.engine.root_gradient import Adjoint

from . import command

N = 50
LIMIT = 20_000
TIGHT = Termination(atol=1e-12, rtol=1e-12, max_steps=200_000)


class Counter(torch.autograd.Function):
    """The identity, which counts how often a function, its gradient and products with its Hessian are evaluated."""

    counts: ClassVar[list[int]] = [0, 0, 0]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Counter.counts[0] += 1
        return x.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return CountedGradient.apply(v)


class CountedGradient(torch.autograd.Function):
    """The identity on a gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        Counter.counts[1] += 1
        return v.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        Counter.counts[2] += wrappers(v)[-1].numel() // N  # several products may be taken at once
        return v


def orthogonal(seed: int) -> Tensor:  # (N, N)
    return torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


class Valley(Energy):
    """½ xᵀHx + Σ log cosh(x) / 10 − zᵀx: curvatures from about 1 to about the condition number."""

    def __init__(self, condition: float) -> None:
        super().__init__()
        basis = orthogonal(1)
        curvatures = torch.logspace(0, torch.log10(torch.tensor(condition)).item(), N, dtype=torch.float64)
        self.register_buffer("hessian", basis * curvatures @ basis.mT)

    def start(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:  # (B, N), (B, N)
        x = Counter.apply(x)
        return 0.5 * (x @ self.hessian * x).sum(-1) + 0.1 * x.cosh().log().sum(-1) - (z * x).sum(-1)


def context() -> Tensor:
    return torch.randn(1, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def solver_table() -> dict[str, Any]:
    """How much work each solver has with an energy, by condition number."""
    conditions = (1e1, 1e3, 1e5)
    solvers = {
        "`Picard()`, γ estimated": Picard(),
        "`Nesterov()`": Nesterov(),
        "`GradientDescent(BarzilaiBorwein())`": GradientDescent(BarzilaiBorwein()),
        "`Anderson()`": Anderson(),
        "`Broyden()`": Broyden(),
        "`LBFGS()`, the default": LBFGS(),
        "`NewtonCG()`": NewtonCG(),
        "`Newton()`": Newton(),
    }
    rows = []
    for name, solver in solvers.items():
        cells = []
        for condition in conditions:
            Counter.counts[:] = [0, 0, 0]
            termination = Termination(atol=0.0, rtol=1e-6, max_steps=LIMIT)
            solution = minimize(Valley(condition), None, context(), solver=solver, termination=termination, on_failure="ignore")
            _, gradients, products = Counter.counts
            cells.append(f"{int(solution.num_steps)} · {gradients + products}" if solution.converged.all() else "–")
        rows.append([name, *cells])
        print(name, cells, file=sys.stderr)
    return {
        "name": "solvers",
        "columns": ["solver", *(f"condition {c:.0e}".replace("e+0", "e") for c in conditions)],
        "rows": rows,
        "note": f"Steps · gradients and Hessian products, those of the stopping rule included, to relative tolerance 1e-6; {N} "
                f"unknowns, float64; –: not within {LIMIT} steps.",
    }  # fmt: skip


def adjoint_table() -> dict[str, Any]:
    """How many products each solver of the adjoint equation needs, and how right the inexact adjoints are."""
    report = AdjointReport()
    termination = Termination(rtol=1e-6, max_steps=LIMIT)
    solvers: list[Solver] = [ConjugateGradient(), MINRES(), GMRES(), BiCGSTAB(), Picard(), Anderson(), Broyden(), Dense()]
    adjoints: list[Adjoint] = [ImplicitAdjoint(s, termination, report) for s in solvers]
    adjoints += [NeumannAdjoint(5), NeumannAdjoint(50), OneStepAdjoint()]
    problems = [energy_problem(1e2), energy_problem(1e4), map_problem(0.9), map_problem(0.99)]
    exact = [gradient(solve, ImplicitAdjoint(Dense(), TIGHT)) for solve in problems]
    rows = []
    for adjoint in adjoints:
        cells = []
        for solve, right in zip(problems, exact):
            report.clear()
            try:
                got = gradient(solve, adjoint)
            except TypeError:  # conjugate gradients for a matrix that is not symmetric
                cells.append("refused")
                continue
            error = float((got - right).norm() / right.norm())
            steps = [int(record.num_steps.max()) for record in report.records]
            cells.append(f"{steps[0]} · {error:.0e}" if steps and error == error else "–" if error != error else f"{error:.0e}")
        rows.append([f"`{named(adjoint)}`", *cells])
        print(rows[-1], file=sys.stderr)
    return {
        "name": "adjoints",
        "columns": ["adjoint, or solver of `ImplicitAdjoint`", "energy, condition 1e2", "energy, condition 1e4",
                    "map, contraction 0.9", "map, contraction 0.99"],
        "rows": rows,
        "note": f"Steps of the adjoint solve at relative tolerance 1e-6 · relative error of the gradient; {N} unknowns, float64, "
                "x* solved to 1e-12; errors against a dense solve. –: did not converge.",
    }  # fmt: skip


def named(adjoint: Adjoint) -> str:
    if isinstance(adjoint, ImplicitAdjoint):
        return f"{type(adjoint.solver).__name__}()"
    return f"NeumannAdjoint({adjoint.terms})" if isinstance(adjoint, NeumannAdjoint) else repr(adjoint)


Problem = Callable[[Tensor, Adjoint], Solution]


def energy_problem(condition: float) -> Problem:
    energy = Valley(condition)
    return lambda z, adjoint: minimize(energy, None, z, termination=TIGHT, adjoint=adjoint, on_failure="ignore",
                                       step_size=1.9 / (condition + 0.1), solver=NewtonCG())  # fmt: skip


def map_problem(factor: float) -> Problem:
    """tanh of a rotation that shrinks by the factor: ∂g/∂x is not symmetric."""
    weight = factor * orthogonal(3)
    return lambda z, adjoint: fixed_point(lambda x, z: torch.tanh(x @ weight.mT + 0.1 * z), torch.zeros_like(z), z,
                                          termination=TIGHT, adjoint=adjoint, on_failure="ignore")  # fmt: skip


def gradient(solve: Problem, adjoint: Adjoint) -> Tensor:
    z = context().requires_grad_()
    x = solve(z, adjoint).value
    return torch.autograd.grad((x - 1).square().sum(), z)[0]


def tolerance_table() -> dict[str, Any]:
    """What a loose x* and a loose adjoint do to the gradient."""
    tolerances = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
    energy = Valley(1e3)

    def solve(forward: Termination) -> Problem:
        return lambda z, adjoint: minimize(energy, None, z, termination=forward, adjoint=adjoint, solver=Nesterov())

    exact = gradient(energy_problem(1e3), ImplicitAdjoint(Dense(), TIGHT))
    rows = []
    for forward in tolerances:
        errors = []
        for backward in tolerances:
            adjoint = ImplicitAdjoint(termination=Termination(rtol=backward))
            got = gradient(solve(Termination(atol=0.0, rtol=forward)), adjoint)
            errors.append(f"{float((got - exact).norm() / exact.norm()):.0e}")
        rows.append([f"{forward:.0e}", *errors])
    return {
        "name": "tolerances",
        "columns": ["forward ↓ adjoint →", *(f"{t:.0e}" for t in tolerances)],
        "rows": rows,
        "note": "Relative error of the gradient by the rtol of the forward solve, by `Nesterov()`, and of the adjoint, by "
                "conjugate gradients; condition 1e3, float64.",
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    """A batch of small dense problems, or a few large ones."""

    batch: int
    unknowns: int


def driver_table() -> dict[str, Any]:
    """What a compiled program costs once and saves each time."""
    rows = []
    for size in (Size(1, 32), Size(256, 64), Size(4, 2048)):
        eager, _ = training_step(Eager(), size)
        compiled, first = training_step(Compiled(), size)
        pays = first / (eager - compiled) if compiled < eager else float("inf")
        rows.append([f"{size.batch} × {size.unknowns}", f"{1e3 * eager:.1f} ms", f"{1e3 * compiled:.1f} ms", f"{first:.0f} s",
                     f"{pays:,.0f}" if pays < 1e9 else "never"])  # fmt: skip
        print(rows[-1], file=sys.stderr)
    return {
        "name": "drivers",
        "columns": ["problems × unknowns", "`Eager()`", "`Compiled()`", "first call", "pays after"],
        "rows": rows,
        "note": f"Forward and gradient by `Picard()` and conjugate gradients, float32, tolerance 1e-4, medians of 7; torch "
                f"{torch.__version__}, CPU, {torch.get_num_threads()} thread(s). Pays after: so many calls of `Eager()` take as "
                "long as those of `Compiled()` with its first.",
    }  # fmt: skip


def training_step(driver: Driver, size: Size) -> tuple[float, float]:
    """Seconds of a call, and of the first."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(size.unknowns, size.unknowns, generator=generator) / (2 * size.unknowns**0.5)
    z = torch.randn(size.batch, size.unknowns, generator=generator, requires_grad=True)

    def energy(x: Tensor, z: Tensor, A: Tensor) -> Tensor:  # (B, n), (B, n), (n, n)
        return 0.5 * (x @ A.mT - z).square().sum(-1) + 0.1 * x.square().sum(-1) + 0.1 * x.cosh().log().sum(-1)

    def call() -> float:
        begin = time.perf_counter()
        solution = minimize(energy, torch.zeros_like(z), z, A, step_size=0.7, solver=Picard(), driver=driver,
                            termination=Termination(rtol=1e-4))  # fmt: skip
        torch.autograd.grad(solution.value.square().sum(), z)
        return time.perf_counter() - begin

    first = call()
    return sorted(call() for _ in range(7))[3], first


def main() -> None:
    parser = command.parser("choosing", __doc__)
    parser.add_argument("--json", type=Path, help="where to write the tables")
    parser.add_argument("--driver", action="store_true", help="also time the drivers")
    arguments = parser.parse_args()
    tables = [solver_table(), adjoint_table(), tolerance_table(), *([driver_table()] if arguments.driver else [])]
    for table in tables:
        print("\n" + " | ".join(table["columns"]), *(" | ".join(row) for row in table["rows"]), table["note"], sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"tables": tables}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

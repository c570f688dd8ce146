"""Largest error of derivatives, solver × adjoint × problem: ``python -m tests.benchmarks.agreement [names of problems]``.

Each cell is the worst of a value, its first and its second derivatives in the context, relative to a dense Newton reference or
a closed form; of an adjoint that is not exact the first only, and its second derivative must be refused. Ends with status 1 if
a cell is above what its column allows.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from problems import TIGHT, Contraction, EncodedLogCosh, LogCosh, LogEnergy, newton_fixed_point, newton_minimum, some_context

from energynet import (
    GMRES,
    LBFGS,
    MINRES,
    Adjoint,
    Anderson,
    BarzilaiBorwein,
    BiCGSTAB,
    Broyden,
    ConjugateGradient,
    Dense,
    GradientDescent,
    ImplicitAdjoint,
    Nesterov,
    NeumannAdjoint,
    Newton,
    NewtonCG,
    OneStepAdjoint,
    Picard,
    Solver,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet.constraints import Box

from . import command

MAPS: list[Solver] = [Picard(), Anderson(), Broyden(), Nesterov()]
DESCENT: list[Solver] = [GradientDescent(), GradientDescent(BarzilaiBorwein()), LBFGS(), Newton(), NewtonCG()]
LINEAR: list[Solver] = [Picard(), Anderson(), Broyden(), GMRES(), BiCGSTAB(), Dense()]
SYMMETRIC: list[Solver] = [ConjugateGradient(), MINRES()]
INEXACT = NeumannAdjoint, OneStepAdjoint

ONCE = "checkpoint", "last=400", "Neumann(400)"  # these many steps tell nothing more after another forward solver


class Problem(NamedTuple):
    name: str
    solve: Callable[[Tensor, Solver, Adjoint], Tensor]
    exact: Callable[[Tensor], Tensor]  # of one sample
    context: Tensor
    solvers: list[Solver]
    linear: list[Solver]


def minimum(energy: torch.nn.Module, z: Tensor, linear: list[Solver]) -> Problem:
    energy = energy.requires_grad_(False)
    start = energy.start(z)[0]  # type: ignore[operator]
    return Problem(
        type(energy).__name__,
        lambda z, s, a: minimize(energy, None, z, solver=s, adjoint=a, termination=TIGHT).value,
        lambda row: newton_minimum(energy, start, row),
        z,
        [*MAPS, *DESCENT],
        linear,
    )


def problems() -> list[Problem]:
    z, zero = some_context(), torch.zeros(4, dtype=torch.float64)
    network = Contraction().requires_grad_(False)
    scales = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

    def coupled(x: Tensor, z: Tensor) -> Tensor:  # (B, 3), (B, 3)
        return 0.5 * (scales * (x - z.sinh()).square()).sum(-1) + 0.3 * x[..., :2].prod(-1)

    def boxed(row: Tensor) -> Tensor:
        """The second number lies on its bound; the others are those of the free problem with it fixed there."""
        low = torch.tensor(0.1, dtype=torch.float64)
        return torch.stack([row[0].sinh() - 0.3 * low, low, row[2].sinh()])

    inside = torch.tensor([[0.4, -1.0, 0.3], [0.5, -0.7, 0.2]], dtype=torch.float64)
    return [
        minimum(LogCosh(), z, [*SYMMETRIC, *LINEAR]),
        minimum(EncodedLogCosh(), z, [*SYMMETRIC, *LINEAR]),
        minimum(LogEnergy(), z.abs() + 0.3, [*SYMMETRIC, *LINEAR]),
        Problem("Contraction, a network",
                lambda z, s, a: fixed_point(network, z.new_zeros(2, 4), z, solver=s, adjoint=a, termination=TIGHT).value,
                lambda row: newton_fixed_point(network, zero, row), z, MAPS, LINEAR),
        Problem("coupled quadratic in a box",
                lambda z, s, a: minimize(coupled, z.new_zeros(2, 3), z, prox=Box(0.1, 2.0), solver=s, adjoint=a,
                                         termination=TIGHT).value,
                boxed, inside, MAPS, LINEAR),
    ]  # fmt: skip


def adjoints(problem: Problem) -> list[tuple[str, Adjoint, float]]:
    """Name, adjoint and the error allowed."""
    exact = [(type(s).__name__, ImplicitAdjoint(s, TIGHT), 1e-8) for s in problem.linear]
    unrolled = [("Unrolled", UnrolledAdjoint(), 1e-4), ("checkpoint", UnrolledAdjoint(checkpoint=True), 1e-4)]
    return [*exact, *unrolled, ("last=400", UnrolledAdjoint(last=400), 1e-8), ("Neumann(400)", NeumannAdjoint(400), 1e-8)]


def error(problem: Problem, solver: Solver, adjoint: Adjoint, exact: list[Tensor]) -> float:
    """The largest relative error."""
    first_only = isinstance(adjoint, INEXACT) or getattr(adjoint, "last", None) is not None
    found = derivatives(lambda z: problem.solve(z, solver, adjoint), problem.context, 1 if first_only else 2)
    if first_only:
        refused(problem, solver, adjoint)
    return max(float((f - e).abs().amax() / e.abs().amax()) for f, e in zip(found, exact, strict=False))


def derivatives(function: Callable[[Tensor], Tensor], z: Tensor, order: int) -> list[Tensor]:
    z = z.clone().requires_grad_()
    value = function(z)
    (first,) = torch.autograd.grad(value.sin().sum(), z, create_graph=order > 1)
    second = torch.autograd.grad(first.square().sum(), z) if order > 1 else ()
    return [t.detach() for t in (value, first, *second)]


def refused(problem: Problem, solver: Solver, adjoint: Adjoint) -> None:
    try:
        derivatives(lambda z: problem.solve(z, solver, adjoint), problem.context, 2)
    except RuntimeError as seen:
        if "first-order approximation" in str(seen):
            return
        raise
    raise AssertionError(f"{adjoint} gave a second derivative.")


def main() -> None:
    every = {problem.name.split()[0].rstrip(","): problem for problem in problems()}
    parser = command.parser("agreement", __doc__)
    parser.add_argument("names", nargs="*", choices=[*every], metavar="name", help=f"of {', '.join(every)}; all by default")
    bad = 0
    for problem in (every[name] for name in parser.parse_args().names or every):
        kinds = adjoints(problem)
        exact = derivatives(lambda z, p=problem: torch.stack([p.exact(row) for row in z]), problem.context, 2)  # type: ignore[misc]
        print(f"{problem.name}: rows forward, columns adjoint; largest relative error of value, first and second derivatives")
        print(f"{'':40}" + "".join(f"{name[:12]:>13}" for name, _, _ in kinds))
        for solver in problem.solvers:
            cells = []
            for name, adjoint, allowed in kinds:
                refuses = isinstance(adjoint, UnrolledAdjoint) and not solver.unrollable
                if refuses or (name in ONCE and solver is not problem.solvers[0]):
                    cells.append("")
                    continue
                try:
                    reached = error(problem, solver, adjoint, exact)
                    cells.append(f"{reached:.1e}" + ("" if reached <= allowed else "!"))
                except Exception as seen:  # whatever it is, it is not green
                    cells.append(f"{type(seen).__name__[:11]}!")
                bad += cells[-1].endswith("!")
            print(f"{str(solver)[:39]:40}" + "".join(f"{cell:>13}" for cell in cells), flush=True)
    print(f"{bad} cells above what is allowed: 1e-8, and 1e-4 for derivatives of the iterates themselves, which lag behind.")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

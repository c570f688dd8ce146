"""Largest error of first and second derivatives, solver × adjoint × problem: ``python -m tests.benchmarks.agreement``."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from problems import TIGHT, Contraction, EncodedLogCosh, LogCosh, newton_fixed_point, newton_minimum, some_context

from energynet import (
    GMRES,
    LBFGS,
    MINRES,
    Anderson,
    BarzilaiBorwein,
    BiCGSTAB,
    Broyden,
    ConjugateGradient,
    Dense,
    GradientDescent,
    ImplicitAdjoint,
    Nesterov,
    NewtonCG,
    Picard,
    Solver,
    fixed_point,
    minimize,
)

GENERAL = [Picard(), Anderson(), Broyden(), GMRES(), BiCGSTAB(), Dense()]
ANY_FORWARD = [Picard(), Anderson(), Broyden(), Nesterov()]
DESCENT = [GradientDescent(), GradientDescent(BarzilaiBorwein()), LBFGS(), NewtonCG()]


def derivatives(value: Tensor, z: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(value.sin().sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z)
    return torch.stack([first.detach(), second])


def table(name: str, solve: Callable[..., Tensor], exact: Callable[[Tensor], Tensor], forward: list[Solver],
          adjoints: list[Solver]) -> None:  # fmt: skip
    z = some_context(requires_grad=True)
    expected = derivatives(exact_rows(exact, z), z)
    print(f"{name}: rows forward, columns adjoint; largest error of first and second derivatives")
    print(f"{'':44}" + " ".join(f"{type(a).__name__[:12]:>12}" for a in adjoints))
    for solver in forward:
        errors = [(derivatives(solve(z, solver, ImplicitAdjoint(a, TIGHT)), z) - expected).abs().amax() for a in adjoints]
        print(f"{str(solver)[:43]:44}" + " ".join(f"{float(e):12.1e}" for e in errors), flush=True)


def exact_rows(reference: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.stack([reference(row) for row in z])


def main() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    for energy in (LogCosh(), EncodedLogCosh()):
        table(
            type(energy).__name__,
            lambda z, s, a, e=energy: minimize(e, None, z, solver=s, adjoint=a, termination=TIGHT).value,
            lambda row, e=energy: newton_minimum(e, zero, row),
            [*ANY_FORWARD, *DESCENT],
            [ConjugateGradient(), MINRES(), *GENERAL],
        )
    network = Contraction()
    table(
        "Contraction",
        lambda z, s, a: fixed_point(network, z.new_zeros(2, 4), z, solver=s, adjoint=a, termination=TIGHT).value,
        lambda row: newton_fixed_point(network, zero, row),
        ANY_FORWARD,
        GENERAL,
    )


if __name__ == "__main__":
    main()

"""Advice on gradients that could not be computed."""

from collections.abc import Iterator
from typing import ClassVar

import torch

from energynet.engine.advice.finding import BOUNDED, MODERATE, RIDGE, Advice, Finding
from energynet.linear import GMRES, ConjugateGradient, Dense
from energynet.solvers import Anderson, Broyden, Picard


class OfLinear(Advice):
    """The adjoint equation."""

    what: ClassVar[str]

    def nonfinite(self) -> Iterator[Finding]:
        yield Finding(
            self.case.own_input_is_nonfinite(),
            "the gradient of the loss is not finite at the solution (log, sqrt or a division in the loss)",
            "a loss that is smooth there",
        )
        yield Finding(
            self.everyone,
            f"the derivative of the {self.what} is not finite at the solution, as with sqrt or norm at 0",
            "a smooth function, such as (x.square().sum(-1) + 1e-6).sqrt() for x.norm(dim=-1)",
        )

    @property
    def more(self) -> str:
        most = self.case.termination.max_steps
        return (
            f"more steps than {most}: ImplicitAdjoint(termination=Termination(max_steps=...)), or budget={most} instead to "
            "accept the truncated gradient"
        )


class OfHessian(OfLinear):
    """H u = v, the adjoint of a minimization."""

    what = "gradient of the energy"

    def diverged(self) -> Iterator[Finding]:
        low, high = self.case.spectrum()
        saddle = low < -1e-6 * high.abs()
        seen = f"its eigenvalues reach from {self.at(low, saddle):.2g} to {self.at(high, saddle):.2g}"
        yield Finding(
            saddle,
            f"the Hessian at the solution is singular or indefinite: {seen}, so this is a saddle or a maximum",
            "solver=NewtonCG(), which leaves saddles, or another x0",
        )
        yield Finding(
            self.everyone,
            "the Hessian at the solution is singular or indefinite: moving x along some direction "
            "does not change the energy's gradient",
            RIDGE,
        )

    def exhausted(self) -> Iterator[Finding]:
        case = self.case
        low, high = case.spectrum()
        for finding in self.diverged():  # a solver without a test for this takes all of its steps
            singular = ~(low > 100 * torch.finfo(low.dtype).eps * high)
            yield finding._replace(where=finding.where & singular)
        kappa = self.at(torch.where(low > 0, high / low, torch.inf), self.everyone)
        if not isinstance(case.solver, ConjugateGradient):
            other = "adjoint=ImplicitAdjoint(ConjugateGradient()), or "
        else:
            other = "adjoint=ImplicitAdjoint(Dense()), or " if case.end.shape[-1] <= MODERATE else ""
        yield Finding(
            self.everyone,
            f"the Hessian is ill-conditioned (condition number {kappa:.0e} or more), and a gradient from here would be truncated",
            f"{other}{self.more}",
        )


class OfGiven(OfLinear):
    """The adjoint of a condition F(x) = 0 whose solution was computed outside this library."""

    what = "condition F"

    def diverged(self) -> Iterator[Finding]:
        yield Finding(
            self.everyone,
            "∂F/∂x is singular at the solution: moving x along some direction does not change F, so F does not determine x",
            "an F with as many independent equations as x has unknowns, by leaving out or fixing the others",
        )

    def exhausted(self) -> Iterator[Finding]:
        dense = self.case.end.shape[-1] <= MODERATE and not isinstance(self.case.solver, Dense)
        yield Finding(
            self.everyone,
            "∂F/∂x is ill-conditioned, and a gradient from here would be truncated",
            f"{'adjoint=ImplicitAdjoint(Dense()), or ' if dense else ''}{self.more}",
        )


class OfJacobian(OfLinear):
    """Aᵀ u = v, the adjoint of a map or a proximal step."""

    what = "map"

    def diverged(self) -> Iterator[Finding]:
        case = self.case
        is_map = case.equation.binding.step.energy_of is None
        if isinstance(case.solver, (Picard, Anderson, Broyden)):
            factor = self.at(case.contraction_factor(), self.everyone)
            yield Finding(
                self.everyone,
                f"the map does not contract at the solution (contraction factor {factor:.3g}), so the "
                "backward fixed-point iteration does not either",
                f"adjoint=ImplicitAdjoint(GMRES()), which needs no contraction{f'; while training, {BOUNDED}' if is_map else ''}",
            )
        yield Finding(self.everyone, "the equation is singular: the solution is not isolated", BOUNDED if is_map else RIDGE)

    def exhausted(self) -> Iterator[Finding]:
        case = self.case
        if isinstance(case.solver, GMRES):
            n = min(case.end.shape[-1], MODERATE)
            yield Finding(
                self.everyone,
                "the equation is ill-conditioned, and a gradient from here would be truncated",
                f"adjoint=ImplicitAdjoint(GMRES(restart={n})), or {self.more}",
            )
        yield Finding(
            self.everyone,
            "the map contracts slowly at the solution, and a gradient from here would be truncated",
            f"adjoint=ImplicitAdjoint(GMRES()), or {self.more}",
        )

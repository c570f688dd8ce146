"""Advice on fixed points that were not found, and on solutions of others that satisfy no condition."""

import math
from collections.abc import Iterator

import torch

from energynet.engine.advice.finding import BOUNDED, Finding, OfRoot
from energynet.solvers import Broyden, Picard


class OfMap(OfRoot):
    """A fixed point x = g(x)."""

    def nonfinite(self) -> Iterator[Finding]:
        yield from super().nonfinite()
        yield from self.diverged()

    def diverged(self) -> Iterator[Finding]:
        case = self.case
        factor, damping = case.contraction_factor(), case.damping()
        singular = ((case.eigenvalues - 1).abs() <= 1e-5).any(-1)
        yield Finding(
            singular,
            "∂g/∂x has the eigenvalue 1, so there is no fixed point, or there are infinitely many",
            f"make the map contract, such as by a factor of 0.9 on x{self._bounded()}",
        )
        expands = factor >= 1
        for where in (expands & ~torch.isnan(damping), expands & torch.isnan(damping)):
            cause = f"the map does not contract: its contraction factor is {self.at(factor, where):.3g}, where it must be below 1"
            part = self.at(damping, where)
            damped = "" if math.isnan(part) else f"DampedStep(g, {part:.1g}), or "
            yield Finding(where, cause, f"{damped}{self._other()}{self._bounded()}")
        yield Finding(
            self.everyone,
            f"the iteration of {type(case.solver).__name__} is unstable from this x0, or there is no fixed point",
            f"{self._other()}, or an x0 closer to the answer",
        )

    def exhausted(self) -> Iterator[Finding]:
        case, factor = self.case, self.case.contraction_factor()
        jumps = factor**case.outcome.steps < torch.finfo(factor.dtype).eps
        plain = "" if isinstance(case.solver, Picard) else "Picard(), "
        yield Finding(
            jumps,
            f"the iterates do not settle although the map contracts where they ended (contraction factor "
            f"{self.at(factor, jumps):.3g}): it jumps, or has kinks, or contracts only there",
            f"{plain}DampedStep(g, 0.2), or a map that is smooth",
        )
        slow = factor < 1 - 1e-6
        left = self.at(factor, slow)
        yield Finding(
            slow, f"the map contracts slowly: each plain step leaves {left:.4g} of the error", f"{self._other()}, or {self.more}"
        )
        yield from self.diverged()

    def _other(self) -> str:
        return "Anderson()" if isinstance(self.case.solver, Broyden) else "Broyden()"

    def _bounded(self) -> str:
        """The remedy for networks: bound their Lipschitz constant."""
        return f"; while training, {BOUNDED}" if self.case.equation.binding.tensors else ""


class OfCondition(OfRoot):
    """A solution that was computed outside this library."""

    def nonfinite(self) -> Iterator[Finding]:
        yield from self.inputs()
        yield Finding(self.case.start_is_nonfinite(), "the result of solve holds NaN or Inf", "check solve at this context")
        yield Finding(
            self.everyone,
            "F is not finite at the result of solve, which lies outside its domain",
            "an F that is finite there (log and sqrt need positive numbers), or a solve that returns a point of its domain",
        )

    def diverged(self) -> Iterator[Finding]:
        yield from self.stalled()

    def exhausted(self) -> Iterator[Finding]:
        yield from self.stalled()

    def stalled(self) -> Iterator[Finding]:
        yield Finding(
            self.everyone,
            "the point was computed less exactly than Termination requires, or F is not the condition that it satisfies",
            "a tighter tolerance where the point is computed, or implicit(..., termination=Termination(rtol=...))",
        )

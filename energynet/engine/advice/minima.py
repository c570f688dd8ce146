"""Advice on minimizations that failed."""

from collections.abc import Iterator

from torch import Tensor

from energynet.engine.advice.finding import MODERATE, RIDGE, Finding, OfRoot
from energynet.solvers import Nesterov, Newton, NewtonCG, ProjectedLBFGS
from energynet.step import Kind

_SMOOTH = "a smooth function, such as (x.square() + 1e-6).sqrt() for x.abs()"
_KINK = (
    "the gradient jumps there (a kink, as with abs, relu, max or norm), and a solver for smooth energies cannot settle at a kink",
    f"{_SMOOTH}, or the term as a prox=, such as constraints.L1(weight)",
)


class OfEnergy(OfRoot):
    """Minimization of a smooth energy."""

    def nonfinite(self) -> Iterator[Finding]:
        yield from super().nonfinite()
        yield Finding(
            self.case.slope_at_start_is_nonfinite(),
            "E(x0) is finite but its gradient is not, as with sqrt or norm at 0",
            "start elsewhere, or smooth the energy: (x.square().sum(-1) + 1e-6).sqrt() for x.norm(dim=-1)",
        )
        if self.case.solver.descends:
            yield self._no_minimizer(self.everyone)
        yield self._too_long(self.case.start, "at x0")
        yield Finding(
            self.everyone,
            "a step left the energy's domain (log or sqrt of a negative number), or overflowed",
            "a smaller step_size, or LBFGS(), which shortens such steps",
        )

    def diverged(self) -> Iterator[Finding]:
        case = self.case
        yield from self.outside()
        if not case.solver.descends:
            yield self._too_long(case.start, "at x0")
        yield self._no_minimizer(case.falls_for_ever())
        if case.solver.descends:  # no curvature along the gradient was found, yet the energy does not fall forever
            yield Finding(self.everyone, *_KINK)
        yield Finding(
            self.everyone,
            "the energy becomes steeper away from x0, so that the step is too long there, or it has no minimizer",
            f"a smaller step_size, or LBFGS(), which chooses its own; if it fails too, {RIDGE}",
        )

    def exhausted(self) -> Iterator[Finding]:
        case = self.case
        yield from self.outside()
        yield self._no_minimizer(case.falls_for_ever())
        yield Finding(case.at_a_kink() & ~case.beside_a_wall(), *_KINK)
        if not case.solver.descends:
            yield self._too_long(case.end, "where it ended")
        fall, noise = case.fall_per_step()
        rate = self.at(fall, fall > noise)
        yield Finding(fall > noise, f"progress is slow: the energy still falls, by {rate:.2g} per step", self._faster())
        if not case.solver.descends:
            yield Finding(self.everyone, "the iterates oscillate: the energy no longer decreases", self._faster())
        yield Finding(
            case.beside_a_wall(), "a wall of the energy, as of log or sqrt, is close, where curvatures are large and steps short",
            self._faster(),
        )  # fmt: skip
        yield from super().stalled()

    def stalled(self) -> Iterator[Finding]:
        yield from self.outside()
        yield self._no_minimizer(self.case.falls_for_ever())
        yield Finding(
            self.case.at_a_wall(),
            "the energy is not finite at points next to this one (a wall, as with log or sqrt)",
            "another variable, such as u with x = u.exp() for x > 0, so that the energy is finite everywhere",
        )
        yield Finding(self.case.at_a_kink(), *_KINK)
        yield from super().stalled()

    def _no_minimizer(self, where: Tensor) -> Finding:
        size, before = (self.at(self.case.termination.size(x), where) for x in (self.case.end, self.case.start))
        grown = f", and x has grown to ‖x‖ = {size:.3g}" if size > 10 * (1 + before) else ""
        return Finding(where, f"the energy has no minimizer: it keeps decreasing as far as it was evaluated{grown}", RIDGE)

    def _too_long(self, x: Tensor, there: str) -> Finding:
        limit, gamma = self.case.step_size_limit(x), self.case.step_size()
        where = gamma >= limit
        seen = f"{self.at(gamma, where):.3g} exceeds 2/L = {self.at(limit, where):.3g}"
        return Finding(
            where,
            f"the step size {seen}, where L is the largest curvature of the energy {there}",
            "a smaller step size, or leave out step_size= so that one is chosen",
        )

    def _faster(self) -> str:
        case = self.case
        if not case.solver.descends:
            return f"LBFGS(), or {self.more}"
        if isinstance(case.solver, (Newton, NewtonCG)):
            return self.more
        return f"{'Newton()' if case.end.shape[-1] <= MODERATE else 'NewtonCG()'}, or {self.more}"


class OfProx(OfRoot):
    """Minimization with a proximal term."""

    @property
    def guessed(self) -> bool:
        """Whether the step size was estimated because none was passed."""
        return self.case.equation.binding.step.guessed

    def nonfinite(self) -> Iterator[Finding]:
        yield from super().nonfinite()
        yield Finding(
            self.everyone,
            "a step left the energy's domain (log or sqrt of a negative number), or overflowed",
            "a smaller step_size" if self.guessed else "a smaller step_size, or leave out step_size= so that one is chosen",
        )

    def diverged(self) -> Iterator[Finding]:
        if not self.guessed:
            yield Finding(
                self.everyone,
                "the step size exceeds 2/L, where L is the largest curvature of the energy, or the energy is unbounded below",
                f"leave out step_size= so that one is chosen; if it still fails, {RIDGE}",
            )
        yield Finding(self.everyone, "the energy is unbounded below on the constraint set", RIDGE)

    def exhausted(self) -> Iterator[Finding]:
        yield from self._kink()
        small = "" if self.guessed else ", or the step size is too small"
        yield Finding(
            self.everyone, f"the energy is ill-conditioned{small}, so that progress is slow", f"{self._faster()}{self.more}"
        )

    def stalled(self) -> Iterator[Finding]:
        yield from self._kink()
        yield from super().stalled()

    def _kink(self) -> Iterator[Finding]:
        yield from self.outside()
        yield Finding(self.case.at_a_kink(), _KINK[0], _SMOOTH)

    def _faster(self) -> str:
        if isinstance(self.case.solver, ProjectedLBFGS):
            return ""
        if self.case.equation.binding.step.kind is Kind.BOUNDED:
            return "ProjectedLBFGS(), or "
        return "" if isinstance(self.case.solver, Nesterov) else "Nesterov(), or "

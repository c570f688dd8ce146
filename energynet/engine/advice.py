"""The text of failure messages: what happened to which samples, the likely cause, and the remedy.

The advice depends on the kind of problem, on the solver, and on the measurements of a `PostMortem`. For each sample the
first finding that applies is reported.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet.engine.equation import Linear
from energynet.engine.post_mortem import PostMortem
from energynet.linear import GMRES, ConjugateGradient
from energynet.proximal import ProximalStep
from energynet.solution import Status, first, reached, samples
from energynet.solvers import Anderson, Broyden, Nesterov, Newton, NewtonCG, Picard
from energynet.solvers.problem import Descent
from energynet.step import Kind, OptimalityStep

MODERATE = 300  # the number of unknowns up to which forming the whole matrix is cheap
RIDGE = "add a term that grows in every direction of x, such as a ridge 0.005 * x.square().sum(-1)"
BOUNDED = "keep the map contracting with energynet.regularizers.spectrally_normalized(network, 0.9)"


class Finding(NamedTuple):
    """A diagnosis that applies to some of the samples."""

    where: Tensor  # (*batch) bool
    cause: str
    remedy: str


def explained(case: PostMortem) -> str:
    """The message that describes a failure."""
    adjoint = isinstance(case.equation, Linear)
    parts = []
    for status in Status:
        left = case.outcome.status == status
        if status in (Status.CONVERGED, Status.BUDGET) or not bool(left.any()):
            continue
        for finding in _advice(case, left).findings(status):
            matching = left & finding.where
            if bool(matching.any()):
                text = f"Likely cause: {finding.cause}. Try this: {finding.remedy}."
                parts.append(f"{_head(case, status, matching)} {text} {_seen(case, matching)}")
            left = left & ~finding.where
    return ("The adjoint solve (the gradient) failed. " if adjoint else "The solve failed. ") + " ".join(parts)


def _head(case: PostMortem, status: Status, matching: Tensor) -> str:
    return f"{status.name}: {samples(matching)} {status.sentence}"


def _seen(case: PostMortem, matching: Tensor) -> str:
    what = ("relative residual",) if isinstance(case.equation, Linear) else ()
    return f"Seen: {reached(case.outcome.error, case.outcome.steps, matching, *what)} of {case.termination.limit} allowed."


class _Advice(ABC):
    """Causes with their remedies, the most certain one first; the last one for each status applies to every sample."""

    def __init__(self, case: PostMortem, failed: Tensor) -> None:
        self.case, self.failed = case, failed
        self.everyone = ~case.nobody

    def at(self, values: Tensor, where: Tensor) -> float:
        """The value of the first sample that failed in this way; NaN if there is none."""
        chosen = where & self.failed
        return float(values[first(chosen)]) if bool(chosen.any()) else math.nan

    def findings(self, status: Status) -> Iterator[Finding]:
        methods = {Status.NONFINITE: self.nonfinite, Status.DIVERGED: self.diverged, Status.STALLED: self.stalled}
        return methods.get(status, self.exhausted)()

    @abstractmethod
    def nonfinite(self) -> Iterator[Finding]: ...

    @abstractmethod
    def diverged(self) -> Iterator[Finding]: ...

    @abstractmethod
    def exhausted(self) -> Iterator[Finding]: ...

    def stalled(self) -> Iterator[Finding]:
        """No step improves the point in this dtype."""
        case = self.case
        rtol = self.at(2 * case.outcome.error / case.termination.size(case.end), self.everyone)
        loose = f"Termination(rtol={rtol:.0e})" if 0 < rtol < 0.1 else "Termination(atol=...), in units of x"
        better = "" if case.end.dtype == torch.float64 else "float64, or "
        yield Finding(
            self.everyone,
            "the tolerance lies below what rounding allows, which is about the rounding unit times the condition number",
            f"{better}a looser {loose}",
        )

    @property
    def more(self) -> str:
        most = self.case.termination.max_steps
        return f"a larger max_steps than {most}, or Termination(budget={most}) to accept the result of that many steps"


class _OfRoot(_Advice):
    """A forward solve."""

    def nonfinite(self) -> Iterator[Finding]:
        case = self.case
        yield Finding(case.start_is_nonfinite(), "x0 holds NaN or Inf", "check how x0 is computed")
        yield Finding(
            case.own_input_is_nonfinite(),
            "the context of these samples holds NaN or Inf",
            'leave these samples out, or replace missing values; on_failure="warn" trains on the others',
        )
        yield Finding(
            case.shared_input_is_nonfinite(),
            "a parameter or a shared tensor holds NaN or Inf",
            "lower the learning rate or clip gradients, if an optimizer step has caused it",
        )
        yield from self.outside()

    def outside(self) -> Iterator[Finding]:
        """The function is not defined at the initial point."""
        outside = self.case.value_at_start_is_nonfinite() & self.failed
        if bool(outside.any()):
            numbers = self.case.start[first(outside)].flatten()
            shown = ", ".join(f"{v:.3g}" for v in numbers[:3].tolist()) + (", ..." if len(numbers) > 3 else "")
            what = "the energy" if isinstance(self.case.problem, Descent) else "the map"
            yield Finding(
                outside,
                f"{what} is not finite at x0 = ({shown}): x0 or the context lies outside its domain",
                "start where it is finite (log and sqrt need positive numbers), by x0=... or start=...",
            )


class _OfEnergy(_OfRoot):
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


_KINK = (
    "the gradient jumps there (a kink, as with abs, relu, max or norm), and a solver for smooth energies cannot settle at a kink",
    "a smooth function, such as (x.square() + 1e-6).sqrt() for x.abs(), or the term as a prox=, such as constraints.L1(weight)",
)


class _OfProx(_OfRoot):
    """Minimization with a proximal term."""

    def nonfinite(self) -> Iterator[Finding]:
        yield from super().nonfinite()
        yield Finding(
            self.everyone,
            "a step left the energy's domain (log or sqrt of a negative number), or overflowed",
            "a smaller step_size, or leave out step_size= so that one is chosen",
        )

    def diverged(self) -> Iterator[Finding]:
        if not self.case.equation.binding.step.guessed:
            yield Finding(
                self.everyone,
                "the step size exceeds 2/L, where L is the largest curvature of the energy, or the energy is unbounded below",
                f"leave out step_size= so that one is chosen; if it still fails, {RIDGE}",
            )
        yield Finding(self.everyone, "the energy is unbounded below on the constraint set", RIDGE)

    def exhausted(self) -> Iterator[Finding]:
        faster = "" if isinstance(self.case.solver, Nesterov) else "Nesterov(), or "
        yield Finding(
            self.everyone,
            "the energy is ill-conditioned, or the step size is too small, so that progress is slow",
            f"{faster}{self.more}",
        )


class _OfMap(_OfRoot):
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
        factor = self.case.contraction_factor()
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


class _OfCondition(_OfRoot):
    """A solution that was computed outside this library."""

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


class _OfLinear(_Advice):
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


class _OfHessian(_OfLinear):
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


class _OfJacobian(_OfLinear):
    """Aᵀ u = v, the adjoint of a map or a proximal step."""

    what = "map"

    def diverged(self) -> Iterator[Finding]:
        case = self.case
        if isinstance(case.solver, (Picard, Anderson, Broyden)):
            factor = self.at(case.contraction_factor(), self.everyone)
            yield Finding(
                self.everyone,
                f"the map does not contract at the solution (contraction factor {factor:.3g}), so the "
                "backward fixed-point iteration does not either",
                f"adjoint=ImplicitAdjoint(GMRES()), which needs no contraction; while training, {BOUNDED}",
            )
        prox = isinstance(case.equation.binding.step, ProximalStep)
        yield Finding(self.everyone, "the equation is singular: the solution is not isolated", RIDGE if prox else BOUNDED)

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


def _advice(case: PostMortem, failed: Tensor) -> _Advice:
    step = case.equation.binding.step
    if isinstance(case.equation, Linear):
        return (_OfHessian if case.equation.symmetric else _OfJacobian)(case, failed)
    if step.kind is Kind.ENERGY:
        return _OfEnergy(case, failed)
    if step.energy_of is not None:
        return _OfProx(case, failed)
    return (_OfCondition if isinstance(step, OptimalityStep) else _OfMap)(case, failed)

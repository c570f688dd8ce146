"""The text of failure messages: what happened to which samples, the likely cause, and the remedy.

The advice depends on the kind of problem, on the solver, and on the measurements of a `PostMortem`. For each sample the
first finding that applies is reported.
"""

from torch import Tensor

from energynet.engine.advice.adjoints import OfGiven, OfHessian, OfJacobian
from energynet.engine.advice.finding import Advice
from energynet.engine.advice.maps import OfCondition, OfMap
from energynet.engine.advice.minima import OfEnergy, OfProx
from energynet.engine.equation import Linear
from energynet.engine.post_mortem import PostMortem
from energynet.solution import Status, reached, samples
from energynet.step import Kind, OptimalityStep


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


def _advice(case: PostMortem, failed: Tensor) -> Advice:
    step = case.equation.binding.step
    if isinstance(case.equation, Linear):
        if isinstance(step, OptimalityStep):
            return OfGiven(case, failed)
        return (OfHessian if case.equation.symmetric else OfJacobian)(case, failed)
    if step.kind is Kind.ENERGY:
        return OfEnergy(case, failed)
    if step.energy_of is not None:
        return OfProx(case, failed)
    return (OfCondition if isinstance(step, OptimalityStep) else OfMap)(case, failed)

"""What every piece of advice has in common: causes with their remedies, the most certain one first."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from energynet.engine.post_mortem import PostMortem
from energynet.solution import Status, first
from energynet.solvers.problem import Descent

MODERATE = 300  # the number of unknowns up to which forming the whole matrix is cheap
RIDGE = "add a term that grows in every direction of x, such as a ridge 0.005 * x.square().sum(-1)"
BOUNDED = "keep the map contracting with energynet.regularizers.spectrally_normalized(network, 0.9)"


class Finding(NamedTuple):
    """A diagnosis that applies to some of the samples."""

    where: Tensor  # (*batch) bool
    cause: str
    remedy: str


class Advice(ABC):
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


class OfRoot(Advice):
    """A forward solve."""

    def nonfinite(self) -> Iterator[Finding]:
        yield Finding(self.case.start_is_nonfinite(), "x0 holds NaN or Inf", "check how x0 is computed")
        yield from self.inputs()
        yield from self.outside()

    def inputs(self) -> Iterator[Finding]:
        """The context or a parameter is not finite."""
        yield Finding(
            self.case.own_input_is_nonfinite(),
            "the context of these samples holds NaN or Inf",
            'leave these samples out, or replace missing values; on_failure="warn" trains on the others',
        )
        yield Finding(
            self.case.shared_input_is_nonfinite(),
            "a parameter or a shared tensor holds NaN or Inf",
            "lower the learning rate or clip gradients, if an optimizer step has caused it",
        )

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

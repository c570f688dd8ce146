"""Line searches with one trial point per update: there is no loop inside the loop, and each sample searches by itself.

A solver asks for the energy and the slope at ``x + t d``, hands them to `LineSearch.judge`, and gets back which samples
take the point and which length each of the others tries next.
"""

import dataclasses
from abc import ABC
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

APPROXIMATE = 0.1  # δ of the approximate Wolfe conditions
MOST_TRIALS = 30
TOWARDS_START = 0.3  # of the length at which a search met a wall before any point that is finite
CANCELLED = 1e-8  # relative differences of energies below this are not believed


class Search(NamedTuple):
    """What a search along one direction knows; every field is ``(*batch)``."""

    energy: Tensor  # where it began
    slope: Tensor  # there, negative
    length: Tensor  # t, to be tried
    low: Tensor  # the longest one known to be too short, with energy and slope
    low_energy: Tensor
    low_slope: Tensor
    high: Tensor  # the shortest one known to be too long; infinite at first
    high_energy: Tensor  # infinite at a trial point where the energy or its slope was not finite: a wall
    trials: Tensor  # int32
    walled: Tensor  # bool: the search before this one met a trial point that is not finite

    @property
    def met_wall(self) -> Tensor:
        """Samples of which a trial point, in this search or the one before, was not finite: a wall is near."""
        return self.walled | torch.isinf(self.high_energy)

    @property
    def failed(self) -> Tensor:
        """Samples whose search found nothing: the direction is useless, or energies differ by rounding only."""
        return self.trials >= MOST_TRIALS

    def successful(self, taken: Tensor) -> Tensor:
        """Samples whose search ended well: away from walls, not by taking what was best after all trials, as at a kink."""
        return taken & (~self.failed | self.met_wall)


def begin(energy: Tensor, slope: Tensor, length: Tensor, before: Search | None = None) -> Search:
    """A search that has seen nothing yet but, if there was one, the end of the search before it."""
    zero = torch.zeros_like(energy)
    none = zero.to(torch.int32)
    walled = none.bool() if before is None else torch.isinf(before.high_energy)
    return Search(energy, slope, length, zero, energy, slope, zero + torch.inf, zero, none, walled)


class LineSearch(ABC):
    """When a trial point is good enough."""

    decrease: float
    """Part of the slope's promise that must be kept."""
    flatness: float
    """The slope at the new point may be this part of the one at the start, in magnitude."""

    def judge(self, search: Search, energy: Tensor, slope: Tensor) -> tuple[Tensor, Search]:
        """Which samples take the trial point, and the search of those that go on.

        Args:
            search: as it stood before the trial.
            energy: at the trial point, ``(*batch)``.
            slope: there, along the direction.
        """
        finite = torch.isfinite(energy) & torch.isfinite(slope)
        low_enough = _low_enough(search, energy, slope, self.decrease) & finite
        bound = self.flatness * search.slope.abs()
        # Half of the way to a wall is far enough, and after many trials the longest step that lowers the energy is.
        last = (search.trials == MOST_TRIALS - 1) & (search.high < torch.inf)
        settled = last | (torch.isinf(search.high_energy) & (search.length >= 0.5 * search.high))
        too_short = low_enough & (slope < -bound) & ~settled
        too_long = ~low_enough | ((slope > bound) & ~last)
        low = torch.where(too_short, search.length, search.low)
        low_energy = torch.where(too_short, energy, search.low_energy)
        low_slope = torch.where(too_short, slope, search.low_slope)
        high = torch.where(too_long, search.length, search.high)
        high_energy = torch.where(too_long, torch.where(finite, energy, torch.inf), search.high_energy)
        bracket = search._replace(low=low, low_energy=low_energy, low_slope=low_slope, high=high, high_energy=high_energy)
        length = torch.where(high < torch.inf, _inside(bracket), _beyond(search, slope))
        length = torch.where((search.trials == MOST_TRIALS - 2) & (low > 0) & (high < torch.inf), low, length)
        return ~(too_short | too_long), bracket._replace(length=length, trials=search.trials + 1)


@dataclasses.dataclass(frozen=True)
class Backtracking(LineSearch):
    """Shorten the step until the energy falls by a fraction of what the slope predicts.

    Example:
        >>> Backtracking()
        Backtracking(decrease=0.0001)

    Args:
        decrease: this fraction, in (0, 1/2).

    Raises:
        ValueError: if it is outside this interval.

    Source: Armijo (1966); where energies differ by rounding only, the slopes decide, as in Hager and Zhang (2005).
    """

    decrease: float = 1e-4
    flatness: ClassVar[float] = float("inf")  # type: ignore[misc]

    def __post_init__(self) -> None:
        _check(self.decrease, 0.5)


@dataclasses.dataclass(frozen=True)
class StrongWolfe(LineSearch):
    """Sufficient decrease and a slope that is flat enough: what quasi-Newton updates need.

    Example:
        >>> StrongWolfe(flatness=0.1)
        StrongWolfe(decrease=0.0001, flatness=0.1)

    Args:
        decrease: as of `Backtracking`.
        flatness: the slope's magnitude at the new point in units of that at the old one, in (decrease, 1).

    Raises:
        ValueError: if one is outside its interval.

    Source: Wolfe (1969); Nocedal and Wright (2006), section 3.5.
    """

    decrease: float = 1e-4
    flatness: float = 0.9

    def __post_init__(self) -> None:
        _check(self.decrease, min(0.5, self.flatness))
        if not self.flatness < 1:
            raise ValueError(f"flatness must be less than 1, got {self.flatness}.")


def _check(decrease: float, most: float) -> None:
    if not 0 < decrease < most:
        raise ValueError(f"decrease must lie in (0, {most}), got {decrease}.")


def _low_enough(search: Search, energy: Tensor, slope: Tensor, decrease: float) -> Tensor:
    promise = -search.length * search.slope
    known = promise > 8 * torch.finfo(energy.dtype).eps * search.energy.abs()  # else the energy cannot show it, and slopes decide
    armijo = known & (energy <= search.energy - decrease * promise)
    # How well an energy is known, its own terms do not tell: large ones may cancel in it. Slopes do not lie, so be generous.
    noise = max(8 * torch.finfo(energy.dtype).eps, CANCELLED) * search.energy.abs()
    level = (energy <= search.energy + noise) & (slope <= (2 * APPROXIMATE - 1) * search.slope)
    return armijo | level


def _inside(search: Search) -> Tensor:
    """The minimum of the parabola through what is known at both ends, kept away from them; the middle if one is a wall."""
    # Where nothing is known to be too long any end serves but an infinite one, which would leave NaN in a derivative.
    width = torch.where(search.high < torch.inf, search.high, search.low + search.length) - search.low
    bend = search.high_energy - search.low_energy - search.low_slope * width
    usable = (bend > 0) & (bend < torch.inf)
    part = -0.5 * search.low_slope * width / torch.where(usable, bend, 1)
    # How far away a wall is has to be found first, in steps of a constant factor, before the rest is bisected.
    blind = torch.where(torch.isinf(search.high_energy), torch.where(search.low > 0, 0.5, TOWARDS_START), 0.1)
    return search.low + torch.where(usable, torch.clamp(part, 0.1, 0.9), blind) * width


def _beyond(search: Search, slope: Tensor) -> Tensor:
    """Where the slope would vanish if it went on changing as it did, between twice and ten times as far."""
    change = slope - search.low_slope
    bends = change != 0
    secant = search.length - slope * (search.length - search.low) / torch.where(bends, change, 1)
    factor = torch.where(bends & torch.isfinite(secant) & (secant > 0), secant / search.length, 10)
    return search.length * torch.clamp(factor, 2, 10)

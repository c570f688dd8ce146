"""Line searches with one trial point per update: there is no inner loop, and each sample searches independently.

A solver evaluates the energy and the slope at ``x + t d`` and passes them to `LineSearch.judge`, which returns the samples
that accept the point, and the next trial length for each of the others.
"""

import dataclasses
from abc import ABC
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet._torch.numbers import check_number

APPROXIMATE = 0.1  # δ of the approximate Wolfe conditions
MOST_TRIALS = 30
TOWARDS_START = 0.3  # the factor by which a length is reduced at a wall before any finite trial point was found
CANCELLED = 1e-8  # relative differences of energies below this are treated as rounding errors


class Search(NamedTuple):
    """The state of a search along one direction; every field is ``(*batch)``."""

    energy: Tensor  # the energy at the start
    slope: Tensor  # the slope at the start, negative
    length: Tensor  # t, the next trial length
    low: Tensor  # the longest length known to be too short, with its energy and slope
    low_energy: Tensor
    low_slope: Tensor
    high: Tensor  # the shortest length known to be too long; infinite at first
    high_energy: Tensor  # infinite if the energy or its slope was not finite there: a wall
    trials: Tensor  # int32
    walled: Tensor  # bool: the previous search met a trial point that is not finite

    @property
    def met_wall(self) -> Tensor:
        """Samples with a trial point that was not finite, in this search or the previous one: a wall is near."""
        return self.walled | torch.isinf(self.high_energy)

    @property
    def failed(self) -> Tensor:
        """Samples whose search failed: the direction is useless, or the energies differ only by rounding errors."""
        return self.trials >= MOST_TRIALS

    def successful(self, taken: Tensor) -> Tensor:
        """Samples whose search succeeded: away from walls, this excludes taking the best point after all trials, as at a kink."""
        return taken & (~self.failed | self.met_wall)


def begin(energy: Tensor, slope: Tensor, length: Tensor, before: Search | None = None) -> Search:
    """A new search; ``before`` is the previous one, if there was one."""
    zero = torch.zeros_like(energy)
    none = zero.to(torch.int32)
    walled = none.bool() if before is None else torch.isinf(before.high_energy)
    return Search(energy, slope, length, zero, energy, slope, zero + torch.inf, zero, none, walled)


class LineSearch(ABC):
    """Decides when a trial point is accepted."""

    decrease: float
    """The fraction of the decrease predicted by the slope that must be achieved."""
    flatness: float
    """The largest allowed slope at the new point, in magnitude, as a fraction of the slope at the start."""

    def judge(self, search: Search, energy: Tensor, slope: Tensor) -> tuple[Tensor, Search]:
        """Which samples accept the trial point, and the search of those that continue.

        Args:
            search: the state before the trial.
            energy: the energy at the trial point, ``(*batch)``.
            slope: the slope there, along the direction.
        """
        finite = torch.isfinite(energy) & torch.isfinite(slope)
        low_enough = _low_enough(search, energy, slope, self.decrease) & finite
        bound = self.flatness * search.slope.abs()
        # Half of the way to a wall is accepted, and after many trials the longest step that lowers the energy.
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
    """Shortens the step until the energy decreases by a fraction of what the slope predicts.

    Example:
        >>> Backtracking()
        Backtracking(decrease=0.0001)

    Args:
        decrease: this fraction, in (0, 1/2).

    Raises:
        ValueError: if it is outside this interval.

    Source: Armijo (1966); where energies differ only by rounding errors, the slopes decide, as in Hager and Zhang (2005).
    """

    decrease: float = 1e-4
    flatness: ClassVar[float] = float("inf")  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_number(self, "decrease", "in (0, 0.5)", lambda v: 0 < v < 0.5)


@dataclasses.dataclass(frozen=True)
class StrongWolfe(LineSearch):
    """Requires sufficient decrease and a sufficiently flat slope, as quasi-Newton updates need.

    Example:
        >>> StrongWolfe(flatness=0.1)
        StrongWolfe(decrease=0.0001, flatness=0.1)

    Args:
        decrease: as for `Backtracking`.
        flatness: the largest ratio of the slope at the new point to that at the old one, in magnitude, in (decrease, 1).

    Raises:
        ValueError: if an argument is outside its interval.

    Source: Wolfe (1969); Nocedal and Wright (2006), section 3.5.
    """

    decrease: float = 1e-4
    flatness: float = 0.9

    def __post_init__(self) -> None:
        check_number(self, "flatness", "in (0, 1)", lambda v: 0 < v < 1)
        most = min(0.5, self.flatness)
        check_number(self, "decrease", f"in (0, {most})", lambda v: 0 < v < most)


def _low_enough(search: Search, energy: Tensor, slope: Tensor, decrease: float) -> Tensor:
    predicted = -search.length * search.slope
    # Below the rounding error of the energy, the slopes decide.
    known = predicted > 8 * torch.finfo(energy.dtype).eps * search.energy.abs()
    armijo = known & (energy <= search.energy - decrease * predicted)
    # The size of an energy does not show its rounding error, because large terms may cancel in it. Slopes are more reliable.
    noise = max(8 * torch.finfo(energy.dtype).eps, CANCELLED) * search.energy.abs()
    level = (energy <= search.energy + noise) & (slope <= (2 * APPROXIMATE - 1) * search.slope)
    return armijo | level


def _inside(search: Search) -> Tensor:
    """The minimum of the parabola through the known values, kept away from both ends; the middle if one end is a wall."""
    # Where no upper end is known, any finite one serves; an infinite one would leave NaN in a derivative.
    width = torch.where(search.high < torch.inf, search.high, search.low + search.length) - search.low
    bend = search.high_energy - search.low_energy - search.low_slope * width
    usable = (bend > 0) & (bend < torch.inf)
    part = -0.5 * search.low_slope * width / torch.where(usable, bend, 1)
    # The distance of a wall is found first, in steps of a constant factor; then the interval is bisected.
    blind = torch.where(torch.isinf(search.high_energy), torch.where(search.low > 0, 0.5, TOWARDS_START), 0.1)
    return search.low + torch.where(usable, torch.clamp(part, 0.1, 0.9), blind) * width


def _beyond(search: Search, slope: Tensor) -> Tensor:
    """The length at which the slope would vanish by extrapolation, limited to between two and ten times the current one."""
    change = slope - search.low_slope
    bends = change != 0
    secant = search.length - slope * (search.length - search.low) / torch.where(bends, change, 1)
    factor = torch.where(bends & torch.isfinite(secant) & (secant > 0), secant / search.length, 10)
    return search.length * torch.clamp(factor, 2, 10)

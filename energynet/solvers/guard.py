"""Steps of a length that nobody gave: a guess is tried, and halved where the energy shows that it is too long."""

from typing import NamedTuple

import torch
from torch import Tensor

from energynet.problem import Problem


class Guarded(NamedTuple):
    """The step size that is believed, and what was seen at the current point."""

    gamma: Tensor  # (*batch, 1)
    energy: Tensor  # of the smooth part, (*batch)
    slope: Tensor  # its gradient, (*batch, n)


def look(problem: Problem, x: Tensor, gamma: Tensor) -> tuple[Tensor, Guarded]:
    """F(x) for a step size ``(*batch, 1)``, and what the next step is judged by."""
    assert problem.smooth is not None
    return _told(problem, x, Guarded(gamma, *problem.smooth(x)))


def attempt(problem: Problem, x: Tensor, trial: Tensor, guarded: Guarded) -> tuple[Tensor, Tensor, Tensor, Guarded]:
    """The trial point where it may be taken, else x again with half the step size; whether it was, ``(*batch, 1)``, and `look`.

    It may where the energy lies below the parabola of curvature 1/γ through x: then prox-gradient steps converge. The slopes at
    both ends tell that too, and still do where a difference of energies is lost in rounding.

    Source: Beck and Teboulle (2009), FISTA with backtracking.
    """
    assert problem.smooth is not None
    with torch.no_grad():
        gap = trial - x
        energy, slope = problem.smooth(trial)
        limit = gap.square().sum(-1) / guarded.gamma.squeeze(-1)
        above = 2 * (energy - guarded.energy - (guarded.slope * gap).sum(-1))
        curved = ((slope - guarded.slope) * gap).sum(-1)  # twice the same of a quadratic energy
        fits = torch.isfinite(energy) & ((above <= limit) | (curved <= limit))
        # Where the energy is not finite already, a shorter step helps nothing: let it be seen.
        fits = fits | ~torch.isfinite(guarded.energy)
        taken = fits.unsqueeze(-1)
        gamma = torch.where(taken, guarded.gamma, 0.5 * guarded.gamma)
    x = torch.where(taken, trial, x)
    if torch.is_grad_enabled():  # of a refused point nothing may reach a derivative, not even 0 · NaN
        return x, taken, *look(problem, x, gamma)
    seen = Guarded(gamma, torch.where(fits, energy, guarded.energy), torch.where(taken, slope, guarded.slope))
    return x, taken, *_told(problem, x, seen)


def _told(problem: Problem, x: Tensor, seen: Guarded) -> tuple[Tensor, Guarded]:
    """F(x), from what was seen there."""
    gamma, _, slope = seen
    return slope if problem.land is None else (x - problem.land(x - gamma * slope, gamma)) / gamma, seen

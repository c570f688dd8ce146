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
    energy, slope = problem.smooth(x)
    residual = slope if problem.land is None else (x - problem.land(x - gamma * slope, gamma)) / gamma
    return residual, Guarded(gamma, energy, slope)


def attempt(problem: Problem, x: Tensor, residual: Tensor, guarded: Guarded) -> tuple[Tensor, Tensor, Tensor]:
    """x − γ F(x), whether it may be taken, ``(*batch, 1)``, and the step size to go on with.

    It may where the energy lies below the parabola of curvature 1/γ through x: then prox-gradient steps converge. The slopes at
    both ends tell that too, and still do where a difference of energies is lost in rounding.

    Source: Beck and Teboulle (2009), FISTA with backtracking.
    """
    assert problem.smooth is not None
    moved = x - guarded.gamma * residual
    with torch.no_grad():
        gap = moved - x
        energy, slope = problem.smooth(moved)
        limit = gap.square().sum(-1) / guarded.gamma.squeeze(-1)
        above = 2 * (energy - guarded.energy - (guarded.slope * gap).sum(-1))
        curved = ((slope - guarded.slope) * gap).sum(-1)  # twice the same of a quadratic energy
        taken = (torch.isfinite(energy) & ((above <= limit) | (curved <= limit))).unsqueeze(-1)
        # Where the energy is not finite already, a shorter step helps nothing: let it be seen.
        taken = taken | ~torch.isfinite(guarded.energy).unsqueeze(-1)
        gamma = torch.where(taken, guarded.gamma, 0.5 * guarded.gamma)
    return moved, taken, gamma

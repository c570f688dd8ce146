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

    It may where the energy lies below the parabola of curvature 1/γ through x: then prox-gradient steps converge.

    Source: Beck and Teboulle (2009), FISTA with backtracking.
    """
    assert problem.smooth is not None
    moved = x - guarded.gamma * residual
    with torch.no_grad():
        gap, energy = moved - x, guarded.energy
        after = problem.smooth(moved)[0]
        above = after - energy - (guarded.slope * gap).sum(-1)
        # A difference of energies is known to their rounding unit only.
        noise = 8 * torch.finfo(energy.dtype).eps * (energy.abs() + (guarded.slope * gap).abs().sum(-1))
        taken = (above <= 0.5 * gap.square().sum(-1) / guarded.gamma.squeeze(-1) + noise).unsqueeze(-1)
        # Where the energy is not finite already, a shorter step helps nothing: let it be seen.
        taken = taken | ~torch.isfinite(energy).unsqueeze(-1)
        gamma = torch.where(taken, guarded.gamma, 0.5 * guarded.gamma)
    return moved, taken, gamma

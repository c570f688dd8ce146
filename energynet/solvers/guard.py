"""Step sizes that the user did not give: a guess is tried, and halved where the energy shows that it is too large."""

from typing import NamedTuple

import torch
from torch import Tensor

from energynet._torch.autodiff import readable
from energynet.solvers.line_search import CANCELLED
from energynet.solvers.problem import Descent

STEEP = 100  # times as curved as was believed, as seen from both ends: such a step is too long


class Guarded(NamedTuple):
    """The step size that is believed, and what was seen at the current point."""

    gamma: Tensor  # (*batch, 1)
    energy: Tensor  # of the smooth part, (*batch)
    slope: Tensor  # its gradient, (*batch, n)


def look(problem: Descent, x: Tensor, gamma: Tensor) -> tuple[Tensor, Guarded]:
    """F(x) for a step size ``(*batch, 1)``, and what the next step is judged by."""
    return _told(problem, x, Guarded(gamma, *problem.value_and_gradient(x)))


def attempt(problem: Descent, x: Tensor, trial: Tensor, guarded: Guarded) -> tuple[Tensor, Tensor, Tensor, Guarded]:
    """The trial point where it may be taken, else x again with half the step size; whether it was, ``(*batch, 1)``, and `look`.

    It may where the energy lies below the parabola of curvature 1/γ through x: then prox-gradient steps converge. The slopes at
    both ends tell that too, and decide unless the energy rises more than its slope at x says and rounding may make of it. Where
    they tell of a far larger curvature, an infinite slope is near, from which no step of this size leads back.

    Source: Beck and Teboulle (2009), FISTA with backtracking.
    """
    with torch.no_grad():
        gap = trial - x
        energy, slope = problem.value_and_gradient(trial)
        limit = gap.square().sum(-1) / guarded.gamma.squeeze(-1)
        along = (guarded.slope * gap).sum(-1)
        above = 2 * (energy - guarded.energy - along)
        curved = ((slope - guarded.slope) * gap).sum(-1)  # twice the same of a quadratic energy; finite only where the slope is
        fits = torch.maximum(above, curved / STEEP) <= limit
        if not (readable(fits) and fits.device.type == "cpu" and bool(fits.all())):  # the usual case needs no more
            noise = _noise(x, energy, guarded)
            level = energy - guarded.energy <= torch.clamp(along, min=0) + noise
            fits = fits | ((above <= limit) & (curved <= noise)) | ((curved <= limit) & level)
        fits = fits & torch.isfinite(energy + curved)
        # Where the energy is not finite already, a shorter step helps nothing: let it be seen.
        fits = fits | ~torch.isfinite(guarded.energy)
        taken = fits.unsqueeze(-1)
        gamma = torch.where(taken, guarded.gamma, 0.5 * guarded.gamma)
    x = torch.where(taken, trial, x)
    if torch.is_grad_enabled():  # of a refused point nothing may reach a derivative, not even 0 · NaN
        return x, taken, *look(problem, x, gamma)
    seen = Guarded(gamma, torch.where(fits, energy, guarded.energy), torch.where(taken, slope, guarded.slope))
    return x, taken, *_told(problem, x, seen)


def _noise(x: Tensor, energy: Tensor, guarded: Guarded) -> Tensor:  # -> (*batch)
    """How far differences of energies may be off: terms that cancel in them are of the size of the curvature times ‖x‖²."""
    terms = torch.clamp(x.square().sum(-1), min=1) / guarded.gamma.squeeze(-1)
    rounding = 100 * torch.finfo(energy.dtype).eps
    return max(rounding, CANCELLED) * torch.maximum(energy.abs(), guarded.energy.abs()) + rounding * terms


def _told(problem: Descent, x: Tensor, seen: Guarded) -> tuple[Tensor, Guarded]:
    """F(x), from what was seen there."""
    gamma, _, slope = seen
    return problem.condition(x, gamma, slope), seen

"""Adapts a step size that the user did not pass: an estimate is tried, and halved where the energy shows it is too large."""

from typing import NamedTuple

import torch
from torch import Tensor

from energynet._torch.autodiff import readable
from energynet.solvers.line_search import CANCELLED
from energynet.solvers.problem import Descent

STEEP = 100  # a step is too long if the curvature along it exceeds the assumed one by this factor


class Guarded(NamedTuple):
    """The current step size, with the energy and its gradient at the current point."""

    gamma: Tensor  # (*batch, 1)
    energy: Tensor  # the smooth part of the energy, (*batch)
    slope: Tensor  # its gradient, (*batch, n)


def look(problem: Descent, x: Tensor, gamma: Tensor) -> tuple[Tensor, Guarded]:
    """F(x) for a step size ``(*batch, 1)``, and the values by which the next step is judged."""
    return _condition(problem, x, Guarded(gamma, *problem.value_and_gradient(x)))


def attempt(problem: Descent, x: Tensor, trial: Tensor, guarded: Guarded) -> tuple[Tensor, Tensor, Tensor, Guarded]:
    """The trial point if it is accepted, else x again with half the step size; whether it was, ``(*batch, 1)``; and `look`.

    It is accepted if the energy lies below the parabola of curvature 1/γ through x: then prox-gradient steps converge. The
    slopes at both ends give the same test with less rounding error. They decide unless the energy rises by more than its slope
    at x and rounding explain. If they show a far larger curvature, an infinite slope is near, from which no step of this size
    returns.

    Source: Beck and Teboulle (2009), FISTA with backtracking.
    """
    with torch.no_grad():
        gap = trial - x
        energy, slope = problem.value_and_gradient(trial)
        limit = gap.square().sum(-1) / guarded.gamma.squeeze(-1)
        along = (guarded.slope * gap).sum(-1)
        above = 2 * (energy - guarded.energy - along)
        curved = ((slope - guarded.slope) * gap).sum(-1)  # equal to ``above`` for a quadratic energy; finite if the slope is
        fits = torch.maximum(above, curved / STEEP) <= limit
        if not (readable(fits) and fits.device.type == "cpu" and bool(fits.all())):  # in the usual case this is enough
            noise = _noise(x, energy, guarded)
            level = energy - guarded.energy <= torch.clamp(along, min=0) + noise
            fits = fits | ((above <= limit) & (curved <= noise)) | ((curved <= limit) & level)
        fits = fits & torch.isfinite(energy + curved)
        # If the energy at x is not finite, a shorter step does not help: accept the point, so that the failure is reported.
        fits = fits | ~torch.isfinite(guarded.energy)
        taken = fits.unsqueeze(-1)
        gamma = torch.where(taken, guarded.gamma, 0.5 * guarded.gamma)
    x = torch.where(taken, trial, x)
    if torch.is_grad_enabled():  # a rejected point must not enter a derivative, not even as 0 · NaN
        return x, taken, *look(problem, x, gamma)
    now = Guarded(gamma, torch.where(fits, energy, guarded.energy), torch.where(taken, slope, guarded.slope))
    return x, taken, *_condition(problem, x, now)


def _noise(x: Tensor, energy: Tensor, guarded: Guarded) -> Tensor:  # -> (*batch)
    """The rounding error of energy differences: the terms that cancel are of the size of the curvature times ‖x‖²."""
    terms = torch.clamp(x.square().sum(-1), min=1) / guarded.gamma.squeeze(-1)
    rounding = 100 * torch.finfo(energy.dtype).eps
    return max(rounding, CANCELLED) * torch.maximum(energy.abs(), guarded.energy.abs()) + rounding * terms


def _condition(problem: Descent, x: Tensor, guarded: Guarded) -> tuple[Tensor, Guarded]:
    """F(x), from the gradient at x."""
    return problem.condition(x, guarded.gamma, guarded.slope), guarded

"""Continues from a saddle or maximum, where the gradient vanishes, along a direction of negative curvature."""

from typing import NamedTuple

import torch
from torch import Tensor

from energynet._torch.autodiff import readable, tracing
from energynet._torch.while_loop import while_loop
from energynet.solvers.problem import Descent, Proximal

TRIALS = 24  # each trial step is a quarter of the previous one
NEAR = 1e-3  # the distance from an unstable fixed point, in units of x, at which steps begin to lead away from it
AWAY = 5  # the number of these steps
FEW = 3  # the number of trials where values cannot be read, so that the loop cannot stop early


def leave(problem: Descent, x: Tensor, value: Tensor, gradient: Tensor, direction: Tensor, saddle: Tensor,
          unit: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Points with a lower energy than at a saddle, and which samples have one: a curvature caused by rounding lowers no energy.

    Args:
        problem: a minimization, possibly with bounds.
        x: ``(*batch, n)``.
        value: E(x), ``(*batch)``.
        gradient: ∇E(x), ``(*batch, n)``.
        direction: a direction of negative curvature −κ, of length 1/√κ, ``(*batch, n)``.
        saddle: which samples are at a saddle, ``(*batch)`` bool.
        unit: the scale of x, ``(*batch)``.

    Source: Moré and Sorensen (1979), On the use of directions of negative curvature in a modified Newton method.
    """
    length = torch.linalg.vector_norm(direction, dim=-1).to(unit.dtype)
    saddle = saddle & (length > 0) & torch.isfinite(length)
    direction = torch.where(((gradient * direction).sum(-1, keepdim=True) > 0), -direction, direction)
    far = torch.maximum(value.abs().to(unit.dtype).sqrt(), 0.1 * unit / torch.where(length > 0, length, 1))
    far = torch.where(far > 0, far, 1 / torch.where(length > 0, length, 1)).to(x.dtype)
    enough = value - 8 * torch.finfo(value.dtype).eps * value.abs()

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        point = x + t.unsqueeze(-1) * direction
        if isinstance(problem, Proximal):
            point = torch.clamp(point, *problem.bounds)
        point = torch.where(saddle.unsqueeze(-1), point, x)
        return point, saddle & (problem.energy(point) < enough)

    def nearer(trial: _Trial) -> _Trial:
        t = 0.25 * trial.t
        if isinstance(problem, Proximal):  # both ways, since one may lead out of the bounds
            t = torch.where(trial.t > 0, -trial.t, 0.25 * trial.t.abs())
        point, lower = at(t)
        return _Trial(t, torch.where(trial.lower.unsqueeze(-1), trial.point, point), trial.lower | lower)

    def looking(trial: _Trial) -> Tensor:
        return (saddle & ~trial.lower).any()

    if readable(saddle) and not bool(saddle.any()):
        return x, saddle
    first = _Trial(4 * far, x, torch.zeros_like(saddle))
    found: _Trial = while_loop(looking, nearer, first, TRIALS if readable(saddle) or tracing() else FEW)
    return torch.where(found.lower.unsqueeze(-1), found.point, x), found.lower


def driven_out(problem: Descent, x: Tensor, direction: Tensor, saddle: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Points to which steps lead from beside an unstable fixed point, and for which samples they do.

    The value of a nonsmooth term is unknown, so no energy decides: whether the distance grows from step to step does.

    Args:
        problem: a minimization with a prox.
        x: ``(*batch, n)``.
        direction: the direction in which steps lead away, of length one, ``(*batch, n)``.
        saddle: the samples to look at, ``(*batch)`` bool.
        unit: the scale of x, ``(*batch)``.
    """
    if readable(saddle) and not bool(saddle.any()):
        return x, saddle
    near = NEAR * torch.where(unit > 0, unit, 1).to(x.dtype).unsqueeze(-1)
    start = problem.map(x + near * direction)

    def distance(point: Tensor) -> Tensor:
        return torch.linalg.vector_norm(point - x, dim=-1)

    def onward(trial: _Trial) -> _Trial:
        point = problem.map(trial.point)
        return _Trial(distance(point), point, trial.lower & (distance(point) > trial.t))

    found: _Trial = while_loop(lambda trial: trial.lower.any(), onward, _Trial(distance(start), start, saddle), AWAY)
    return torch.where(found.lower.unsqueeze(-1), found.point, x), found.lower


class _Trial(NamedTuple):
    t: Tensor  # (*batch), in units of the direction
    point: Tensor  # (*batch, n)
    lower: Tensor  # (*batch) bool

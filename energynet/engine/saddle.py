"""Continues from a saddle or maximum, where the gradient vanishes, along a direction of negative curvature."""

from typing import NamedTuple

import torch
from torch import Tensor

from energynet._torch.autodiff import readable, tracing
from energynet._torch.while_loop import while_loop
from energynet.solvers.problem import Descent, Proximal

TRIALS = 24  # each trial step is a quarter of the previous one
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
        point, lower = at(t)
        return _Trial(t, torch.where(trial.lower.unsqueeze(-1), trial.point, point), trial.lower | lower)

    def looking(trial: _Trial) -> Tensor:
        return (saddle & ~trial.lower).any()

    if readable(saddle) and not bool(saddle.any()):
        return x, saddle
    first = _Trial(4 * far, x, torch.zeros_like(saddle))
    found: _Trial = while_loop(looking, nearer, first, TRIALS if readable(saddle) or tracing() else FEW)
    return torch.where(found.lower.unsqueeze(-1), found.point, x), found.lower


class _Trial(NamedTuple):
    t: Tensor  # (*batch), in units of the direction
    point: Tensor  # (*batch, n)
    lower: Tensor  # (*batch) bool

"""How uncertain a minimizer is, by Laplace's approximation."""

from typing import Any

import torch
from torch import Tensor

from energynet.energy import EnergyLike
from energynet.solution import Solution
from energynet.solvers import Solver
from energynet.step import GradientStep
from energynet.termination import Termination

from .linearized import FEW, Linearized


def laplace(energy: EnergyLike, x: Any, *context: Any, noise: float | Tensor = 1.0, spacing: int = 4,
            solver: Solver | None = None) -> Tensor:  # fmt: skip
    """Standard deviations of a minimizer by Laplace's approximation, which treats exp(−E/noise²) as a density.

    They are noise · √diag(H⁻¹), where H is the Hessian at x. With up to 50 unknowns, each column of H⁻¹ is computed. With more,
    one solve handles many unknowns that are far apart, namely those on a grid with the given spacing. Random signs make their
    correlations cancel on average. An image takes spacing² solves, and the error comes from correlations beyond the spacing.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> energy = lambda x, a: 0.5 * (a * x.square()).sum(-1)
        >>> a = torch.tensor([1.0, 4.0])
        >>> laplace(energy, minimize(energy, torch.ones(1, 2), a), a)
        tensor([[1.0000, 0.5000]])

    Args:
        energy: E(x, \\*context) -> ``(B,)``.
        x: the minimizer, a `Solution` or a tensor ``(B, ...)``; its last two dimensions, or its last, are the grid.
        context: the energy's other arguments.
        noise: the standard deviation that scales the density, a number or one per sample ``(B,)``: σ if E contains ½‖x − y‖².
        spacing: the spacing of the grid.
        solver: solves the linear equations; default `ConjugateGradient`, or the whole Hessian with few unknowns.

    Returns:
        Like x; NaN in samples whose equation could not be solved, or whose Hessian is not positive definite.

    Raises:
        TypeError: if x is not one tensor.
        ValueError: if the spacing is not positive.

    Source: MacKay (1992), A practical Bayesian framework for backpropagation networks; Tang and Saad (2012), A probing method
        for computing the diagonal of a matrix inverse.
    """
    value = x.value if isinstance(x, Solution) else x
    if not isinstance(value, Tensor):
        raise TypeError(f"laplace needs x to be one tensor, got {type(value).__name__}. Stack its parts into one.")
    if spacing < 1:
        raise ValueError(f"spacing must be at least 1, got {spacing}.")
    at = Linearized.of(GradientStep(energy), value, context, 1)
    colors = torch.arange(at.x.shape[-1], device=at.x.device) if at.x.shape[-1] <= FEW else _colors(value[0], spacing)
    signs = torch.randint(2, colors.shape, generator=torch.Generator().manual_seed(0)).to(at.x) * 2 - 1
    diagonal = torch.zeros_like(at.x)
    for color in range(int(colors.amax()) + 1):
        probe = torch.where(colors == color, signs, 0).expand_as(at.x)
        column, failed = at.solve(probe, solver, Termination(rtol=1e-3, max_steps=10_000))
        diagonal += torch.where(failed.unsqueeze(-1), torch.nan, probe * column)
    scale = noise.reshape(-1, 1) if isinstance(noise, Tensor) else noise
    return (scale * diagonal.sqrt()).reshape(value.shape)


def _colors(sample: Tensor, spacing: int) -> Tensor:  # -> (n,)
    """A coloring of the grid points, in which points of the same color are far apart."""
    places = [torch.arange(size, device=sample.device) % spacing for size in sample.shape[-2:]]
    grid = places[0] if len(places) == 1 else places[0][:, None] * spacing + places[1]
    return grid.expand(sample.shape).flatten()

"""Contraction and curvature at a point: how fast a solver can be there."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from energynet.energy import EnergyLike
from energynet.solvers.spectrum import arnoldi, ritz_values, some_direction
from energynet.step import GradientStep

from .linearized import Linearized, StepLike


@dataclasses.dataclass(frozen=True)
class Curvature:
    """The extreme eigenvalues of a Hessian, and the step sizes of gradient descent that they imply, per sample.

    Example:
        >>> import torch
        >>> seen = Curvature(smallest=torch.tensor([1.0]), largest=torch.tensor([3.0]))
        >>> seen.best_step_size, seen.best_contraction
        (tensor([0.5000]), tensor([0.5000]))

    Args:
        smallest: μ, ``(B,)``; it is not positive where the energy is flat or not convex.
        largest: L, ``(B,)``.

    Source: Nesterov (2004), Introductory lectures on convex optimization, theorem 2.1.15.
    """

    smallest: Tensor
    largest: Tensor

    @property
    def condition(self) -> Tensor:
        """L/μ, ``(B,)``; infinite where the energy is not strongly convex."""
        return torch.where(self.smallest > 0, self.largest / self.smallest, torch.inf)

    @property
    def safe_step_size(self) -> Tensor:
        """1/L, ``(B,)``: with this step size the energy never rises."""
        return torch.where(self.largest > 0, 1 / self.largest, torch.inf)

    @property
    def step_size_limit(self) -> Tensor:
        """2/L, ``(B,)``: larger steps diverge."""
        return 2 * self.safe_step_size

    @property
    def best_step_size(self) -> Tensor:
        """2/(L + μ), ``(B,)``: the fastest constant step size; 1/L where the energy is not strongly convex."""
        return torch.where(self.smallest > 0, 2 / (self.largest + self.smallest), self.safe_step_size)

    @property
    def best_contraction(self) -> Tensor:
        """(L − μ)/(L + μ), ``(B,)``: the contraction factor of the best step size; infinite where no step size contracts."""
        ratio = (self.largest - self.smallest) / (self.largest + self.smallest)
        return torch.where(self.smallest > 0, ratio, torch.inf)


def contraction_factor(step: StepLike, x: Any, *context: Any, batch_dims: int = 1, products: int = 40) -> Tensor:
    """The spectral radius of ∂g/∂x: the asymptotic factor by which an iteration reduces a small error; it converges below 1.

    Example:
        >>> import torch
        >>> turn = torch.tensor([[0.0, -0.5], [0.5, 0.0]])     # eigenvalues ±0.5i
        >>> contraction_factor(lambda x, z: x @ turn.mT + z, torch.zeros(3, 2), torch.ones(3, 2))
        tensor([0.5000, 0.5000, 0.5000])

    Args:
        step: g, or a `Step`; an energy as ``GradientStep(energy, step_size)``.
        x: the point, usually x*: ``(B, ...)``, a pytree of such, or a `Solution`.
        context: the step's other arguments.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem; an energy determines it itself.
        products: the largest number of Jacobian products. With n or more, the result is exact; with fewer, it is a good
            estimate of the outermost eigenvalues.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: if the step has no step size, or does not return the shapes of x.

    Source: Lanczos (1950) for energies, Arnoldi (1951) for maps.
    """
    at = Linearized.of(step, x, context, batch_dims)
    start = some_direction(torch.zeros_like(at.x))
    if at.step.symmetric:
        return (1 - at.gamma * ritz_values(at.product, start, products)).abs().amax(-1)
    return arnoldi(lambda p: p - at.gamma * at.product(p), start, products).abs().amax(-1)


def curvature(energy: EnergyLike, x: Any, *context: Any, products: int = 40) -> Curvature:
    """The smallest and the largest curvature of an energy at a point, and the step sizes that they imply.

    Example:
        >>> import torch
        >>> curvature(lambda x: (torch.tensor([1.0, 4.0]) * x.square()).sum(-1), torch.ones(1, 2)).step_size_limit
        tensor([0.2500])

    Args:
        energy: E(x, \\*context) -> ``(B,)``.
        x: the point, usually x*: ``(B, ...)``, a pytree of such, or a `Solution`.
        context: the energy's other arguments.
        products: the largest number of Hessian products. With n or more, the result is exact; with fewer, L is slightly
            underestimated and μ overestimated.

    Returns:
        `Curvature`, each ``(B,)``.

    Source: Lanczos (1950).
    """
    at = Linearized.of(GradientStep(energy), x, context, 1)
    values = ritz_values(at.product, some_direction(torch.zeros_like(at.x)), products)
    return Curvature(values.amin(-1), values.amax(-1))

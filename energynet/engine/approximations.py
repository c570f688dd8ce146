"""Approximations of a Hessian at a point, on flat vectors: preconditioners, and the quadratics that an energy provides."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energynet._torch.autodiff import gradient_of_sum, linearize, pullback, pushforward, transform_active
from energynet._torch.tree import Layout
from energynet.solvers.preconditioner import HessianPreconditioner, KnowsMajorizer, Place, Preconditioner, applied
from energynet.step import Step

Flat = Callable[[Tensor], Tensor]  # (*batch, n) -> (*batch, n)


@dataclasses.dataclass(frozen=True, eq=False)
class At:
    """A step, its code and a point ``(*batch, n)``."""

    layout: Layout
    step: Step
    code: tuple[Any, ...]
    x: Tensor

    def preconditioner(self, made: Preconditioner) -> Flat:
        """r -> M⁻¹ r, M ≈ ∂F/∂x."""
        return self._made(made, jacobian(self._optimality, self.x, self.step.symmetric), self.step.energy_of, self.code)

    def quadratic(self) -> tuple[Callable[..., Tensor], Flat]:
        """The quadratic that the energy provides, and p -> A p with its matrix."""
        energy = self.step.energy_of
        assert isinstance(energy, KnowsMajorizer)
        above = energy.majorizer(self.layout.unravel(self.x), *self.code)

        def slope(u: Tensor) -> Tensor:
            return self.layout.ravel(gradient_of_sum(above, self.layout.unravel(u))).to(u.dtype)

        return above, jacobian(slope, self.x, True)

    def quadratic_preconditioner(self, made: Preconditioner, above: Callable[..., Tensor], product: Flat) -> Flat:
        """r -> M⁻¹ r, M ≈ A."""
        return self._made(made, product, above, ())

    def _made(self, made: Preconditioner, product: Flat, energy: Any, code: tuple[Any, ...]) -> Flat:
        layout = self.layout
        place = Place(layout.unravel(self.x), code, energy, layout.ravel, layout.unravel, product, layout.batch_dims)
        if isinstance(made, HessianPreconditioner):
            return made.inverse(place)
        return applied(made, dataclasses.replace(place, code=self.code))

    def _optimality(self, x: Tensor) -> Tensor:
        return self.layout.ravel(self.step.optimality(self.layout.unravel(x), *self.code)).to(x.dtype)


def jacobian(residual: Flat, x: Tensor, symmetric: bool) -> Flat:
    """p -> ∂F/∂x p. The Jacobian of a gradient is symmetric, so a vector-Jacobian product suffices."""
    if not transform_active() and not torch.is_grad_enabled():
        return linearize(residual, x, transposed=symmetric)

    def product(p: Tensor) -> Tensor:
        return or_zero(pullback(residual, [x], p)[0], x) if symmetric else pushforward(residual, [x], [p])

    return product


def or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Zeros for a gradient that is None."""
    return torch.zeros_like(like) if gradient is None else gradient

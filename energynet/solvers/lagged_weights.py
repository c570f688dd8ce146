"""Majorization-minimization with quadratics, batched per sample."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from energynet._torch.numbers import check_number, check_whole
from energynet.energy import EnergyLike
from energynet.solvers.preconditioner import KnowsMajorizer, Preconditioner, check_preconditioner
from energynet.solvers.problem import Minimization
from energynet.solvers.trust_region import Ball, TrustRegion, attempt, truncated_step


@dataclasses.dataclass(frozen=True)
class LaggedWeights(TrustRegion):
    """Repeatedly minimizes a quadratic that touches the energy at x and lies nowhere below it, so that the energy never rises.

    It is meant for energies that are sums of φ(t) = ψ(t²) over linear maps t of x with ψ concave, such as robust data terms and
    regularizers of images, convex or not: ½ w t² with the weight w = φ′(t)/t at x lies above φ and touches it at x. The energy
    provides these quadratics by a method ``majorizer(x, *code)``, which returns a function u -> ``(B,)``; the code is the result
    of `Energy.encode`. Conjugate gradients minimize them. One step costs up to ``inner`` products with the
    matrix of the quadratic, and one evaluation.

    Example:
        >>> import torch
        >>> from energynet import Energy, minimize
        >>> class Robust(Energy):                                                          # ½ (x − z)² + Σ √(1 + differences²)
        ...     def evaluate(self, x, z):                                                  # (B, n) twice
        ...         return 0.5 * (x - z).square().sum(-1) + (1 + x.diff().square()).sqrt().sum(-1)
        ...     def majorizer(self, x, z):
        ...         weight = (1 + x.diff().square()).rsqrt()
        ...         return lambda u: 0.5 * (u - z).square().sum(-1) + 0.5 * (weight * u.diff().square()).sum(-1)
        >>> minimize(Robust(), torch.zeros(2, 5), torch.randn(2, 5), solver=LaggedWeights()).value.shape
        torch.Size([2, 5])

    Args:
        inner: the largest number of products per step.
        accuracy: the factor by which the gradient of a quadratic is reduced. Since the weights change after each step, more
            accuracy rarely pays off.
        preconditioner: a preconditioner for the quadratic, as for `ConjugateGradient`; `HessianDiagonal` is exact if the result
            of ``majorizer`` has a method ``hessian_diagonal(u)``.

    Raises:
        ValueError: if inner < 1 or accuracy is not in (0, 1).
        TypeError: if the preconditioner is not valid; at a solve, if the energy has no ``majorizer``.

    Source: Geman and Reynolds (1992), half-quadratic regularization; Vogel and Oman (1996), lagged diffusivity; Hunter and Lange
        (2004), A tutorial on MM algorithms.
    """

    inner: int = 50
    accuracy: float = 0.1
    preconditioner: Preconditioner | None = None
    radius: ClassVar[float] = 1e3  # type: ignore[misc]  # limits steps where a quadratic has no curvature

    def __post_init__(self) -> None:
        check_whole(self, "inner")
        check_number(self, "accuracy", "in (0, 1)", lambda v: 0 < v < 1)
        check_preconditioner(self.preconditioner, "preconditioner")

    def require(self, energy: EnergyLike | None) -> None:
        if not isinstance(energy, KnowsMajorizer):
            name = getattr(energy, "__qualname__", None) or type(energy).__name__
            raise TypeError(
                f"LaggedWeights needs an Energy with a method majorizer(x, *code), which returns the quadratic u -> (B,) that "
                f"touches it at x, but {name} has none. Define it, or use NewtonCG() or LBFGS()."
            )

    def update(self, problem: Minimization, x: Tensor, state: Ball) -> tuple[Tensor, Ball]:
        product, solve = problem.majorized(self.preconditioner, x)
        nowhere = torch.zeros_like(state.walled)
        inner = truncated_step(product, state, self.inner, nowhere, solve=solve, accuracy=self.accuracy)
        return attempt(problem, x, state, inner.step, inner.image, ~nowhere)



"""Problems: immutable descriptions of what is solved, independent of the solver."""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from energynet._torch.autodiff import columns
from energynet._torch.while_loop import while_loop
from energynet.solvers.preconditioner import Inverse, Preconditioner
from energynet.solvers.spectrum import ritz_values, some_direction


@dataclasses.dataclass(frozen=True)
class Problem(ABC):
    """Find x, ``(*batch, n)``, with F(x) = 0; the map g(x) = x − γ F(x) may converge to it.

    Args:
        residual: the optimality condition F, ``(*batch, n) -> (*batch, n)``.
    """

    residual: Callable[[Tensor], Tensor]
    batch_dims: int = dataclasses.field(default=1, kw_only=True)
    """The number of leading batch dimensions."""

    @property
    @abstractmethod
    def gamma(self) -> float | Tensor:
        """γ, a float or ``(*batch, 1)``."""

    def map(self, x: Tensor) -> Tensor:
        """The fixed-point map g(x) = x − γ F(x)."""
        return self.move(x, self.residual(x))

    def move(self, x: Tensor, residual: Tensor) -> Tensor:
        """g(x), given F(x)."""
        return x - self.gamma * residual

    def each_gamma(self, x: Tensor) -> Tensor:
        """γ per sample, ``(*batch, 1)``."""
        return torch.zeros_like(x.detach().sum(-1, keepdim=True)) + self.gamma


@final
@dataclasses.dataclass(frozen=True)
class Map(Problem):
    """The fixed point of a map, with F(x) = x − g(x) up to damping, so that F has the units of ``x``.

    Example:
        >>> import torch
        >>> Map(lambda x: x - (0.5 * x + 1)).map(torch.zeros(1, 2))
        tensor([[1., 1.]])

    Args:
        residual: F, ``(*batch, n) -> (*batch, n)``.
        step_size: γ, such as the damping of a `DampedStep`.
    """

    step_size: float | Tensor = dataclasses.field(default=1.0, kw_only=True)

    @property
    def gamma(self) -> float | Tensor:
        return self.step_size


@dataclasses.dataclass(frozen=True)
class Differentiable(Problem, ABC):
    """A problem with derivatives of F, which convert F to units of ``x``."""

    jacobian: Callable[[Tensor], Callable[[Tensor], Tensor]]
    """x -> (p -> ∂F/∂x p), linearized once and reused for each p."""
    step_size: float | Tensor | None = dataclasses.field(default=None, kw_only=True)
    """γ; None: `gamma` estimates it."""
    start: Tensor = dataclasses.field(kw_only=True)
    """The initial point, ``(*batch, n)``, at which γ is estimated."""
    approximate: Callable[[Preconditioner, Tensor], Inverse] | None = dataclasses.field(default=None, kw_only=True)
    """(preconditioner, x) -> (p -> M⁻¹ p), M ≈ ∂F/∂x; None where the step that defines F is not known."""

    @property
    def has_newton_step(self) -> bool:
        """Whether a Newton step measures the distance to the solution: ∂F/∂x is a Hessian, at least for free coordinates."""
        return False

    def hvp(self, x: Tensor, p: Tensor) -> Tensor:
        """∂F/∂x p; for a minimization, this is the Hessian-vector product."""
        return self.jacobian(x)(p)

    def matrix(self, x: Tensor) -> Tensor:  # -> (*batch, n, n)
        """∂F/∂x itself, in float32 or better: no half-precision factorizations exist."""
        working = torch.promote_types(x.dtype, torch.float32)
        return columns(self.jacobian(x), x).movedim(0, -1).to(working)

    def inverse(self, preconditioner: Preconditioner | None, x: Tensor) -> Callable[[Tensor], Tensor]:
        """r -> M⁻¹ r; r itself if there is no preconditioner, and where M⁻¹ r is not a descent direction."""
        if preconditioner is None or self.approximate is None:
            return lambda r: r
        return _downhill(self.approximate(preconditioner, x))

    def first_inverse(self, preconditioner: Preconditioner | None) -> Callable[[Tensor], Tensor]:
        """The same at the initial point, computed once."""
        if id(preconditioner) not in self._made:
            self._made[id(preconditioner)] = self.inverse(preconditioner, self.start)
        return self._made[id(preconditioner)]

    @functools.cached_property
    def _made(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {}

    @functools.cached_property
    def gamma(self) -> float | Tensor:
        """γ as passed, or a safe value from the curvature at the initial point, ``(*batch, 1)``."""
        if self.step_size is not None:
            return self.step_size
        with torch.no_grad():
            return self._guarded(self.start, safe_step_size(self.jacobian(self.start), self.residual(self.start)))

    def _guarded(self, x: Tensor, gamma: Tensor) -> Tensor:
        """The step size, reduced if the first step shows that it is too large."""
        return gamma


@final
@dataclasses.dataclass(frozen=True)
class Condition(Differentiable):
    """A root of any other optimality condition, such as that of an external solver."""


@final
@dataclasses.dataclass(frozen=True)
class Linear(Differentiable):
    """The equation A u = v, so F(u) = A u − v; tolerances are relative to v."""

    right: Tensor = dataclasses.field(kw_only=True)  # v, (*batch, n)
    symmetric: bool = dataclasses.field(default=False, kw_only=True)
    """Whether A is symmetric."""
    noise: Tensor | float = dataclasses.field(default=0.0, kw_only=True)
    """The rounding error of v, ``(*batch)``."""
    flat: Tensor | float = dataclasses.field(default=0.0, kw_only=True)
    """Curvatures below this, ``(*batch)``, are unknown: conjugate gradients stop where they meet one."""


@dataclasses.dataclass(frozen=True)
class Descent(Differentiable, ABC):
    """A problem with an energy, by whose values a step can be judged."""

    guessed: bool = dataclasses.field(default=False, kw_only=True)
    """Whether γ is an estimate that may turn out too large during the solve."""

    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]] = dataclasses.field(kw_only=True)
    """x -> the smooth part of the energy, ``(*batch)``, and its gradient, evaluated together."""

    def energy(self, x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
        """The smooth part of the energy."""
        return self.value_and_gradient(x)[0]

    @abstractmethod
    def condition(self, x: Tensor, gamma: Tensor, slope: Tensor) -> Tensor:
        """F(x) for a step size ``(*batch, 1)``, given the gradient of the smooth part."""


@final
@dataclasses.dataclass(frozen=True)
class Proximal(Descent):
    """The minimum of the sum of a smooth energy and a nonsmooth term; F is the prox-gradient mapping."""

    land: Callable[[Tensor, Tensor], Tensor] = dataclasses.field(kw_only=True)
    """The prox: (x − γ ∇E(x), γ) -> the end point of the step."""
    bounded: bool = dataclasses.field(default=False, kw_only=True)
    """Whether the nonsmooth term is the indicator of a box."""

    @property
    def has_newton_step(self) -> bool:
        return self.bounded

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:  # (*batch, n) each
        """The lower and upper bounds of a box: the end points of infinitely long steps."""
        start, gamma = self.start.detach(), self.each_gamma(self.start)
        with torch.no_grad():
            return self.land(torch.full_like(start, -torch.inf), gamma), self.land(torch.full_like(start, torch.inf), gamma)

    def condition(self, x: Tensor, gamma: Tensor, slope: Tensor) -> Tensor:
        return (x - self.land(x - gamma * slope, gamma)) / gamma


@final
@dataclasses.dataclass(frozen=True)
class Minimization(Descent):
    """The minimum of a smooth energy; F is its gradient.

    Example:
        >>> import torch
        >>> square = lambda x: ((x - 3).square().sum(-1), 2 * (x - 3))
        >>> problem = Minimization(lambda x: square(x)[1], lambda x: lambda p: 2 * p, value_and_gradient=square, step_size=0.5,
        ...                        start=torch.zeros(1, 2))
        >>> problem.map(torch.zeros(1, 2))
        tensor([[3., 3.]])
    """

    quadratic: Callable[[Tensor, Preconditioner | None], tuple[Inverse, Inverse]] | None = dataclasses.field(
        default=None, kw_only=True
    )
    """(x, preconditioner) -> (p -> A p, r -> M⁻¹ r), with A the matrix of the quadratic above the energy that touches it at x."""

    @property
    def has_newton_step(self) -> bool:
        return True

    def condition(self, x: Tensor, gamma: Tensor, slope: Tensor) -> Tensor:
        return slope

    def majorized(self, preconditioner: Preconditioner | None, x: Tensor) -> tuple[Inverse, Inverse]:
        """p -> A p and r -> M⁻¹ r of the quadratic that touches the energy at x."""
        if self.quadratic is None:
            raise TypeError("This energy offers no majorizer.")
        product, solve = self.quadratic(x, preconditioner)
        return product, _downhill(solve)

    def _guarded(self, x: Tensor, gamma: Tensor) -> Tensor:
        """Backtracking: halve γ until the first step lowers the energy by a quarter of what its slope predicts."""
        energy, gradient = self.value_and_gradient(x)
        slope = gradient.square().sum(-1)

        def enough(gamma: Tensor) -> Tensor:
            # The rounding error of the difference of energies.
            noise = 8 * torch.finfo(energy.dtype).eps * energy.abs()
            return self.energy(x - gamma * gradient) <= energy - 0.25 * gamma.squeeze(-1) * slope + noise

        def halve(carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            gamma, lower = carry
            gamma = torch.where(lower.unsqueeze(-1), gamma, 0.5 * gamma)
            return gamma, enough(gamma)

        found: tuple[Tensor, Tensor] = while_loop(lambda carry: ~carry[1].all(), halve, (gamma, enough(gamma)), HALVINGS)
        return found[0]


def _downhill(solve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, but the identity where the result is not a descent direction."""

    def downhill(r: Tensor) -> Tensor:
        z = solve(r).to(r.dtype)
        along = (r * z).sum(-1, keepdim=True)
        return torch.where((along > 0) & torch.isfinite(along), z, r)

    return downhill


HALVINGS = 20


def safe_step_size(product: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:  # -> (*batch, 1)
    """1/L for the largest curvature L, by a power iteration on products with the Hessian; 1 where there is no curvature.

    Example:
        >>> import torch
        >>> safe_step_size(lambda p: torch.tensor([1.0, 10.0]) * p, torch.ones(1, 2)).round(decimals=3)
        tensor([[0.0950]])

    Source: Lanczos (1950): the same products as in the power method, combined into the best estimate that they permit.
    """
    largest = ritz_values(product, some_direction(gradient), steps=10).abs().amax(-1, keepdim=True)
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, 1 / (SAFETY * torch.where(usable, largest, 1)), 1).to(gradient.dtype)


SAFETY = 1.05  # ten products underestimate the largest curvature by a few percent

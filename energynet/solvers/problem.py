"""The problem: a frozen value that says what is being solved, and nothing about how."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from energynet._torch.autodiff import columns
from energynet._torch.while_loop import while_loop
from energynet.solvers.spectrum import ritz_values, some_direction


@dataclasses.dataclass(frozen=True)
class Problem:
    """Find x, ``(*batch, n)``, with residual(x) = 0.

    Example:
        >>> import torch
        >>> Problem(residual=lambda x: 2 * (x - 3), step_size=0.5).map(torch.zeros(1, 2))
        tensor([[3., 3.]])

    Args:
        residual: the optimality condition F, ``(*batch, n) -> (*batch, n)``.
        step_size: γ of the map g(x) = x − γ F(x), a float or ``(*batch, 1)``; None: `gamma` estimates it.
        batch_dims: number of leading dimensions that count samples.
        value_and_gradient: of a minimization, within bounds or without, x -> the energy ``(*batch)`` and its gradient, evaluated
            together.
        jacobian: x -> (p -> ∂F/∂x p), linearized once and replayed for each p; where F is not in units of x already.
        right: of a linear problem F(u) = A u − v, the right-hand side v.
        start: where the solve begins, which is where γ is estimated.
        symmetric: of a linear problem, whether A is.
        smooth: where γ is a guess, x -> the energy ``(*batch)`` of the smooth part and its gradient, by which steps are judged.
        land: of a proximal step, (x − γ ∇E(x), γ) -> where the step lands.
    """

    residual: Callable[[Tensor], Tensor]
    step_size: float | Tensor | None = 1.0
    batch_dims: int = 1
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    jacobian: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
    right: Tensor | None = None
    start: Tensor | None = None
    symmetric: bool = False
    smooth: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    land: Callable[[Tensor, Tensor], Tensor] | None = None

    def map(self, x: Tensor) -> Tensor:
        """The fixed-point map g(x) = x − γ F(x)."""
        return self.move(x, self.residual(x))

    def move(self, x: Tensor, residual: Tensor) -> Tensor:
        """g(x), given F(x)."""
        return x - self.gamma * residual

    def energy(self, x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
        """The energy of a minimization."""
        assert self.value_and_gradient is not None
        return self.value_and_gradient(x)[0]

    def hvp(self, x: Tensor, p: Tensor) -> Tensor:
        """∂F/∂x p: of a minimization, the Hessian-vector product."""
        assert self.jacobian is not None
        return self.jacobian(x)(p)

    def matrix(self, x: Tensor) -> Tensor:  # -> (*batch, n, n)
        """∂F/∂x itself, in float32 or better: no half-precision factorizations exist."""
        assert self.jacobian is not None
        working = torch.promote_types(x.dtype, torch.float32)
        return columns(self.jacobian(x), x).movedim(0, -1).to(working)

    @functools.cached_property
    def gamma(self) -> float | Tensor:
        """γ as given, or a safe one from the curvature where the solve begins, ``(*batch, 1)``."""
        if self.step_size is not None:
            return self.step_size
        assert self.start is not None and self.jacobian is not None
        with torch.no_grad():
            return self._guarded(self.start, safe_step_size(self.jacobian(self.start), self.residual(self.start)))

    def each_gamma(self, x: Tensor) -> Tensor:
        """γ of each sample, ``(*batch, 1)``."""
        return torch.zeros_like(x.detach().sum(-1, keepdim=True)) + self.gamma

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:  # (*batch, n) each
        """Of a minimization within bounds, the lower and upper ones: where steps land that go infinitely far."""
        assert self.start is not None and self.land is not None
        start, gamma = self.start.detach(), self.each_gamma(self.start)
        with torch.no_grad():
            return self.land(torch.full_like(start, -torch.inf), gamma), self.land(torch.full_like(start, torch.inf), gamma)

    def _guarded(self, x: Tensor, gamma: Tensor) -> Tensor:
        """Backtracking: halve γ until the first step lowers the energy by half of what its slope promises."""
        if self.value_and_gradient is None:
            return gamma
        energy, gradient = self.value_and_gradient(x)
        slope = gradient.square().sum(-1)

        def enough(gamma: Tensor) -> Tensor:
            # A difference of energies is known to their rounding unit only.
            noise = 8 * torch.finfo(energy.dtype).eps * energy.abs()
            return self.energy(x - gamma * gradient) <= energy - 0.25 * gamma.squeeze(-1) * slope + noise

        def halve(carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            gamma, lower = carry
            gamma = torch.where(lower.unsqueeze(-1), gamma, 0.5 * gamma)
            return gamma, enough(gamma)

        found: tuple[Tensor, Tensor] = while_loop(lambda carry: ~carry[1].all(), halve, (gamma, enough(gamma)), HALVINGS)
        return found[0]


HALVINGS = 20


def safe_step_size(product: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:  # -> (*batch, 1)
    """1/L for the largest curvature L, by a power iteration on products with the Hessian; 1 where there is no curvature.

    Example:
        >>> import torch
        >>> safe_step_size(lambda p: torch.tensor([1.0, 10.0]) * p, torch.ones(1, 2)).round(decimals=3)
        tensor([[0.0950]])

    Source: Lanczos (1950): the same products as the power method, combined to the best estimate that they contain.
    """
    largest = ritz_values(product, some_direction(gradient), steps=10).abs().amax(-1, keepdim=True)
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, 1 / (SAFETY * torch.where(usable, largest, 1)), 1).to(gradient.dtype)


SAFETY = 1.05  # ten products find the largest curvature to a few per cent, from below

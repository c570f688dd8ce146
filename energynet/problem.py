"""The problem: a frozen value that says what is being solved, and nothing of how."""

import dataclasses
from collections.abc import Callable

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """Find x, ``(*batch, n)``, with residual(x) = 0.

    Example:
        >>> import torch
        >>> Problem(residual=lambda x: 2 * (x - 3), step_size=0.5).map(torch.zeros(1, 2))
        tensor([[3., 3.]])

    Args:
        residual: the optimality condition F, ``(*batch, n) -> (*batch, n)``.
        step_size: γ of the map g(x) = x − γ F(x), a float or ``(*batch, 1)``.
        batch_dims: number of leading dimensions that count samples.
        energy: ``(*batch, n) -> (*batch)``, of a minimisation.
        hvp: ``x, p ->`` product of the Jacobian of F at x with p, of a minimisation: Hessian-vector products.
        right: of a linear problem F(u) = A u − v, the right-hand side v.
    """

    residual: Callable[[Tensor], Tensor]
    step_size: float | Tensor = 1.0
    batch_dims: int = 1
    energy: Callable[[Tensor], Tensor] | None = None
    hvp: Callable[[Tensor, Tensor], Tensor] | None = None
    right: Tensor | None = None

    def map(self, x: Tensor) -> Tensor:
        """The fixed-point map g(x) = x − γ F(x)."""
        return self.move(x, self.residual(x))

    def move(self, x: Tensor, residual: Tensor) -> Tensor:
        """g(x), given F(x)."""
        return x - self.step_size * residual

    @property
    def gradient(self) -> Callable[[Tensor], Tensor] | None:
        """The optimality condition of a minimisation, ∇E; None for any other problem."""
        return self.residual if self.hvp is not None else None

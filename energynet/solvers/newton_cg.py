"""Newton's method with truncated conjugate gradients inside a trust region, batched per sample."""

import dataclasses

import torch
from torch import Tensor

from energynet._torch.numbers import check_number, check_whole
from energynet.solvers.preconditioner import Preconditioner, check_preconditioner
from energynet.solvers.problem import Minimization
from energynet.solvers.trust_region import Ball, TrustRegion, attempt, truncated_step


@dataclasses.dataclass(frozen=True)
class NewtonCG(TrustRegion):
    """Takes Newton steps from Hessian-vector products, inside a trust region whose radius is adapted to their success.

    Directions of negative curvature are followed to the boundary of the trust region, so the method escapes from saddles. One
    step costs up to ``inner`` Hessian-vector products and one evaluation. It pays off for ill-conditioned energies and for
    accurate solutions.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> saddle = lambda x: (x[:, 0] ** 2 - 1) ** 2 + x[:, 1] ** 2
        >>> minimize(saddle, torch.tensor([[0.01, 1.0]]), solver=NewtonCG()).value.round(decimals=3).abs()
        tensor([[1., 0.]])

    Args:
        inner: the largest number of Hessian-vector products per step.
        radius: the radius of the first trust region, in units of max(1, ‖x‖).
        preconditioner: `HessianDiagonal`, `HessianBlocks`, or a function of x and the context that returns p -> M⁻¹ p, as for
            `ConjugateGradient`; it is evaluated at each step.

    Raises:
        ValueError: if inner < 1 or radius ≤ 0.
        TypeError: if the preconditioner is not valid.

    Source: Steihaug (1983); Nocedal and Wright (2006), algorithms 4.1 and 7.2.
    """

    inner: int = 50
    radius: float = 1.0
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_whole(self, "inner")
        check_number(self, "radius", "that is positive and finite", lambda v: 0 < v < float("inf"))
        check_preconditioner(self.preconditioner, "preconditioner")

    def update(self, problem: Minimization, x: Tensor, state: Ball) -> tuple[Tensor, Ball]:
        solve = problem.inverse(self.preconditioner, x)
        done = torch.zeros_like(state.rejected, dtype=torch.bool)
        inner = truncated_step(problem.jacobian(x), state, self.inner, done, solve=solve)
        return attempt(problem, x, state, inner.step, inner.image, torch.zeros_like(state.walled))

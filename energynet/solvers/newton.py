"""Newton's method with the whole Hessian, batched per sample."""

import dataclasses
import math

import torch
from torch import Tensor

from energynet._torch.numbers import check_number
from energynet.solvers.problem import Minimization
from energynet.solvers.trust_region import Ball, TrustRegion, attempt, norm, truncated_step, unit

FAR = 1e3  # a Newton step longer than this multiple of max(1, ‖x‖) is not trusted
KNOWN = 1000  # the smallest reliable pivot of the factor relative to the diagonal of H, in rounding units


@dataclasses.dataclass(frozen=True)
class Newton(TrustRegion):
    """Takes Newton steps with the whole Hessian and its Cholesky factor: few steps, however ill-conditioned the energy is.

    A step that lowers the energy too little, or crosses a wall, is shortened along its direction, which does not depend on
    the units of the coordinates. Where the Hessian is not positive definite, the step of `NewtonCG` is taken. One step costs n
    simultaneous Hessian-vector products, a factorization and one evaluation. The memory is n² numbers per sample, and n times
    that of one product, so it suits up to a few hundred unknowns.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> saddle = lambda x: (x[:, 0] ** 2 - 1) ** 2 + x[:, 1] ** 2
        >>> minimize(saddle, torch.tensor([[0.01, 1.0]]), solver=Newton()).value.round(decimals=3).abs()
        tensor([[1., 0.]])

    Args:
        radius: the radius of the first ball, in units of max(1, ‖x‖), where the Hessian is not positive definite.

    Raises:
        ValueError: if radius ≤ 0.

    Source: Steihaug (1983); Nocedal and Wright (2006), section 3.3 and algorithms 4.1 and 7.2.
    """

    radius: float = math.inf

    def __post_init__(self) -> None:
        check_number(self, "radius", "> 0", lambda v: v > 0)

    def update(self, problem: Minimization, x: Tensor, state: Ball) -> tuple[Tensor, Ball]:
        hessian = problem.matrix(x)
        finite = torch.isfinite(hessian.mean((-2, -1)))

        def product(p: Tensor) -> Tensor:  # a Hessian that is not finite counts as zero, so that the step follows −∇E
            image = (hessian @ p.to(hessian.dtype).unsqueeze(-1)).squeeze(-1)
            return torch.where(finite.unsqueeze(-1), image, 0).to(p.dtype)

        step, definite = _newton_step(hessian, state.residual)
        fits = definite & finite & (norm(step) <= FAR * unit(x))  # where the curvature vanishes, steps may be arbitrarily long
        radius = torch.where(torch.isinf(state.radius) & ~fits, unit(x), state.radius)
        state = state._replace(radius=radius)
        step = torch.where(fits.unsqueeze(-1), step, truncated_step(product, state, 2 * x.shape[-1], done=fits).step)
        return attempt(problem, x, state, step, product(step), fits)


def _newton_step(hessian: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """−H⁻¹g, and whether H is numerically positive definite, ``(*batch)`` bool, independently of the coordinates' units."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    pivots, own = (torch.diagonal(m, dim1=-2, dim2=-1) for m in (factor, hessian))
    known = (pivots.square() > KNOWN * torch.finfo(hessian.dtype).eps * own).all(-1)
    return -torch.cholesky_solve(g.to(hessian.dtype).unsqueeze(-1), factor).squeeze(-1).to(g.dtype), (info == 0) & known

"""Arithmetic that the Krylov solvers share; scalars have shape ``(*batch, 1)`` and vectors ``(*batch, n)``."""

import torch
from torch import Tensor

from energynet.solvers.problem import Linear
from energynet.solvers.vectors import length


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 for b = 0."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def working_residual(problem: Linear, x: Tensor) -> Tensor:
    """A x − v, in float32 or better."""
    return problem.residual(x).to(torch.promote_types(x.dtype, torch.float32))


def singular(problem: Linear, x: Tensor, norm: Tensor) -> Tensor:
    """Whether x grows without bound: ‖A‖‖x‖ / ‖v‖, which the condition number bounds, exceeds what the dtype can resolve.

    If A is singular and no solution exists, a Krylov solver first finds the point with the smallest residual. Then rounding
    errors alone move it along the null space, in ever longer steps.
    """
    size, right = length(x.to(norm.dtype)), length(problem.right.to(norm.dtype))
    return torch.isfinite(size) & (norm * size * torch.finfo(norm.dtype).eps * 10 > right) & (right > 0)

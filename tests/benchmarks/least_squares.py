"""½‖Ax - b‖² + 0.1 Σ log cosh x, with a contraction that one chooses."""

from typing import Any

import torch
from torch import Tensor

from .ops import Ops
from .work import Formula, Tensors

WEIGHT = 0.1


class LeastSquares(Formula):
    """Of one problem, x ``(n,)`` and b ``(m,)``, or of many that share A ``(m, n)``."""

    def evaluate(self, ops: Ops, x: Any, A: Any, b: Any) -> Any:
        return 0.5 * ((x @ A.T - b) ** 2).sum(-1) + WEIGHT * ops.log(ops.cosh(x)).sum(-1)

    def loss(self, ops: Ops, x: Any) -> Any:
        return (x**2).sum() + (x**3).sum()

    def gradient(self, x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return (x @ A.T - b) @ A + WEIGHT * x.tanh()

    def curvature(self, x: Tensor, A: Tensor, b: Tensor) -> Any:
        bend = WEIGHT * (1 - x.tanh() ** 2)
        return lambda p: (p @ A.T) @ A + bend * p

    def pullback(self, x: Tensor, u: Tensor, A: Tensor, b: Tensor) -> Tensors:
        return (u @ A.T,)  # ∂∇E/∂b = -Aᵀ


def conditioned(m: int, n: int, condition: float, dtype: torch.dtype, device: str = "cpu") -> Tensor:  # -> (m, n)
    """A matrix whose Gram matrix has its eigenvalues evenly spread, on a logarithmic scale, from 1 to the condition number."""
    left, right = (torch.linalg.qr(torch.randn(k, n, dtype=torch.float64))[0] for k in (m, n))
    values = torch.logspace(0, torch.tensor(condition).log10().item(), n, dtype=torch.float64).sqrt()
    return (left * values @ right.T).to(device, dtype)

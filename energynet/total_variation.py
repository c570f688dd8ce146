"""The total variation of signals and images: a term whose proximal map is itself a solve."""

import dataclasses
from typing import Any, final

import torch
from torch import Tensor

from energynet.projections import clip, each, onto_ball, refuse_negative
from energynet.proximal import Prox
from energynet.solve import fixed_point
from energynet.solvers import Nesterov
from energynet.step import per_sample
from energynet.termination import Termination


@final
@dataclasses.dataclass(frozen=True, eq=False)
class TotalVariation(Prox):
    """The term weight · Σ ‖differences of neighbors‖ over the last ``dims`` dimensions, which favors piecewise constant x.

    Its proximal map is itself a solve: the dual problem is solved by accelerated projected gradients, and is differentiable to
    any order. If this solve does not converge, the result is NaN, so that the outer solve fails as well.

    Example:
        >>> import torch
        >>> TotalVariation(weight=1.0)(torch.tensor([[0.0, 0.0, 4.0, 4.0]]), 1.0).round(decimals=3)      # (B, n)
        tensor([[0.5000, 0.5000, 3.5000, 3.5000]])

    Args:
        weight: a float, or a tensor that broadcasts to ``x`` without its last ``dims`` dimensions, as ``(B,)``.
        dims: the number of trailing dimensions with neighbors: 1 for signals ``(B, n)``, 2 for images ``(B, H, W)``.
        isotropic: whether differences in all directions are combined, √(dx² + dy²), or taken separately, abs(dx) + abs(dy).
        termination: for the inner solve, in units of ‖x − mean(x)‖; default: ε^¾ of the dtype, with at most 20 000 steps.

    Raises:
        ValueError: if a weight is negative, or dims < 1.

    Source: Rudin, Osher and Fatemi (1992); Chambolle (2004), the dual; Beck and Teboulle (2009), its acceleration.
    """

    weight: Any
    dims: int = 1
    isotropic: bool = True
    termination: Termination | None = None

    def __post_init__(self) -> None:
        refuse_negative("TotalVariation", "weight", self.weight)
        if self.dims < 1:
            raise ValueError(f"TotalVariation needs dims ≥ 1, got {self.dims}.")

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return each(lambda x, weight: self._flatten(x, per_sample(step_size, x.ndim - self.dims) * weight), x, self.weight)

    def _flatten(self, x: Tensor, threshold: float | Tensor) -> Tensor:
        """The proximal map of one leaf; each index of the leading dimensions is a separate problem."""
        if x.ndim < self.dims:
            raise ValueError(f"TotalVariation(dims={self.dims}) needs ≥ {self.dims} dimensions, got shape {tuple(x.shape)}.")
        if not x.numel():
            return x
        shape = x.shape[: x.ndim - self.dims]
        thresholds = torch.as_tensor(threshold, dtype=x.dtype, device=x.device).expand(shape).reshape(-1)
        rows = x.reshape(-1, *x.shape[len(shape) :])
        return self._denoise(rows, thresholds).reshape(x.shape)

    def _denoise(self, x: Tensor, threshold: Tensor) -> Tensor:  # (K, *grid), (K,)
        """Denoise each row in units of its deviation from its mean, to which tolerance and rounding errors are relative."""
        flat = x.detach().flatten(1)
        middle = flat.mean(1)
        size = torch.linalg.vector_norm(flat - middle.unsqueeze(1), dim=1)
        size = torch.where((size > 0) & torch.isfinite(size), size, 1)
        rows = (x - per_sample(middle, x.ndim)) / per_sample(size, x.ndim)
        return per_sample(middle, x.ndim) + per_sample(size, x.ndim) * self._denoise_unit(rows, threshold / size)

    def _denoise_unit(self, x: Tensor, threshold: Tensor) -> Tensor:
        termination = self.termination or Termination(rtol=float(torch.finfo(x.dtype).eps ** 0.75), max_steps=20_000)
        dual = fixed_point(
            _DualStep(self.dims, self.isotropic), torch.zeros_like(_differences(x, self.dims)), x, threshold,
            solver=Nesterov(), termination=termination, on_failure="ignore",
        )  # fmt: skip
        answer = x - _adjoint_differences(dual.value, self.dims)
        return torch.where(dual.converged.reshape(-1, *[1] * self.dims), answer, torch.nan)


@dataclasses.dataclass(frozen=True)
class _DualStep:
    """A projected gradient step on ½‖x − Dᵀp‖² over |p| ≤ threshold; 4 · dims bounds the curvature D Dᵀ."""

    dims: int
    isotropic: bool

    def __call__(self, p: Tensor, x: Tensor, threshold: Tensor) -> Tensor:  # (K, *grid, dims), (K, *grid), (K,)
        moved = p + _differences(x - _adjoint_differences(p, self.dims), self.dims) / (4 * self.dims)
        radius = threshold.reshape(-1, *[1] * self.dims)
        if self.isotropic and self.dims > 1:
            return onto_ball(moved, radius, None)
        return clip(moved, -radius.unsqueeze(-1), radius.unsqueeze(-1))


def _differences(x: Tensor, dims: int) -> Tensor:  # (K, *grid) -> (K, *grid, dims)
    """D x: the difference between each point and the next one; zero at the last point."""
    return torch.stack([torch.cat((x.diff(dim=d), 0 * x.narrow(d, 0, 1)), d) for d in range(-dims, 0)], -1)


def _adjoint_differences(p: Tensor, dims: int) -> Tensor:  # (K, *grid, dims) -> (K, *grid)
    """Dᵀ p."""
    result = torch.zeros_like(p[..., 0])
    for d, part in zip(range(-dims, 0), p.unbind(-1), strict=True):
        inner, edge = part.narrow(d, 0, part.shape[d] - 1), torch.zeros_like(part.narrow(d, 0, 1))
        result = result + torch.cat((edge, inner), d) - torch.cat((inner, edge), d)
    return result

"""W4: a convex-ridge energy of images."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .harness import Options
from .ops import Ops
from .work import Formula, Problem, Task, Tensors
from .workload import FixedStepWorkload


@dataclasses.dataclass(frozen=True)
class ConvexRidges(Formula):
    """½‖x - y‖² + weight Σ_k Σ φ(f_k ∗ x), φ(t) = √(1 + t²) - 1: convex, and strongly so by its first term."""

    weight: float

    def evaluate(self, ops: Ops, x: Any, y: Any, filters: Any) -> Any:
        ridges = ops.huber(ops.conv(x, filters)).sum((1, 2, 3))
        return 0.5 * ((x - y) ** 2).sum((1, 2, 3)) + self.weight * ridges

    def loss(self, ops: Ops, x: Any, clean: Any) -> Any:
        return ((x - clean) ** 2).sum()

    def gradient(self, x: Tensor, y: Tensor, filters: Tensor) -> Tensor:
        responses = _filtered(x, filters)
        return x - y + self.weight * _smeared(responses * torch.rsqrt(1 + responses**2), filters, x)

    def curvature(self, x: Tensor, y: Tensor, filters: Tensor) -> Any:
        bend = self.weight * (1 + _filtered(x, filters) ** 2) ** -1.5
        return lambda p: p + _smeared(bend * _filtered(p, filters), filters, x)

    def pullback(self, x: Tensor, u: Tensor, y: Tensor, filters: Tensor) -> Tensors:
        patches, along = _patches(x, filters), _patches(u, filters)
        responses = _flat(filters) @ patches
        slope, bend = responses * torch.rsqrt(1 + responses**2), (1 + responses**2) ** -1.5
        inner = bend * (_flat(filters) @ along)
        return (-self.weight * (slope @ along.mT + inner @ patches.mT).sum(0).reshape(filters.shape),)


def _flat(filters: Tensor) -> Tensor:  # (K, 1, s, s) -> (K, s²)
    return filters.flatten(1)


def _patches(x: Tensor, filters: Tensor) -> Tensor:  # (B, 1, H, W) -> (B, s², H W)
    return functional.unfold(x, filters.shape[-2:], padding=filters.shape[-1] // 2)


def _filtered(x: Tensor, filters: Tensor) -> Tensor:  # -> (B, K, H W): matrix products, which the CPU does best
    return _flat(filters) @ _patches(x, filters)


def _smeared(responses: Tensor, filters: Tensor, like: Tensor) -> Tensor:
    """The transpose of `_filtered`."""
    return functional.fold(_flat(filters).T @ responses, like.shape[-2:], filters.shape[-2:], padding=filters.shape[-1] // 2)


class Images(FixedStepWorkload):
    name: ClassVar[str] = "W4"
    title: ClassVar[str] = "convex-ridge energy, 32 filters 5×5, batch 4 of 64×64, float32, tol 1e-4, gradient to the filters"
    tasks: ClassVar[dict[Task, float | None]] = {Task.GRADIENT: 0.27}

    def problem(self, options: Options) -> Problem:
        return images(2, 6, options.device, filters=3, tolerance=1e-2) if options.quick else images(4, 64, options.device)


def images(size: int, side: int, device: str, *, filters: int = 32, tolerance: float = 1e-4) -> Problem:
    """Noisy squares, and random filters of mean zero."""
    torch.manual_seed(0)
    clean = torch.nn.functional.interpolate(torch.rand(size, 1, side // 8 + 1, side // 8 + 1), (side, side))
    noisy = clean + 0.1 * torch.randn_like(clean)
    bank = torch.randn(filters, 1, 5, 5)
    bank = (bank - bank.mean((2, 3), keepdim=True)) / 5
    clean, noisy, bank = (t.to(device) for t in (clean, noisy, bank))
    return Problem(
        ConvexRidges(weight=0.5), noisy, (noisy, bank), (1,), tolerance=tolerance, adjoint_tolerance=tolerance, targets=(clean,)
    )

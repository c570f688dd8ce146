"""Decompositions that record products, powers and hyperbolic functions in the form that is fastest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energynet._torch.autodiff import is_identity

SMALL = 2**20  # elements; for larger matrices a library's product is faster, even on one thread


def recorded_as() -> dict[Any, Callable[..., Any]]:
    """The operations that are recorded in another form, or refused because a program cannot contain them."""
    aten = torch.ops.aten
    return {aten.mm.default: _product, aten.bmm.default: _shared, aten.pow.Tensor_Scalar: _empty_power,
            aten.cholesky_solve.default: _cholesky_solve, aten.cosh.default: _cosh, aten.sinh.default: _sinh,
            aten.ones_like.default: _ones_like, aten._linalg_check_errors.default: _raising,
            aten._local_scalar_dense.default: _reading}  # fmt: skip


def _raising(info: Tensor, name: str, is_matrix: bool) -> Any:
    raise RuntimeError(
        f"{name} raises an error for a singular matrix, which a program cannot: use cholesky_ex or inv_ex, or driver=Eager()"
    )


def _reading(tensor: Tensor) -> Any:
    """Refuses a number that PyTorch itself reads from a tensor, as in ``torch.add(x, y, alpha=tensor)``."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(tensor, FakeTensor):
        return NotImplemented
    raise RuntimeError(f"a number is read from a tensor of shape {tuple(tensor.shape)}, and would become a constant")


def _product(a: Tensor, b: Tensor) -> Any:
    """I A, the first product for the columns of a Hessian, is A; a copy and not a view, because it may be written to."""
    return b.clone(memory_format=torch.contiguous_format) if is_identity(a) else _thin(a, b)


def _thin(a: Tensor, b: Tensor) -> Any:  # (1, k), (k, n)
    """A product with one row, as in a single small problem, as a matrix-vector product, which Inductor can fuse."""
    if not _known(a, b) or a.device.type != "cpu" or a.shape[0] != 1 or b.numel() > SMALL:
        return NotImplemented
    return torch.mv(b.mT, a[0]).unsqueeze(0)


def _shared(a: Tensor, b: Tensor) -> Any:  # (B, n, k), (B, k, m)
    """Products with the same matrix, of which ``vmap`` makes one per sample, as a single product."""
    if b.stride(0) == 0:
        return torch.mm(a.flatten(0, 1), b[0]).unflatten(0, a.shape[:2])
    if a.stride(0) == 0 and b.shape[2] == 1:
        return torch.mm(b.squeeze(2), a[0].mT).unsqueeze(2)
    return NotImplemented


def _cholesky_solve(right: Tensor, factor: Tensor, upper: bool = False) -> Any:
    """Calls the helper directly: for dynamic sizes, PyTorch cannot verify that nothing is broadcast."""
    if _known(right, factor) or right.shape[:-2] != factor.shape[:-2]:
        return NotImplemented
    return torch.ops.aten._cholesky_solve_helper.default(right, factor, upper)


def _empty_power(a: Tensor, exponent: Any) -> Any:
    """x⁰ is 1 for every x, so that the Hessian of a square is a visible constant and can be moved out of a loop."""
    return _ones_like(a) if exponent == 0 and not isinstance(exponent, complex) and a.is_floating_point() else NotImplemented


def _ones_like(a: Tensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **layout: Any) -> Any:
    """Ones, which depend only on the shape of ``a``."""
    plain = all(not v or v in (torch.strided, torch.preserve_format) for v in layout.values())
    if not plain or not _known(a) or not a.is_contiguous():
        return NotImplemented
    return torch.ones(a.shape, dtype=dtype or a.dtype, device=device or a.device)


def _cosh(x: Tensor) -> Any:
    """cosh by the same ``expm1`` as sinh, so that the derivative of log cosh x, sinh x / cosh x, costs one exponential.

    It overflows slightly earlier than cosh: in float32 from 88.8 instead of 89.5.
    """
    if not _has_expm1(x):
        return NotImplemented
    e = 1 + torch.expm1(x.abs())
    return 0.5 * (e + e.reciprocal())


def _sinh(x: Tensor) -> Any:
    if not _has_expm1(x):
        return NotImplemented
    less = torch.expm1(x.abs())  # exp(|x|) - 1 without cancellation for small x
    return torch.copysign(less * (0.5 + 0.5 * (1 + less).reciprocal()), x)


def _has_expm1(x: Tensor) -> bool:
    """Whether there is a fast vectorized ``expm1``."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _known(*tensors: Tensor) -> bool:
    """Whether all sizes are known."""
    return all(isinstance(n, int) for t in tensors for n in t.shape)

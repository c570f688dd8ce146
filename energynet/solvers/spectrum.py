"""Extreme eigenvalues of linear maps from matrix-vector products only, batched per sample."""

from collections.abc import Callable

import torch
from torch import Tensor


def some_direction(like: Tensor) -> Tensor:
    """A deterministic generic direction ``(*batch, n)`` with a component along ``like``."""
    n = like.shape[-1]
    wave = torch.cos(1.7 * torch.arange(n, dtype=torch.float64, device=like.device) ** 1.3 + 0.5).to(like.dtype)
    unit = normalized(like)
    # The factor 2 prevents cancellation if n = 1 and the two directions are opposite.
    return normalized(2 * torch.where(torch.isfinite(unit), unit, 0) + normalized(wave))


def normalized(x: Tensor) -> Tensor:  # (*batch, n)
    """The vectors scaled to length one; zero stays zero."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def ritz_values(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:  # -> (*batch, m)
    """Approximate eigenvalues of a symmetric map from ``steps`` products; the extreme ones are the most accurate.

    Example:
        >>> import torch
        >>> scale = torch.tensor([1.0, 2.0, 5.0])
        >>> ritz_values(lambda p: scale * p, torch.ones(1, 3), steps=5).amax().round(decimals=3)
        tensor(5.)

    Args:
        product: p -> A p, ``(*batch, n) -> (*batch, n)``, A symmetric.
        start: the first vector of the Krylov space, ``(*batch, n)``.
        steps: the number of products; at most n are taken.

    Returns:
        ``(*batch, m)`` in ascending order, m = min(steps, n).

    Source: Lanczos (1950), with full reorthogonalization.
    """
    steps = min(steps, start.shape[-1])
    if not steps:
        return start.new_zeros((*start.shape[:-1], 1))
    working = torch.promote_types(start.dtype, torch.float32)  # no half-precision factorizations exist
    q = normalized(start.to(working))
    basis = [q]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    alive = torch.ones_like(q[..., :1], dtype=torch.bool)
    for _ in range(steps):
        w = product(basis[-1].to(start.dtype)).to(working)
        size = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        alpha = (w * basis[-1]).sum(-1, keepdim=True)
        # Once the Krylov space is exhausted, the remaining entries repeat a value inside the spectrum.
        alphas.append(torch.where(alive, alpha, alphas[0] if alphas else alpha))
        stacked = torch.stack(basis, -2)  # (*batch, k, n)
        for _ in range(2):
            w = w - (stacked.mT @ (stacked @ w.unsqueeze(-1))).squeeze(-1)
        beta = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        alive = alive & (beta > 100 * torch.finfo(working).eps * size)
        betas.append(torch.where(alive, beta, 0))
        basis.append(torch.where(alive, w / torch.where(alive, beta, 1), 0))
    diagonal, off = torch.cat(alphas, -1), torch.cat(betas[:-1], -1) if steps > 1 else None
    matrix = torch.diag_embed(diagonal)
    if off is not None:
        matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    finite = torch.isfinite(matrix).all(-1).all(-1)
    matrix = torch.where(finite[..., None, None], matrix, 0)
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return torch.where(finite.unsqueeze(-1), values, torch.nan)


def arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:  # -> (*batch, m), complex
    """Approximate eigenvalues of any linear map from ``steps`` products; the outer ones are the most accurate.

    Example:
        >>> import torch
        >>> turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]])     # ±2i
        >>> arnoldi(lambda p: p @ turn.mT, torch.ones(1, 2), steps=5).abs()
        tensor([[2., 2.]])

    Args:
        product: p -> A p, ``(*batch, n) -> (*batch, n)``.
        start: the first vector of the Krylov space, ``(*batch, n)``.
        steps: the number of products; at most n are taken, and n of them find every eigenvalue.

    Returns:
        ``(*batch, m)``, complex, in no order, m = min(steps, n); NaN where a product is not finite.

    Source: Arnoldi (1951), with full reorthogonalization.
    """
    steps = min(steps, start.shape[-1])
    if not steps:
        return start.new_zeros((*start.shape[:-1], 1)).to(torch.complex64)
    working = torch.promote_types(start.dtype, torch.float32)
    basis = normalized(start.to(working)).unsqueeze(-2)  # (*batch, k, n)
    columns = []
    for k in range(steps):
        w = product(basis[..., k, :].to(start.dtype)).to(working)
        size = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        w, weights = _without(basis, w)
        beta = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        exhausted = ~(beta > 100 * torch.finfo(working).eps * size)
        # If the Krylov space is invariant, a new direction finds the eigenvalues that are missing.
        fresh, _ = _without(basis, torch.cos((k + 2.3) * w.shape[-1] * some_direction(torch.zeros_like(w))))
        beta, w = torch.where(exhausted, 0, beta), torch.where(exhausted, fresh, w)
        columns.append(torch.nn.functional.pad(torch.cat([weights, beta], -1), (0, steps - k - 1)))
        basis = torch.cat([basis, normalized(w).unsqueeze(-2)], -2)
    matrix = torch.stack(columns, -1)[..., :steps, :]  # upper Hessenberg
    finite = torch.isfinite(matrix).all(-1).all(-1)
    values: Tensor = torch.linalg.eigvals(torch.where(finite[..., None, None], matrix, 0))
    return torch.where(finite.unsqueeze(-1), values, torch.nan)


def _without(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The part of ``w`` that is orthogonal to the rows of ``basis``, and the weights of the rest, ``(*batch, k)``."""
    total = torch.zeros_like(basis[..., 0])
    for _ in range(2):
        weights = (basis @ w.unsqueeze(-1)).squeeze(-1)
        w = w - (basis.mT @ weights.unsqueeze(-1)).squeeze(-1)
        total = total + weights
    return w, total

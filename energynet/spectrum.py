"""Extreme eigenvalues of linear maps that are known by their products only, batched sample by sample."""

from collections.abc import Callable

import torch
from torch import Tensor


def some_direction(like: Tensor) -> Tensor:
    """A deterministic direction ``(*batch, n)`` that is orthogonal to nothing in particular, leaning on ``like``."""
    n = like.shape[-1]
    wave = torch.cos(1.7 * torch.arange(n, dtype=torch.float64, device=like.device) ** 1.3 + 0.5).to(like.dtype)
    unit = normalised(like)
    return normalised(torch.where(torch.isfinite(unit), unit, 0) + normalised(wave))


def normalised(x: Tensor) -> Tensor:  # (*batch, n)
    """Samples of length one; zero stays zero."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def ritz_values(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:  # -> (*batch, m)
    """Approximate eigenvalues of a symmetric map, the extreme ones best, from ``steps`` products.

    Example:
        >>> import torch
        >>> scale = torch.tensor([1.0, 2.0, 5.0])
        >>> ritz_values(lambda p: scale * p, torch.ones(1, 3), steps=5).amax()
        tensor(5.)

    Args:
        product: p -> A p, ``(*batch, n) -> (*batch, n)``, A symmetric.
        start: where the Krylov space begins, ``(*batch, n)``.
        steps: at most n of them are taken.

    Returns:
        ``(*batch, m)`` in ascending order, m = min(steps, n).

    Source: Lanczos (1950), with full reorthogonalisation.
    """
    steps = min(steps, start.shape[-1])
    if not steps:
        return start.new_zeros((*start.shape[:-1], 1))
    working = torch.promote_types(start.dtype, torch.float32)  # no half-precision factorisations exist
    q = normalised(start.to(working))
    basis, alphas, betas = [q], [], []
    alive = torch.ones_like(q[..., :1], dtype=torch.bool)
    for _ in range(steps):
        w = product(basis[-1].to(start.dtype)).to(working)
        size = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        alpha = (w * basis[-1]).sum(-1, keepdim=True)
        # Once the Krylov space is exhausted a value from within the spectrum fills the rest.
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

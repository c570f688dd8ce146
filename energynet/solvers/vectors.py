"""Inner products and norms of the vectors in a batch, ``(*batch, n)``."""

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:  # -> (*batch, 1)
    """⟨a, b⟩ per sample, with a dimension for broadcasting with vectors."""
    return (a * b).sum(-1, keepdim=True)


def inner(a: Tensor, b: Tensor) -> Tensor:  # -> (*batch)
    """⟨a, b⟩ per sample."""
    return (a * b).sum(-1)


def length(a: Tensor) -> Tensor:  # -> (*batch, 1)
    """‖a‖ per sample, with a dimension for broadcasting with vectors."""
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)

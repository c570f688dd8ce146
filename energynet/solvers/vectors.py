"""Products and lengths of the vectors of a batch, ``(*batch, n)``."""

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:  # -> (*batch, 1)
    """⟨a, b⟩ of each sample, to be multiplied with vectors."""
    return (a * b).sum(-1, keepdim=True)


def inner(a: Tensor, b: Tensor) -> Tensor:  # -> (*batch)
    """⟨a, b⟩ of each sample."""
    return (a * b).sum(-1)


def length(a: Tensor) -> Tensor:  # -> (*batch, 1)
    """‖a‖ of each sample, to be multiplied with vectors."""
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)

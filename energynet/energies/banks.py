"""Banks of learned filters, bounded together: ‖responses‖ ≤ ‖image‖ for all weights."""

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils.parametrize import register_parametrization

from energynet.energies.filters import Boundary, BoundedFilters, cosine_filters


class FilterBank(nn.Module, ABC):
    """Filters ``(F, C, k, k)`` as a function of weights; `size` is k."""

    num_filters: int
    size: int

    @abstractmethod
    def forward(self) -> Tensor:  # (F, C, k, k)
        """The filters, with zero mean."""


class CosineStart(FilterBank):
    """Free filters that begin as a discrete cosine transform.

    Example:
        >>> CosineStart(5)().shape
        torch.Size([24, 1, 5, 5])

    Args:
        size: k; there are k² − 1 filters per channel.
        channels: C.
    """

    def __init__(self, size: int = 5, channels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(cosine_filters(size, channels))
        self.num_filters, self.size = len(self.weight), size
        register_parametrization(self, "weight", BoundedFilters(Boundary.INSIDE))

    def forward(self) -> Tensor:
        return self.weight


class Composed(FilterBank):
    """Convolutions after one another without anything between them, as one bank of large filters with few weights.

    Example:
        >>> Composed((1, 4, 8, 60))().shape                             # 5 × 5 three times: 13 × 13
        torch.Size([60, 1, 13, 13])

    Args:
        channels: of the image and after each convolution.
        size: of each convolution, odd.

    Source: Goujon et al. (2024), Learning weakly convex regularizers.
    """

    def __init__(self, channels: tuple[int, ...] = (1, 4, 8, 60), *, size: int = 5) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        first = cosine_filters(size, channels[0])
        self.weights = nn.ParameterList(torch.randn(m, n, size, size) / (n * size**2) ** 0.5 for n, m in pairs)
        with torch.no_grad():
            count = min(len(first), channels[1])
            self.weights[0][:count] = first[:count]
        self.bound = BoundedFilters(Boundary.INSIDE)
        self.num_filters, self.size = channels[-1], len(pairs) * (size - 1) + 1

    def forward(self) -> Tensor:
        filters: Tensor = self.weights[0]
        filters = filters - filters.mean((-2, -1), keepdim=True)
        for weight in list(self.weights)[1:]:
            filters = conv2d(filters.transpose(0, 1), weight.flip(-2, -1), padding=weight.shape[-1] - 1).transpose(0, 1)
        bounded: Tensor = self.bound(filters)
        return bounded

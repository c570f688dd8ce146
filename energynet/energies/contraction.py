"""A contractive convolutional map for `FPI_NN`."""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d
from torch.nn.utils.parametrize import register_parametrization

from energynet.energies.filters import Boundary, BoundedFilters, cosine_filters, filter_bank
from energynet.energies.priors import HalfResolution, inside


class ImageContraction(nn.Module):
    r"""A map whose fixed point is a denoised picture: :math:`g(x; y, σ) = y - σ V^\top\bigl(d(y, σ) + c \tanh(W x/σ + b(y,
    σ))\bigr)` with ‖W‖ ≤ 1 and ‖V‖ ≤ 1, so that it contracts in x by c whatever the weights are; a network gives d and b.

    Example:
        >>> from energynet import fixed_point
        >>> network, y, sigma = ImageContraction(3, width=8, depth=1), torch.rand(2, 1, 9, 9), torch.tensor([0.1, 0.2])
        >>> fixed_point(network, y, *network.encode(y, sigma)).value.shape          # y (B, 1, H, W), σ (B,)
        torch.Size([2, 1, 9, 9])

    Args:
        size: k, of the k² − 1 filters in W and V.
        coupling: c, between 0 and 1.
        width: channels of the network.
        depth: its hidden layers.

    Raises:
        ValueError: when coupling is not between 0 and 1.
    """

    def __init__(self, size: int = 5, *, coupling: float = 0.9, width: int = 40, depth: int = 4) -> None:
        super().__init__()
        if not 0 < coupling < 1:
            raise ValueError(f"coupling must lie between 0 and 1 for the answer to be unique, got {coupling}.")
        self.coupling, self.size, self.margin = coupling, size, size // 2
        self.inward = nn.Parameter(cosine_filters(size))
        self.outward = nn.Parameter(cosine_filters(size))
        register_parametrization(self, "inward", BoundedFilters(Boundary.INSIDE))
        register_parametrization(self, "outward", BoundedFilters(Boundary.INSIDE))
        self.network = HalfResolution(2 * (size**2 - 1), width=width, depth=depth)

    def encode(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """What does not depend on x, the context of ``forward``: y, σ, d and b, and both banks for each sample."""
        drive, shift = inside(self.network(y, sigma), self.size).chunk(2, 1)
        banks = (bank.expand(len(y), *bank.shape) for bank in (self.inward, self.outward))
        return y, sigma, drive, shift, *banks

    def forward(self, x: Tensor, y: Tensor, sigma: Tensor, drive: Tensor, shift: Tensor, inward: Tensor, outward: Tensor
                ) -> Tensor:  # (B, 1, H, W) -> (B, 1, H, W)  # fmt: skip
        level = sigma[:, None, None, None]
        u = drive + self.coupling * torch.tanh(filter_bank(x / level, inward) + shift)
        return y - level * conv_transpose2d(u, outward[0])

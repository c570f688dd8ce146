"""A deep prior: the squared output of a network."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from energynet.energies.priors import Prior, log_level


class ResidualPrior(Prior):
    r"""R(x; σ) = ½ σ² ‖M(x/σ, σ)‖² with a smooth convolutional network M: pictures are likely where its output is small.

    With M = x − N(x) it is the energy whose gradient step denoises by N. No bound holds on its curvature, so there may be
    several minimizers; R ≥ 0 and is smooth, so with a data term there is at least one, which a descent with a line search,
    such as `energynet.LBFGS`, finds.

    Example:
        >>> prior = ResidualPrior(width=4, depth=1)
        >>> prior(torch.rand(2, 1, 9, 9), torch.rand(2, 1, 9, 9), torch.tensor([0.1, 0.2])).shape
        torch.Size([2])

    Args:
        width: channels.
        depth: hidden layers.

    Source: Hurault et al. (2022), Gradient step denoiser for convergent plug-and-play.
    """

    strength, concavity = math.inf, math.inf

    def __init__(self, *, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.margin = depth + 2
        self.first = nn.Conv2d(1, width, 3)
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 3) for _ in range(depth))
        self.last = nn.Conv2d(width, 8, 3)
        self.level = nn.Parameter(torch.zeros(width))
        self.log_strength = nn.Parameter(torch.zeros(2))

    def rescale_(self, strength: float, scale: float) -> None:
        with torch.no_grad():
            self.log_strength[0] += strength

    def encode(self, guide: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """σ, the change of the first layer with its logarithm, and the factor σ² λ."""
        level = log_level(sigma)
        factor = sigma.square() * torch.exp(self.log_strength[0] + self.log_strength[1] * level)
        return sigma[:, None, None, None], (level[:, None] * self.level)[..., None, None], factor

    def evaluate(self, x: Tensor, sigma: Tensor, shift: Tensor, factor: Tensor) -> Tensor:  # -> (B,)
        u = pad(x, (self.margin,) * 4, mode="replicate") / (4 * sigma)
        u = nn.functional.softplus(self.first(u - u.mean((1, 2, 3), keepdim=True)) + shift)
        for layer in self.hidden:
            u = nn.functional.softplus(layer(u))
        return 0.5 * factor * self.last(u).square().sum((1, 2, 3))

"""Priors of pictures with exact bounds on their curvature, for all weights, pictures and noise levels."""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from energynet.energies.banks import FilterBank
from energynet.energies.filters import filter_bank
from energynet.energies.potentials import Potential, bend
from energynet.energy import Energy

REFERENCE = 25 / 255
"""The noise level for which scales and strengths are what their weights say."""


class Prior(Energy):
    """R(x; guide, σ): how unlikely a picture is, in units in which ½‖Ax − y‖² is the data term of noise σ.

    The guide is a first picture, such as the noisy one; many priors take no notice of it.
    """

    strength: float
    """The largest curvature S of R."""
    concavity: float
    """The bound c. No curvature of R is below −c; it is infinite for a prior without such a bound."""
    margin: int
    """Pixels at the border that see fewer filters than the others."""

    @abstractmethod
    def encode(self, guide: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:  # (B, C, H, W), (B,)
        """What does not depend on x."""

    def start(self, guide: Tensor, sigma: Tensor) -> Tensor:
        """The guide."""
        return guide

    def rescale_(self, strength: float, scale: float) -> None:
        """Change the logit of the strength and the logarithm of the scales, where a prior has them, in place."""


class RidgePrior(Prior):
    r"""Learned filters with learned potentials, whose scales and strength depend on the noise level:

    .. math::
        R(x; σ) = λ(σ) \sum_i σ^2 s_i(σ)^2 \sum_q ψ\Bigl(\frac{(w_i * x)_q}{σ s_i(σ)}\Bigr), \qquad
        -c ≤ \text{eigenvalues of } ∇^2 R ≤ S.

    Example:
        >>> from energynet.energies import CosineStart, Huber
        >>> prior = RidgePrior(CosineStart(3), Huber(8))
        >>> prior(torch.rand(2, 1, 9, 9), torch.rand(2, 1, 9, 9), torch.tensor([0.1, 0.2])).shape
        torch.Size([2])

    Args:
        bank: the filters.
        potential: ψ.
        strength: S; λ stays below it.

    Raises:
        ValueError: if the strength is not positive and finite.

    Source: Goujon et al. (2024), Learning weakly convex regularizers.
    """

    def __init__(self, bank: FilterBank, potential: Potential, *, strength: float = 40.0) -> None:
        super().__init__()
        _check_strength(strength)
        self.bank, self.potential, self.strength, self.concavity = bank, potential, strength, potential.concavity
        self.margin = bank.size // 2
        # At the reference, and their change with log σ: at first as in ½‖x − y‖²/σ² + R(x), with an R that knows nothing of σ.
        self.raw_strength = nn.Parameter(torch.tensor([-1.0, 2.0]))
        groups = bank.num_filters // potential.group
        self.log_scale = nn.Parameter(torch.stack([torch.full((groups,), -2.0), torch.full((groups,), -1.0)]))

    @torch.no_grad()
    def rescale_(self, strength: float, scale: float) -> None:
        self.raw_strength[0] += strength
        self.log_scale[0] += scale

    def encode(self, guide: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """Filters in units of their scales ``(B, F, C, k, k)``, factors of groups ``(B, G)``, and the potential's code."""
        level = log_level(sigma)
        strength = self.strength * torch.sigmoid(self.raw_strength[0] + self.raw_strength[1] * level)  # (B,)
        unit = _scales(self.log_scale, level, sigma)
        filters = self.bank() / unit.repeat_interleave(self.potential.group, 1)[..., None, None, None]
        return filters, strength[:, None] * unit.square(), *self.potential.encode(strength)

    def evaluate(self, x: Tensor, filters: Tensor, factor: Tensor, *code: Tensor) -> Tensor:  # -> (B,)
        sums = self.potential(filter_bank(x, filters).flatten(2), *code)  # (B, G)
        return (sums * factor).sum(-1)


class AdaptivePrior(Prior):
    r"""Filters whose strengths at every pixel a network reads from the guide, once per solve:

    .. math::
        R(x; y, σ) = \sum_i σ^2 s_i(σ)^2 \sum_q λ_{iq}(y, σ)\, h\Bigl(\frac{(w_i * x)_q}{σ s_i(σ)}\Bigr),
        \qquad 0 < λ < S, \quad h(t) = \sqrt{1 + t^2} - 1.

    It is convex in x for any guide, so with a strongly convex data term there is one minimizer.

    Example:
        >>> from energynet.energies import CosineStart
        >>> prior = AdaptivePrior(CosineStart(3), width=8, depth=1)
        >>> prior(torch.rand(2, 1, 9, 9), torch.rand(2, 1, 9, 9), torch.tensor([0.1, 0.2])).shape
        torch.Size([2])

    Args:
        bank: the filters.
        width: channels of the network, which works at half the resolution.
        depth: its hidden layers.
        strength: S.

    Raises:
        ValueError: if the strength is not positive and finite.

    Source: Pourya et al. (2025), DEALing with image reconstruction: deep attentive least squares, for weights that depend on
        the picture; Zhang et al. (2018), FFDNet, for the network.
    """

    def __init__(self, bank: FilterBank, *, width: int = 48, depth: int = 4, strength: float = 100.0) -> None:
        super().__init__()
        _check_strength(strength)
        self.bank, self.strength, self.concavity, self.margin = bank, strength, 0.0, bank.size // 2
        self.log_scale = nn.Parameter(torch.stack([torch.full((bank.num_filters,), 0.0), torch.zeros(bank.num_filters)]))
        self.bias = nn.Parameter(torch.full((bank.num_filters,), math.log(0.05)))  # λ at first, as a logit
        self.network = HalfResolution(bank.num_filters, width=width, depth=depth)

    @torch.no_grad()
    def rescale_(self, strength: float, scale: float) -> None:
        self.bias.add_(strength)
        self.log_scale[0] += scale

    def encode(self, guide: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """Filters in units of their scales ``(B, F, C, k, k)``, and strengths times squared units ``(B, F, pixels)``."""
        level = log_level(sigma)
        unit = _scales(self.log_scale, level, sigma)
        logits = self.network(guide, sigma) + self.bias[:, None, None]
        weights = self.strength * torch.sigmoid(inside(logits, self.bank.size)).flatten(2)
        return self.bank() / unit[..., None, None, None], weights * unit.square()[..., None]

    def evaluate(self, x: Tensor, filters: Tensor, weights: Tensor) -> Tensor:  # -> (B,)
        return (bend(filter_bank(x, filters).flatten(2)) * weights).sum((-2, -1))


class HalfResolution(nn.Module):
    """A convolutional network that sees 2 × 2 pixels as channels, so that it is cheap and sees far; gray or colored guides.

    Example:
        >>> HalfResolution(6, width=8, depth=1)(torch.rand(2, 1, 7, 9), torch.tensor([0.1, 0.2])).shape
        torch.Size([2, 6, 7, 9])

    Args:
        num_outputs: maps that it gives.
        width: channels.
        depth: hidden layers.
        channels: of the guide.
    """

    def __init__(self, num_outputs: int, *, width: int, depth: int, channels: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(4 * channels + 1, width, 3, padding=1)
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(width, 4 * num_outputs, 3, padding=1)
        with torch.no_grad():
            self.last.weight.mul_(0.1)
            self.last.bias.zero_()  # type: ignore[union-attr]
            for layer in (self.first, *self.hidden):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, guide: Tensor, sigma: Tensor) -> Tensor:  # (B, C, H, W), (B,) -> (B, outputs, H, W)
        height, width = guide.shape[-2:]
        relative = (guide - 0.5) / (4 * sigma[:, None, None, None])
        even = nn.functional.pad(relative, (0, width % 2, 0, height % 2), mode="replicate")
        blocks = nn.functional.pixel_unshuffle(even, 2)
        noise = log_level(sigma)[:, None, None, None].expand(len(guide), 1, *blocks.shape[-2:])
        h = torch.relu(self.first(torch.cat([blocks, noise], 1)))
        for layer in self.hidden:
            h = h + torch.relu(layer(h))
        return nn.functional.pixel_shuffle(self.last(h), 2)[..., :height, :width]


def log_level(sigma: Tensor) -> Tensor:  # (B,) -> (B,)
    """log σ, relative to the reference."""
    return torch.log(sigma / REFERENCE)


def _scales(log_scale: Tensor, level: Tensor, sigma: Tensor) -> Tensor:  # (2, F), (B,), (B,) -> (B, F)
    """σ s(σ) of each filter."""
    return sigma[:, None] * torch.exp(log_scale[0] + log_scale[1] * level[:, None])


def inside(maps: Tensor, size: int) -> Tensor:
    """The values at the centers of windows that lie inside."""
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    return maps[..., before : maps.shape[-2] - after, before : maps.shape[-1] - after]


def _check_strength(strength: float) -> None:
    if not 0 < strength < math.inf:
        raise ValueError(f"strength must be positive and finite, got {strength}.")

"""Images: a data term and learned filters with learned potentials."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from energynet.energies.filters import Boundary, BoundedFilters, cosine_filters, filter_bank
from energynet.energy import Energy


class ImageEnergy(Energy):
    r"""A convex-ridge energy over images, whose minimizer is a regularized y:

    .. math::
        E(x; y, p) = \tfrac12 \sum_q p_q (x_q - y_q)^2 + \lambda \sum_i \sum_q \phi_i\bigl((w_i * x)_q\bigr), \quad
        \phi_i(t) = h_{s_i}(t) - \kappa_i h_{s_i/\kappa_i}(t), \quad h_s(t) = s \bigl(\sqrt{s^2 + t^2} - s\bigr),

    with q the pixels. h is quadratic below its scale s and linear above it, a smooth Huber function with 0 < h″ ≤ 1. Filters
    (with zero mean), scales and λ are learned. The norm of a filter says how strongly it counts. With ``concavity`` c > 0
    the κ are learned too: the potentials level off, which preserves edges. c = 0 means κ = 0, a convex energy.

    The filters are scaled so that ‖(w₁ * x, w₂ * x, …)‖ ≤ ‖x‖, λ stays below the strength S, and λκ stays below c. They begin
    as those of the discrete cosine transform, and can be set: ``energy.weight = filters``. The eigenvalues of the Hessian
    lie between p − c and p + S for all weights: with p = 1 and c < 1 there is one minimizer, and gradient steps of size
    `step_size` reach it.

    Example:
        >>> from energynet import FPI_GD
        >>> energy = ImageEnergy(num_filters=8)
        >>> denoise = FPI_GD(energy, energy.step_size)
        >>> denoise(torch.rand(2, 1, 16, 16)).shape                     # y (B, C, H, W) -> x* (B, C, H, W)
        torch.Size([2, 1, 16, 16])
        >>> mask = (torch.rand(2, 1, 16, 16) > 0.2).float()             # inpainting: p is zero where y is not known
        >>> energy(torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16), mask).shape
        torch.Size([2])

    Args:
        channels: C, 1 for gray images.
        num_filters: number of filters; those beyond the (k² − 1) C of the cosine transform begin at random.
        size: k, of the k × k filters, odd (with ``Boundary.INSIDE`` any).
        strength: S, the largest curvature of the regularizer. More noise needs more: noise of a tenth of the range needs
            about 10.
        concavity: c, in [0, 1) and below the strength.
        scale: of the potentials at first, in units of the filters' responses.
        boundary: what a filter sees beyond the border. With ``INSIDE``, ``ZERO`` and ``PERIODIC`` the curvature comes close to
            S. With ``REFLECT`` a filter may see a pixel four times, which the bound allows for: images reach about S/4, and c
            and the step size act as a quarter of what they say; with ``REPLICATE`` it is less still. To treat the border as
            the rest, pad the image by reflection, solve with ``INSIDE``, and crop.

    Raises:
        ValueError: if a number is out of range; by a call, if y or p is not of the shape that is needed.

    Source: Goujon et al. (2023), A neural-network-based convex regularizer; Goujon et al. (2024), Learning weakly convex
        regularizers: the form, with potentials in closed form in place of splines.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        num_filters: int = 24,
        size: int = 5,
        strength: float = 10.0,
        concavity: float = 0.0,
        scale: float = 0.01,
        boundary: Boundary = Boundary.INSIDE,
    ) -> None:
        super().__init__()
        if min(channels, num_filters) < 1:
            raise ValueError(f"ImageEnergy needs at least one channel and one filter, got {channels} and {num_filters}.")
        if size < 2 or (size % 2 == 0 and boundary is not Boundary.INSIDE):
            raise ValueError(
                f"size must be odd and at least 3, or any from 2 with Boundary.INSIDE, got {size} and {boundary}: a filter has "
                "zero mean, and one of a single pixel is zero."
            )
        if not (0 < strength < math.inf and 0 < scale < math.inf):
            raise ValueError(f"strength and scale must be positive and finite, got {strength} and {scale}.")
        if not 0 <= concavity < min(1, strength):
            raise ValueError(
                f"concavity must lie in [0, 1) and below strength={strength}, got {concavity}: the data term adds a curvature of "
                "1, and one minimizer needs what is left to be positive."
            )
        self.strength, self.concavity, self.boundary = strength, concavity, boundary
        self.raw_strength = nn.Parameter(torch.zeros(()))
        self.log_scale = nn.Parameter(torch.full((num_filters,), math.log(scale)))
        self.raw_mixing = nn.Parameter(torch.zeros(num_filters)) if concavity else None
        self.weight = nn.Parameter(first_filters(num_filters, channels, size))
        register_parametrization(self, "weight", BoundedFilters(boundary))

    @property
    def step_size(self) -> float:
        """2/(μ + L), the best constant step size for the bounds of the Hessian with p = 1; it is safe for all p between 0
        and 1.
        """
        return 2 / (2 - self.concavity + self.strength)

    def start(self, y: Tensor, precision: Tensor | float = 1.0) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        """The given image."""
        return y

    def encode(self, y: Tensor, precision: Tensor | float = 1.0) -> tuple[Tensor | float | None, ...]:
        """The filters in units of their scales, and the factors of the potentials ``(F,)``.

        Args:
            y: images, ``(B, C, H, W)``.
            precision: p, the weight of the data relative to the noise that the energy was trained for, (σ₀/σ)²: a float, one
                value per sample ``(B,)``, or one per pixel, like y.
        """
        precision = _checked(y, precision)
        scale = self.log_scale.exp()
        filters = self.weight / scale[:, None, None, None]
        strength = self.strength * torch.sigmoid(self.raw_strength)  # λ
        factor = strength * scale.square()
        if self.raw_mixing is None:
            return y, precision, filters, factor, None
        most = self.concavity / strength.clamp_min(self.concavity)  # κ stays below this and below 1, so that λκ < c
        return y, precision, filters, factor, most * torch.sigmoid(self.raw_mixing)

    def evaluate(self, x: Tensor, y: Tensor, precision: Tensor | float, filters: Tensor, factor: Tensor,
                 mixing: Tensor | None) -> Tensor:  # -> (B,)  # fmt: skip
        u = filter_bank(x, filters, self.boundary).flatten(2)  # (B, F, pixels)
        potential = _bend(u)
        if mixing is not None:
            potential = potential - _bend(mixing[:, None] * u) / mixing[:, None]
        return 0.5 * (precision * (x - y).square()).sum((1, 2, 3)) + potential.sum(-1) @ factor


def first_filters(num_filters: int, channels: int, size: int) -> Tensor:  # -> (F, C, k, k)
    """Those of the cosine transform, and random ones of the same norm where more are needed."""
    cosines = cosine_filters(size, channels)
    more = torch.randn(max(num_filters - len(cosines), 0), channels, size, size)
    more = more - more.mean((2, 3), keepdim=True)
    norms = more.flatten(1).norm(dim=1)[:, None, None, None]
    return torch.cat([cosines[:num_filters], more / norms])


def _checked(y: Tensor, precision: Tensor | float) -> Tensor | float:
    """The precision in a shape that multiplies images. Other shapes would be broadcast and mix the samples."""
    if y.ndim != 4:
        raise ValueError(f"ImageEnergy needs images (B, C, H, W), got y {tuple(y.shape)}. Gray ones have C = 1: y.unsqueeze(1).")
    if not isinstance(precision, Tensor) or precision.ndim == 0:
        return precision
    shape = tuple(precision.shape)
    if precision.ndim == 1 and len(precision) in (1, len(y)):
        return precision[:, None, None, None]
    if precision.ndim != 4 or any(n not in (1, m) for n, m in zip(shape, y.shape)):
        raise ValueError(
            f"precision must be a number, one value per sample (B,), or one per pixel like y {tuple(y.shape)}, got {shape}. "
            "A mask of gray images has C = 1: precision.unsqueeze(1)."
        )
    return precision


def _bend(u: Tensor) -> Tensor:
    # √(1 + u²) − 1, subtracted pixel by pixel: of the sum little would be left. hypot is one operation, and its derivative two.
    return torch.hypot(u, u.new_ones(())) - 1

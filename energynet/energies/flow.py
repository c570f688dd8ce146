"""Optical flow: energies whose minimizer is the motion between two frames, linearized around a flow that is known already."""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from energynet.energies.flow_fields import OFFSETS, both_ends, filled, inside, warp
from energynet.energies.flow_quadratic import FlowQuadratic, differences, residual
from energynet.energy import Energy


class FlowEnergy(Energy):
    r"""The robust energy of optical flow, linearized around a flow w₀:

    .. math::
        E(w) = \sum_q p_q \, \psi_a\bigl(r_q(w_q)\bigr)
               + \lambda \sum_q \sum_{n} s_{qn} \, \psi_b\bigl(\|w_q - w_n\|^2\bigr) + \tfrac\rho2 \|w - w_0\|^2, \quad
        \psi_a(t) = \tfrac{\epsilon^2}{2a} \bigl((1 + t/\epsilon^2)^a - 1\bigr)

    with q the pixels and n the neighbors of q (all eight). The residual r is the mean over features of the squared difference
    between the first frame and the second one, warped by w₀ and linearized there. Features are the soft census of the
    neighbors, and the gradient. `encode` collapses all of them into six numbers per pixel, the motion tensor. Smoothness is joint
    in the two components of the flow and weaker across edges of the first frame, s = exp(−κ|ΔI|). Pixels that leave the frame
    have p = 0.

    With exponents a = b = ½ the energy is convex, with a < ½ more robust. The ridge ρ makes the minimizer of a convex one unique.

    Example:
        >>> from energynet import NewtonCG, minimize
        >>> first, second, around = torch.rand(2, 1, 16, 20), torch.rand(2, 1, 16, 20), torch.zeros(2, 2, 16, 20)
        >>> energy = FlowEnergy()
        >>> energy(around, first, second, around).shape
        torch.Size([2])

    Args:
        smoothness: λ.
        data_exponent: a.
        smooth_exponent: b.
        data_scale: ε of the data.
        smooth_scale: ε of the smoothness, in pixels.
        edge: κ, for images of range 1.
        ridge: ρ.
        census: the weight of the census.
        gradient: the weight of the gradient.
        brightness: the weight of the brightness itself.
        correction: of the weights, such as a `FlowCorrection`: a network that returns the logarithms of five factors per pixel,
            of p and of the four s.

    Raises:
        ValueError: if a number is out of range; by a call, if shapes do not fit.

    Source: Brox, Bruhn, Papenberg and Weickert (2004), High accuracy optical flow estimation based on a theory for warping; Sun,
        Roth and Black (2014), A quantitative analysis of current practices in optical flow estimation.
    """

    def __init__(
        self,
        *,
        smoothness: float = 0.1,
        data_exponent: float = 0.45,
        smooth_exponent: float = 0.45,
        data_scale: float = 0.1,
        smooth_scale: float = 0.03,
        edge: float = 10.0,
        ridge: float = 1e-3,
        census: float = 1.0,
        gradient: float = 1.0,
        brightness: float = 0.0,
        correction: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_numbers(smoothness, ridge, edge, census, gradient, brightness)
        self.log_smoothness = nn.Parameter(torch.tensor(math.log(smoothness)))
        self.data_potential = Charbonnier(data_scale, data_exponent)
        self.smooth_potential = Charbonnier(smooth_scale, smooth_exponent)
        self.edge, self.ridge = edge, ridge
        self.census, self.gradient, self.brightness = census, gradient, brightness
        self.correction = correction

    @classmethod
    def horn_schunck(cls, smoothness: float, *, ridge: float = 1e-3) -> "FlowEnergy":
        """The quadratic special case: squares of the brightness constancy and of the differences between neighbors.

        Source: Horn and Schunck (1981), Determining optical flow.
        """
        return cls(smoothness=smoothness, data_exponent=1.0, smooth_exponent=1.0, edge=0.0, ridge=ridge,
                   census=0.0, gradient=0.0, brightness=1.0)  # fmt: skip

    def start(self, first: Tensor, second: Tensor, around: Tensor, data: Tensor | None = None,
              smooth: Tensor | None = None) -> Tensor:  # fmt: skip
        """The flow that the second frame is warped by."""
        return around

    def encode(self, first: Tensor, second: Tensor, around: Tensor, data: Tensor | None = None,
               smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """w₀, the motion tensor ``(B, 6, H, W)``, p ``(B, 1, H, W)`` and λ s ``(B, 4, H, W)``.

        Args:
            first: the first frame ``(B, C, H, W)``, of range 1.
            second: the second frame.
            around: w₀, ``(B, 2, H, W)``.
            data: factors of p ``(B, 1, H, W)``, such as which pixels are visible in the second frame.
            smooth: factors of s ``(B, 4, H, W)``, one per neighbor of ``OFFSETS``.
        """
        _check(first, second, around)
        here = inside(around).to(first.dtype)
        edges = self.log_smoothness.exp() * smooth_weights(first, self.edge)
        data, smooth = here if data is None else here * data, edges if smooth is None else edges * smooth
        tensor = self.motion_tensor(first, second, around)
        if self.correction is not None:
            factors = self.correction(first, around, tensor, data).exp()
            data, smooth = data * factors[:, :1], smooth * factors[:, 1:]
        return around, tensor, data, smooth

    def motion_tensor(self, first: Tensor, second: Tensor, around: Tensor) -> Tensor:  # -> (B, 6, H, W)
        """The mean over features of the products of (∂x, ∂y, second − first): xx, xy, yy, xt, yt, tt."""
        one, two = self.features(first), self.features(warp(second, around))
        x, y = derivatives(0.5 * (one + two))
        t = two - one
        products = [(a * b).sum(1) for a, b in ((x, x), (x, y), (y, y), (x, t), (y, t), (t, t))]
        return torch.stack(products, 1) / first.shape[1]

    def features(self, image: Tensor) -> Tensor:  # (B, C, H, W) -> (B, F, H, W)
        """What is compared between the frames."""
        parts = [self.census**0.5 * census(image)] if self.census else []
        if self.gradient:
            parts += [self.gradient**0.5 * slope for slope in derivatives(image)]
        if self.brightness:
            parts.append(self.brightness**0.5 * image)
        return torch.cat(parts, 1)

    def evaluate(self, flow: Tensor, around: Tensor, tensor: Tensor, data: Tensor, smooth: Tensor) -> Tensor:  # -> (B,)
        away = flow - around
        value = data[:, 0] * self.data_potential(residual(away, tensor)) + 0.5 * self.ridge * away.square().sum(1)
        return (value + (smooth * self.smooth_potential(differences(flow))).sum(1)).sum((1, 2))

    def majorizer(self, flow: Tensor, around: Tensor, tensor: Tensor, data: Tensor, smooth: Tensor) -> FlowQuadratic:
        """The quadratic that touches the energy at a flow and lies above it: the potentials are concave in the squares."""
        data = data * self.data_potential.slope(residual(flow - around, tensor).clamp_min(0)).unsqueeze(1)
        return FlowQuadratic(around, tensor, data, smooth * self.smooth_potential.slope(differences(flow)), self.ridge)


@dataclasses.dataclass(frozen=True)
class Charbonnier:
    """The generalized Charbonnier potential of a square, ε²((t/ε² + 1)ᵃ − 1)/(2a), which is t/2 near 0.

    Concave in t for a ≤ 1; a = 1 is the square itself.

    Example:
        >>> Charbonnier(0.1, 1.0)(torch.tensor(4.0))
        tensor(2.)
    """

    scale: float
    exponent: float

    def __post_init__(self) -> None:
        if not (self.scale > 0 and 0 < self.exponent <= 1):
            raise ValueError(f"a potential needs a scale > 0 and an exponent in (0, 1], got {self.scale} and {self.exponent}.")

    def __call__(self, t: Tensor) -> Tensor:
        return self.scale**2 / (2 * self.exponent) * ((t / self.scale**2 + 1) ** self.exponent - 1)

    def slope(self, t: Tensor) -> Tensor:
        """The derivative, times two: the weight of t/2 in the quadratic that touches the potential from above."""
        return (t / self.scale**2 + 1) ** (self.exponent - 1)


def smooth_weights(image: Tensor, edge: float) -> Tensor:  # (B, C, H, W) -> (B, 4, H, W)
    """exp(−κ|ΔI|) by the distance of the neighbors; 0 where there is no neighbor."""
    weights = []
    for rows, columns in OFFSETS:
        near, far = both_ends(image, (rows, columns))
        weight = torch.exp(-edge * (far - near).abs().mean(1)) / math.hypot(rows, columns)
        weights.append(filled(weight, (rows, columns)))
    return torch.stack(weights, 1)


def derivatives(image: Tensor) -> tuple[Tensor, Tensor]:  # (B, C, H, W) -> 2 × (B, C, H, W)
    """Along rows and columns, exact for polynomials of degree four."""
    wide, tall = pad(image, (2, 2, 0, 0), mode="replicate"), pad(image, (0, 0, 2, 2), mode="replicate")
    height, width = image.shape[-2:]
    along = [wide[..., k : k + width] for k in range(5)], [tall[..., k : k + height, :] for k in range(5)]
    x, y = ((8 * (s[3] - s[1]) - (s[4] - s[0])) / 12 for s in along)
    return x, y


def census(image: Tensor, scale: float = 0.02) -> Tensor:  # (B, C, H, W) -> (B, 8 C, H, W)
    """Whether each of the eight neighbors is brighter, softly: d/√(d² + scale²), which hardly changes with the brightness.

    Source: Hafner, Demetz and Weickert (2013), Why is the census transform good for robust optic flow computation?
    """
    padded, (height, width) = pad(image, (1, 1, 1, 1), mode="replicate"), image.shape[-2:]
    near = [padded[..., i : i + height, j : j + width] - image for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return torch.cat([d / torch.hypot(d, d.new_tensor(scale)) for d in near], 1)


def _check_numbers(smoothness: float, ridge: float, edge: float, *features: float) -> None:
    if not (smoothness > 0 and min(ridge, edge, *features) >= 0 and max(features) > 0):
        raise ValueError(
            f"FlowEnergy needs smoothness > 0, ridge ≥ 0, edge ≥ 0 and a feature of positive weight, got {smoothness}, {ridge}, "
            f"{edge} and {features} for census, gradient and brightness."
        )


def _check(first: Tensor, second: Tensor, around: Tensor) -> None:
    if first.ndim != 4 or first.shape != second.shape or around.shape != (len(first), 2, *first.shape[-2:]):
        raise ValueError(
            "optical flow needs two frames (B, C, H, W) of one shape and a flow (B, 2, H, W), "
            f"got {tuple(first.shape)}, {tuple(second.shape)} and {tuple(around.shape)}."
        )

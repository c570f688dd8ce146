"""Potentials of filter responses: smooth, quadratic near zero, with curvatures in [−κ, 1] for all weights."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Potential(nn.Module, ABC):
    """ψ of responses in units of their scales; `RidgePrior` multiplies it by λ.

    Args:
        concavity: c: λψ″ ≥ −c, whatever λ is. 0 makes it convex.
        group: filters that share a potential, and so a scale.

    Raises:
        ValueError: if c is not in [0, 1).
    """

    def __init__(self, concavity: float, group: int = 1) -> None:
        super().__init__()
        if not 0 <= concavity < 1:
            raise ValueError(f"concavity must lie in [0, 1), got {concavity}: a data term with A = I adds a curvature of 1.")
        self.concavity, self.group = concavity, group

    def most_concave(self, strength: Tensor) -> Tensor:
        """The largest κ: below c/λ, and below 1."""
        return self.concavity / strength.clamp_min(self.concavity)

    @abstractmethod
    def encode(self, strength: Tensor) -> tuple[Tensor, ...]:  # (B,)
        """What does not depend on the responses, given λ of each sample."""

    @abstractmethod
    def forward(self, u: Tensor, *code: Tensor) -> Tensor:  # (B, F, P) -> (B, F / group)
        """The sums over pixels, for each group of filters."""


class Huber(Potential):
    r"""ψ(t) = h(t) − h(κt)/κ with h(t) = √(1 + t²) − 1: quadratic near zero; with κ > 0 it levels off, which preserves edges.

    With groups, t is the norm of the responses of a group: such a potential sees no direction inside it.

    Example:
        >>> potential = Huber(4)
        >>> potential(torch.ones(2, 4, 9), *potential.encode(torch.ones(2))).shape
        torch.Size([2, 4])

    Args:
        num_filters: F.
        concavity: c.
        group: filters that share a potential of their norm.

    Raises:
        ValueError: if c is not in [0, 1), or F is not a multiple of the group.

    Source: Goujon et al. (2024), Learning weakly convex regularizers; Ducotterd and Unser (2025), Multivariate fields of
        experts, for the groups.
    """

    def __init__(self, num_filters: int, *, concavity: float = 0.0, group: int = 1) -> None:
        super().__init__(concavity, group)
        if group < 1 or num_filters % group:
            raise ValueError(f"num_filters must be a multiple of the group, got {num_filters} filters in groups of {group}.")
        self.raw_mixing = nn.Parameter(torch.zeros(num_filters // group)) if concavity else None

    def encode(self, strength: Tensor) -> tuple[Tensor, ...]:
        if self.raw_mixing is None:
            return ()
        return (self.most_concave(strength)[:, None, None] * torch.sigmoid(self.raw_mixing)[:, None],)  # (B, G, 1)

    def forward(self, u: Tensor, *code: Tensor) -> Tensor:
        if self.group > 1:
            square = u.unflatten(1, (-1, self.group)).square().sum(2)
            values = bend_square(square)
            for mixing in code:
                values = values - bend_square(mixing.square() * square) / mixing
            return values.sum(-1)
        values = bend(u)
        for mixing in code:
            values = values - bend(mixing * u) / mixing
        return values.sum(-1)


class Spline(Potential):
    r"""ψ with a learned shape, shared by all filters: ψ″ is piecewise linear between its values at equidistant knots.

    So ψ′ is a spline that is monotone where c = 0, and ψ is even and twice continuously differentiable. Beyond the last knot
    ψ is linear.

    Example:
        >>> potential = Spline(knots=8)
        >>> u = torch.zeros(1, 1, 3)
        >>> potential(u, *potential.encode(torch.ones(1))).detach()
        tensor([[0.]])

    Args:
        concavity: c.
        knots: on each side.
        reach: the last knot, in units of the scale.

    Source: Goujon et al. (2023), A neural-network-based convex regularizer, whose profiles are linear splines.
    """

    def __init__(self, *, concavity: float = 0.0, knots: int = 16, reach: float = 8.0) -> None:
        super().__init__(concavity)
        self.spacing = reach / knots
        places = torch.arange(knots) * self.spacing
        share = (1 + places.square()).pow(-1.5).clamp(0.02, 0.98)  # begin as Huber
        self.raw = nn.Parameter(torch.logit(share))

    def encode(self, strength: Tensor) -> tuple[Tensor, ...]:
        """Coefficients of the cubics, ``(B, 4, 2 knots + 2)``, the first and last for what lies outside the knots."""
        low = self.most_concave(strength)[:, None] if self.concavity else torch.zeros_like(strength)[:, None]
        half = (1 + low) * torch.sigmoid(self.raw) - low  # ψ″ at knots ≥ 0
        bent = torch.cat([half.flip(1), half[:, 1:]], 1)
        bent = torch.nn.functional.pad(bent, (1, 1))  # 0 at the last knots
        d2, change = bent[:, :-1] * self.spacing**2, bent.diff(dim=1) * self.spacing**2
        slope = torch.cumsum(torch.nn.functional.pad(d2 + change / 2, (1, 0)), 1)
        middle = (slope.shape[1] - 1) // 2
        slope = slope - slope[:, middle : middle + 1]
        value = torch.cumsum(torch.nn.functional.pad(slope[:, :-1] + d2 / 2 + change / 6, (1, 0)), 1)
        value = value - value[:, middle : middle + 1]
        ends = [torch.stack([value[:, i], slope[:, i], 0 * value[:, i], 0 * value[:, i]], 1)[..., None] for i in (0, -1)]
        inside = torch.stack([value[:, :-1], slope[:, :-1], d2 / 2, change / 6], 1)
        return (torch.cat([ends[0], inside, ends[1]], 2),)

    def forward(self, u: Tensor, *code: Tensor) -> Tensor:
        (table,) = code  # (B, 4, 2K + 2)
        last = table.shape[-1] - 2
        t = u / self.spacing + last // 2  # the left end at 0
        cell = t.detach().floor().clamp(-1, last).long()
        rest = t - torch.where(cell < 0, 0, cell).to(t.dtype)
        flat = (cell + 1).flatten(1)
        a, b, c, d = (table[:, k].expand(len(u), -1).gather(1, flat).unflatten(1, u.shape[1:]) for k in range(4))
        return (a + rest * (b + rest * (c + rest * d))).sum(-1)


def bend(u: Tensor) -> Tensor:
    """√(1 + u²) − 1, subtracted pixel by pixel: of the sum little would be left.

    hypot is one operation, and its derivative two.
    """
    return torch.hypot(u, u.new_ones(())) - 1


def bend_square(square: Tensor) -> Tensor:
    """√(1 + s) − 1 of squares, which has derivatives at 0."""
    return (1 + square).sqrt() - 1

"""A data term and a prior: the energy of a restored picture."""

import math
from typing import Any

import torch
from torch import Tensor

from energynet._torch.autodiff import readable
from energynet.energies.operators import Identity, Operator
from energynet.energies.priors import Prior
from energynet.energy import Energy, encode


class Restoration(Energy):
    r"""½‖Ax − y‖² + R(x; Aᵀy, σ), whose minimizer is the restored picture; E/σ² is a negative log-density.

    Example:
        >>> from energynet import minimize
        >>> from energynet.energies import CosineStart, Huber, RidgePrior
        >>> energy = Restoration(RidgePrior(CosineStart(3), Huber(8)))
        >>> minimize(energy, None, torch.rand(2, 1, 9, 9), 0.1).value.shape         # y (B, C, H, W), σ
        torch.Size([2, 1, 9, 9])

    Args:
        prior: R.
        operator: A; default the identity. What it depends on follows σ in a call: ``energy(x, y, sigma, mask)``.

    Raises:
        ValueError: by a call, if y has no four dimensions, or σ is not positive, one number or one per sample.
    """

    def __init__(self, prior: Prior, operator: Operator | None = None) -> None:
        super().__init__()
        self.prior, self.operator = prior, operator or Identity()

    @property
    def step_size(self) -> float:
        """2/(μ + L) for the bounds of the curvature where A = I; safe where ‖A‖ ≤ 1."""
        return 2 / (max(1 - self.prior.concavity, 0.0) + 1 + self.prior.strength)

    def start(self, y: Tensor, sigma: Tensor | float, *known: Any) -> Tensor:
        """The operator's first picture."""
        return self.operator.guide(y, *known)

    def encode(self, y: Tensor, sigma: Tensor | float, *known: Any) -> tuple[Any, ...]:
        """y, the number of things known, they, and the prior's code."""
        level = noise_level(y, sigma)
        return y, known, encode(self.prior, (self.operator.guide(y, *known), level))

    def evaluate(self, x: Tensor, y: Tensor, known: tuple[Any, ...], code: tuple[Any, ...]) -> Tensor:  # -> (B,)
        misfit = self.operator.apply(x, *known) - y
        return 0.5 * misfit.square().flatten(1).sum(1) + self.prior.evaluate(x, *code)


def noise_level(y: Tensor, sigma: Tensor | float) -> Tensor:  # -> (B,) or (1,)
    """σ per sample."""
    level = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).reshape(-1)
    if y.ndim != 4 or len(level) not in (1, len(y)):
        raise ValueError(
            f"pictures must be (B, C, H, W) and σ a number or one per sample, got y {tuple(y.shape)} and {len(level)} values. "
            "Gray pictures have C = 1: y.unsqueeze(1)."
        )
    if readable(level) and not bool(((level > 0) & (level < math.inf)).all()):
        raise ValueError(f"σ must be positive and finite, in units of the picture, got {level.tolist()}.")
    return level.expand(len(y))

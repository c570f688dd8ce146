"""Denoisers with one interface: a noisy picture and its noise level as two channels (B, 2, H, W) in, a picture (B, 1, H, W) out.

In training they take pictures as they are, and the loss leaves the border out; otherwise the border is mirrored.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from energynet import Adjoint, ImplicitAdjoint, Termination, fixed_point
from energynet.energies import Denoiser, ImageContraction, Prior
from energynet.energies.denoiser import cropped, padded
from energynet.energies.restoration import noise_level
from energynet.losses import denoising_score_matching

from .solves import SolveLog

TEST = Termination(atol=0.0, rtol=1e-4, max_steps=500)
GRADIENT = Termination(rtol=1e-2, max_steps=50)


@dataclass(frozen=True)
class Effort:
    """How much a solve may cost in training, and when it begins."""

    tolerance: float = 2e-3
    matching: int = 0


class EnergyDenoiser(nn.Module):
    """The minimizer of a prior's energy.

    The first updates match scores: one gradient step with a learned length is to denoise, which needs no solve.

    Args:
        prior: of gray pictures.
        effort: the tolerance of solves in training, and the number of updates of score matching.
        adjoint: how gradients come back; none: exactly, by conjugate gradients.
    """

    def __init__(self, prior: Prior, effort: Effort, adjoint: Adjoint | None = None) -> None:
        super().__init__()
        self.solves, self.effort = SolveLog(), effort
        adjoint = adjoint or ImplicitAdjoint(termination=GRADIENT, report=self.solves.report)
        loose = Termination(atol=0.0, rtol=effort.tolerance, max_steps=100)
        self.coarse = Denoiser(prior, termination=loose, adjoint=adjoint, on_failure="warn")
        self.fine = self.coarse.with_termination(TEST)
        self.log_step = nn.Parameter(torch.tensor(-2.0))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.updates: Tensor

    @property
    def prior(self) -> Prior:
        """R."""
        return self.coarse.energy.prior

    def forward(self, inputs: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 1, H, W)
        y, sigma = inputs[:, :1], inputs[:, 1, 0, 0]
        if self.training:
            return self.solves.add(self.coarse.solve(y, sigma)).value
        margin = self.fine.margin
        solution = self.solves.add(self.fine.solve(padded(y, margin), sigma))
        return cropped(solution.value, margin)

    def matching_loss(self, inputs: Tensor, clean: Tensor) -> Tensor:  # -> (B,)
        """Of one gradient step from the noisy picture, a mean over its pixels."""
        y, sigma = inputs[:, :1], inputs[:, 1, 0, 0]
        noise = (y - clean) / sigma[:, None, None, None]

        def energy(x: Tensor, guide: Tensor, sigma: Tensor) -> Tensor:
            return self.log_step.exp() * self.prior(x, guide, sigma) / sigma.square()

        return denoising_score_matching(energy, clean, y, sigma, sigma=sigma, noise=noise) / clean[0].numel()

    @torch.no_grad()
    def fit_scales(self, inputs: Tensor, clean: Tensor) -> tuple[float, float]:
        """Choose a strength and a scale for the fixed point: at first those of the density whose scores were matched."""

        def loss(strength: float, scale: float) -> float:
            self.prior.rescale_(strength, scale)
            answer = self.coarse.solve(inputs[:, :1], inputs[:, 1, 0, 0]).value
            self.prior.rescale_(-strength, -scale)
            return float(((answer - clean).square().flatten(1).mean(1) / inputs[:, 1, 0, 0]).mean())

        center = float(self.log_step), 0.0  # exp(−γR/σ²) is the density, whose maximum is wanted
        tried = {center: loss(*center)}
        for reach in (1.0, 0.5):
            center = min(tried, key=tried.__getitem__)
            for move in ((reach, 0.0), (-reach, 0.0), (0.0, reach), (0.0, -reach)):
                place = center[0] + move[0], center[1] + move[1]
                tried.setdefault(place, loss(*place))
        best = min(tried, key=tried.__getitem__)
        self.prior.rescale_(*best)
        return best


class ContractionDenoiser(nn.Module):
    """The fixed point of a contractive convolutional map."""

    def __init__(self, network: ImageContraction) -> None:
        super().__init__()
        self.network, self.solves = network, SolveLog()

    def forward(self, inputs: Tensor) -> Tensor:
        y, sigma = inputs[:, :1], inputs[:, 1, 0, 0]
        margin = 0 if self.training else self.network.margin
        y = padded(y, margin)
        termination = Termination(atol=0.0, rtol=2e-3, max_steps=100) if self.training else TEST
        adjoint = ImplicitAdjoint(termination=replace(GRADIENT, max_steps=100), report=self.solves.report)
        code = self.network.encode(y, noise_level(y, sigma))
        solution = fixed_point(self.network, y, *code, termination=termination, adjoint=adjoint, on_failure="warn")
        return cropped(self.solves.add(solution).value, margin)


class DnCnn(nn.Module):
    """A network that predicts the noise: convolutions and rectifiers.

    Source: Zhang et al. (2017), Beyond a Gaussian denoiser; without batch normalization, and with the noise level as input.
    """

    def __init__(self, *, width: int = 32, depth: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(2, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        last = nn.Conv2d(width, 1, 3, padding=1)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.normal_(last.weight, std=0.1 / width**0.5)
        self.network = nn.Sequential(*layers, last)

    def forward(self, inputs: Tensor) -> Tensor:
        y, sigma = inputs[:, :1], inputs[:, 1:]
        seen = torch.cat([(y - 0.5) / (4 * sigma), torch.log(sigma / 0.1)], 1)
        return y - sigma * self.network(seen)

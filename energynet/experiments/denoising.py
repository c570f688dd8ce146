"""Image denoising: the task, and the energies among its rivals."""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from energynet import Adjoint, OneStepAdjoint, UnrolledAdjoint
from energynet.energies import (
    AdaptivePrior,
    Composed,
    CosineStart,
    Huber,
    ImageContraction,
    Prior,
    ResidualPrior,
    RidgePrior,
    Spline,
)

from .data import Data, Rows
from .data.pictures import embedded, load
from .denoising_models import ContractionDenoiser, DnCnn, Effort, EnergyDenoiser
from .denoising_rivals import NonLocalMeans, TotalVariation, Wavelets
from .task import Column, Options, Rates, Rival, Task

BORDER = 4
"""Pixels at the border of training crops that the loss leaves out."""
NOISE_SEED = 25


@dataclass(frozen=True)
class DenoisingOptions(Options):
    """Image denoising."""

    updates: int = 4000
    every: int = 200
    patience: int = 0
    batch_size: int = 8
    learning_rate: float | None = None
    final_rate: float = 0.02
    clip: float = 1.0
    averaging: float = 0.995
    held_out: float = 0.05
    folds: int | None = 1
    side: int = 48
    """Of the training crops."""
    sigma: float = 25.0
    """The noise of held-out pictures, of 255."""
    lowest: float = 12.0
    """Noise levels in training are drawn between this one ..."""
    highest: float = 55.0
    """... and this one, evenly on a logarithmic scale."""
    test_sigmas: tuple[float, ...] = (15.0, 25.0, 50.0)
    """Noise levels of test pictures."""
    matching: int = 600
    """Updates of score matching, before those through the solver."""
    matching_sigma: float = 10.0
    """The noise of score matching: what one gradient step can remove."""
    tolerance: float = 2e-3
    """Relative tolerance of solves in training."""


@dataclass(frozen=True)
class Size:
    """How energies are trained."""

    matching: int
    tolerance: float


@dataclass(frozen=True)
class Restored:
    """Pictures under several noise levels, and the seconds of CPU time that each took."""

    sigmas: tuple[float, ...]
    pictures: Tensor  # (S, N, 1, H, W)
    seconds: tuple[float, ...]


class Denoising(Task):
    """Image denoising: learned energies through their minimizers, and their rivals.

    One model per method serves all noise levels. Figures are means over pictures, at each noise level.
    """

    name = "denoising"
    options_class = DenoisingOptions
    size_class = Size
    choice = "psnr_25"
    columns: ClassVar[Mapping[str, Column]] = {
        "psnr_25": Column("PSNR 25", 1, 2), "ssim_25": Column("SSIM 25", 1, 3), "psnr_15": Column("PSNR 15", 1, 2),
        "psnr_50": Column("PSNR 50", 1, 2), "seconds_25": Column("s/picture", 1, 2),
    }  # fmt: skip
    options: DenoisingOptions

    @classmethod
    def rivals(cls) -> Sequence[Rival]:
        wavelets = (Wavelets(),) if find_spec("pywt") else ()
        return (Adaptive(), Ridge(), ConvexRidge(), SplineRidge(), ComposedRidge(), GroupedRidge(), Residual(), Contraction(),
                RidgeOneStep(), RidgeUnrolled(), NeuralNetwork(), TotalVariation(), *wavelets, NonLocalMeans())  # fmt: skip

    @classmethod
    def usual(cls) -> Sequence[Rival]:
        return (Ridge(), NeuralNetwork(), TotalVariation())

    @classmethod
    def first_look(cls) -> DenoisingOptions:
        return DenoisingOptions(updates=150, every=50, matching=100, held_out=0.2, test_sigmas=(25.0,))

    def load(self, folder: Path | None) -> Data:
        return embedded() if folder is None else load(folder)

    def size(self, data: Data) -> Size:
        return Size(self.options.matching, self.options.tolerance)

    def draw(self, rows: Rows) -> Rows:
        """Crops, turned at random, with noise of random levels: the noisy crop and the level as channels."""
        side, options = self.options.side, self.options
        height, width = rows.targets.shape[-2:]
        places = [torch.randint(size - side + 1, (len(rows),)).tolist() for size in (height, width)]
        clean = torch.stack([one[:, i : i + side, j : j + side] for one, i, j in zip(rows.targets, *places)])
        turns, flip = int(torch.randint(4, ())), bool(torch.randint(2, ()))
        clean = torch.rot90(clean.flip(-1) if flip else clean, turns, (-2, -1))
        share = torch.rand(len(rows), device=clean.device)
        sigma = options.lowest / 255 * (options.highest / options.lowest) ** share
        return Rows(noisy(clean, sigma), clean)

    def loss(self, output: Tensor, batch: Rows) -> Tensor:  # (B, 1, H, W) -> ()
        """The squared error in units of the noise level, to which that of a good denoiser is about proportional."""
        error = (output - batch.targets)[..., BORDER:-BORDER, BORDER:-BORDER].square().flatten(1).mean(1)
        return (error / batch.inputs[:, 1, 0, 0]).mean() * 10

    def predict(self, model: nn.Module, rows: Rows) -> Restored:
        return restore(model, rows.targets, (self.options.sigma,))

    def predict_test(self, model: nn.Module, rows: Rows) -> Restored:
        return restore(model, rows.targets, self.options.test_sigmas)

    def evaluate(self, output: Restored, rows: Rows, calibration: Mapping[str, float]) -> dict[str, float]:
        told: dict[str, float] = {}
        for sigma, pictures, seconds in zip(output.sigmas, output.pictures, output.seconds):
            error = (pictures - rows.targets).square().flatten(1).mean(1)
            told[f"psnr_{sigma:g}"] = (-10 * torch.log10(error)).mean().item()
            told[f"ssim_{sigma:g}"] = float(np.mean([similarity(*pair) for pair in zip(pictures, rows.targets)]))
            told[f"seconds_{sigma:g}"] = seconds
        return told


def noisy(clean: Tensor, sigma: Tensor, generator: torch.Generator | None = None) -> Tensor:  # -> (B, 2, H, W)
    """Noise added, nothing clipped; the second channel holds the level."""
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    level = sigma[:, None, None, None]
    return torch.cat([clean + level * noise, level.expand_as(clean)], 1)


@torch.no_grad()
def restore(model: nn.Module, clean: Tensor, sigmas: Sequence[float]) -> Restored:
    """Add noise with a fixed seed to each picture, denoise it, and clip to [0, 1]."""
    model.eval()
    pictures, seconds = [], []
    for sigma in sigmas:
        generator, began = torch.Generator().manual_seed(NOISE_SEED), time.process_time()
        level = torch.full((1,), sigma / 255, device=clean.device)
        answers = [model(noisy(one[None], level, generator)).clamp(0, 1) for one in clean]
        pictures.append(torch.cat(answers))
        seconds.append((time.process_time() - began) / len(clean))
    return Restored(tuple(sigmas), torch.stack(pictures), tuple(seconds))


def similarity(one: Tensor, other: Tensor) -> float:
    """SSIM with Gaussian windows, as is usual in denoising."""
    pair = (one[0].cpu().numpy().astype(np.float64), other[0].cpu().numpy().astype(np.float64))
    return float(structural_similarity(*pair, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False))


class EnergyRival(Rival):
    """What the energies have in common: score matching first, then the loss of the minimizer."""

    rates = Rates(learning_rate=0.01, weight_decay=0.0)
    network_share: ClassVar[float] = 0.1
    """The learning rate of a network's weights, relative to that of filters and potentials."""

    @abstractmethod
    def prior(self) -> Prior:
        """An untrained prior."""

    def adjoint(self) -> Adjoint | None:
        """How gradients come back; none: exactly."""
        return None

    def build(self, size: Size) -> nn.Module:
        return EnergyDenoiser(self.prior(), Effort(size.tolerance, size.matching), self.adjoint())

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        assert isinstance(model, EnergyDenoiser)
        model.updates += 1
        updates = int(model.updates)
        if updates <= model.effort.matching:
            assert isinstance(task, Denoising)
            sigma = torch.full((len(batch),), task.options.matching_sigma / 255, device=batch.targets.device)
            return model.matching_loss(noisy(batch.targets, sigma), batch.targets).mean()
        if updates == model.effort.matching + 1 and model.effort.matching:
            model.fit_scales(batch.inputs, batch.targets)
        return task.loss(model(batch.inputs), batch)

    def optimizer(self, model: nn.Module, rates: Rates, num_rows: int) -> torch.optim.Optimizer:
        network = [p for name, p in model.named_parameters() if ".network." in name]
        rest = [p for name, p in model.named_parameters() if ".network." not in name]
        groups: list[dict[str, Any]] = [{"params": rest}]
        if network:
            groups.append({"params": network, "lr": self.network_share * rates.learning_rate})
        return torch.optim.Adam(groups, lr=rates.learning_rate, betas=(0.9, 0.99))


class Adaptive(EnergyRival):
    """A convex energy whose weights at every pixel a network reads from the noisy picture."""

    name = "adaptive"

    def prior(self) -> Prior:
        return AdaptivePrior(CosineStart(5), width=40, depth=4)


class Ridge(EnergyRival):
    """48 filters of 7 × 7 with potentials that level off: weakly convex, one minimizer."""

    name = "ridge"

    def prior(self) -> Prior:
        return RidgePrior(CosineStart(7), Huber(48, concavity=0.99))


class ConvexRidge(EnergyRival):
    """The same filters with convex potentials."""

    name = "convex-ridge"

    def prior(self) -> Prior:
        return RidgePrior(CosineStart(7), Huber(48))


class SplineRidge(EnergyRival):
    """Convex potentials of learned shape: monotone splines."""

    name = "spline-ridge"

    def prior(self) -> Prior:
        return RidgePrior(CosineStart(7), Spline())


class ComposedRidge(EnergyRival):
    """60 filters of 13 × 13 composed of three convolutions, weakly convex (Goujon et al. 2024)."""

    name = "composed-ridge"

    def prior(self) -> Prior:
        return RidgePrior(Composed(), Huber(60, concavity=0.99))


class GroupedRidge(EnergyRival):
    """Potentials of groups of four filters, weakly convex."""

    name = "grouped-ridge"

    def prior(self) -> Prior:
        return RidgePrior(CosineStart(7), Huber(48, concavity=0.99, group=4))


class Residual(EnergyRival):
    """A deep energy, half the squared output of a network; it may have several minimizers."""

    name = "residual"

    def prior(self) -> Prior:
        return ResidualPrior()


class RidgeOneStep(EnergyRival):
    """`ridge` with the gradient of a single step at the answer (Fung et al. 2022) in place of the exact one."""

    name = "ridge-one-step"

    def prior(self) -> Prior:
        return Ridge().prior()

    def adjoint(self) -> Adjoint | None:
        return OneStepAdjoint()


class RidgeUnrolled(EnergyRival):
    """`ridge` with backpropagation through the iterations of its solver."""

    name = "ridge-unrolled"

    def prior(self) -> Prior:
        return Ridge().prior()

    def adjoint(self) -> Adjoint | None:
        return UnrolledAdjoint()


class Contraction(Rival):
    """`FPI_NN`: the fixed point of a contractive convolutional map."""

    name = "fpi-nn"
    rates = Rates(learning_rate=1e-3, weight_decay=0.0)

    def build(self, size: Size) -> nn.Module:
        return ContractionDenoiser(ImageContraction())


class NeuralNetwork(Rival):
    """A network of 8 layers and 32 channels that predicts the noise."""

    name = "dncnn"
    rates = Rates(learning_rate=1e-3, weight_decay=0.0)

    def build(self, size: Size) -> nn.Module:
        return DnCnn()

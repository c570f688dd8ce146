"""Classical denoisers of scikit-image; their one number is chosen on training pictures."""

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from skimage import restoration
from torch import Tensor, nn

from .data import Rows
from .task import FittedRival, Rates

LEVELS = (15.0, 25.0, 50.0)
PICTURES = 4


class Classical(nn.Module):
    """A function of a noisy picture, its noise level and a number that was chosen for each level."""

    def __init__(self, rival: "ClassicalRival") -> None:
        super().__init__()
        self.rival = rival
        self.register_buffer("weights", torch.ones(len(LEVELS)))
        self.weights: Tensor

    def forward(self, inputs: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 1, H, W)
        levels = np.array(LEVELS) / 255
        answers = []
        for picture, sigma in zip(inputs[:, 0].cpu().numpy(), inputs[:, 1, 0, 0].tolist()):
            weight = float(np.interp(np.log(sigma), np.log(levels), self.weights.cpu().numpy()))
            answers.append(self.rival.denoise(picture, sigma, weight))
        return torch.from_numpy(np.stack(answers).astype(np.float32))[:, None].to(inputs)


class ClassicalRival(FittedRival):
    """A method with one number per noise level, in units of that level."""

    candidates: ClassVar[tuple[float, ...]]
    grid = (Rates(),)

    @abstractmethod
    def denoise(self, picture: np.ndarray, sigma: float, weight: float) -> np.ndarray:
        """(H, W) -> (H, W)."""

    def build(self, size: object) -> nn.Module:
        return Classical(self)

    def fit(self, model: nn.Module, rows: Rows, rates: Rates, seed: int) -> None:
        """Choose the weight of each level with the least squared error over the first training pictures."""
        assert isinstance(model, Classical)
        clean = rows.targets[:PICTURES, 0].cpu().numpy()
        generator = np.random.default_rng(seed)
        noise = generator.standard_normal(clean.shape, dtype=np.float32)
        for index, level in enumerate(LEVELS):
            sigma = level / 255
            model.weights[index] = min(self.candidates, key=lambda weight: sum(
                float(np.square(self.denoise(picture, sigma, weight) - true).mean())
                for picture, true in zip(clean + np.float32(sigma) * noise, clean)))  # fmt: skip


class TotalVariation(ClassicalRival):
    """Total variation (Chambolle 2004), its weight chosen on training pictures."""

    name = "total-variation"
    candidates = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)

    def denoise(self, picture: np.ndarray, sigma: float, weight: float) -> np.ndarray:
        found: np.ndarray = restoration.denoise_tv_chambolle(picture, weight=weight * sigma, eps=1e-5, max_num_iter=500)
        return found


class Wavelets(ClassicalRival):
    """Wavelet shrinkage (BayesShrink) by PyWavelets, shift-averaged; a number that scales the noise level is tuned."""

    name = "wavelets"
    candidates = (0.6, 0.8, 1.0, 1.2)

    def denoise(self, picture: np.ndarray, sigma: float, weight: float) -> np.ndarray:
        found: np.ndarray = restoration.cycle_spin(
            picture, restoration.denoise_wavelet, max_shifts=2,
            func_kw={"sigma": weight * sigma, "wavelet": "db2", "method": "BayesShrink", "mode": "soft", "rescale_sigma": True},
            workers=1,
        )  # fmt: skip
        return found


class NonLocalMeans(ClassicalRival):
    """Non-local means, its width chosen on training pictures."""

    name = "non-local-means"
    candidates = (0.5, 0.6, 0.7, 0.8, 0.9)

    def denoise(self, picture: np.ndarray, sigma: float, weight: float) -> np.ndarray:
        found: np.ndarray = restoration.denoise_nl_means(picture, patch_size=7, patch_distance=9, h=weight * sigma, sigma=sigma,
                                                         fast_mode=True)  # fmt: skip
        return found

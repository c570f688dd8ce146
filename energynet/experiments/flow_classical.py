"""Optical flow by scikit-image and OpenCV, with their default settings, but for one median."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data import Rows
from .task import FittedRival, Rates

Array = Any


class Classical(nn.Module):
    """A function of two gray frames ``(H, W)`` of range 1, as a model."""

    def __init__(self, function: Callable[[Array, Array], Array]) -> None:
        super().__init__()
        self.function = function

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # 2 × (B, 1, H, W) -> (B, 2, H, W)
        flows = [self.function(one.cpu().numpy(), two.cpu().numpy()) for one, two in zip(first[:, 0], second[:, 0])]
        return torch.from_numpy(np.stack(flows).astype(np.float32)).to(first.device)


class ClassicalRival(FittedRival, ABC):
    """A method that is not trained."""

    @staticmethod
    @abstractmethod
    def flow(first: Array, second: Array) -> Array:  # 2 × (H, W) -> (2, H, W)
        """The flow, first to the right, then down."""

    def build(self, size: object) -> nn.Module:
        return Classical(self.flow)

    def fit(self, model: nn.Module, rows: Rows, rates: Rates, seed: int) -> None:
        """Nothing is learned."""


class NoMotion(ClassicalRival):
    """No motion at all."""

    name = "zero"

    @staticmethod
    def flow(first: Array, second: Array) -> Array:
        return np.zeros((2, *first.shape))


class TVL1(ClassicalRival):
    """Total variation and L1 data (Zach, Pock and Bischof 2007), of scikit-image."""

    name = "tv-l1"

    @staticmethod
    def flow(first: Array, second: Array) -> Array:
        from skimage.registration import optical_flow_tvl1

        return optical_flow_tvl1(first, second)[::-1]


class ILK(ClassicalRival):
    """Iterative Lucas–Kanade (Le Besnerais and Champagnat 2005), of scikit-image.

    With a median between the steps: without one, it diverges on one of nine pairs of FlyingChairs.
    """

    name = "ilk"

    @staticmethod
    def flow(first: Array, second: Array) -> Array:
        from skimage.registration import optical_flow_ilk

        return optical_flow_ilk(first, second, prefilter=True)[::-1]


class DIS(ClassicalRival):
    """Dense inverse search (Kroeger et al. 2016), medium preset, of OpenCV."""

    name = "dis"

    @staticmethod
    def flow(first: Array, second: Array) -> Array:
        import cv2

        method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        return method.calc(_bytes(first), _bytes(second), np.zeros((*first.shape, 2), np.float32)).transpose(2, 0, 1)


class Farneback(ClassicalRival):
    """Polynomial expansion (Farnebäck 2003), of OpenCV."""

    name = "farneback"

    @staticmethod
    def flow(first: Array, second: Array) -> Array:
        import cv2

        start = np.zeros((*first.shape, 2), np.float32)
        return cv2.calcOpticalFlowFarneback(_bytes(first), _bytes(second), start, 0.5, 5, 15, 3, 5, 1.2, 0).transpose(2, 0, 1)


def _bytes(image: Array) -> Array:
    return np.round(255 * image).astype(np.uint8)

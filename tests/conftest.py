"""Shared set-up: one thread, a fixed seed, no program of an earlier test, and doctests that print what the docstrings say."""

import pytest
import torch
from torch import Tensor

from energynet import Compiled


@pytest.fixture(autouse=True)
def reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Compiled().clear()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-300))

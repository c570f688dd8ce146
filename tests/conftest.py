"""Shared set-up: one thread, a fixed seed, no program of an earlier test, and doctests that print what the docstrings say."""

import pytest
import torch
from compiling import interpret
from torch import Tensor

from energynet import Compiled


@pytest.fixture(autouse=True)
def reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Compiled().clear()


@pytest.fixture
def interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Recorded programs are run as they are instead of being compiled, unless the parameter is False; returns whether."""
    chosen = bool(getattr(request, "param", True))
    if chosen:
        monkeypatch.setattr("energynet.compiled.inductor.compile_graph", interpret)
    return chosen


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-300))

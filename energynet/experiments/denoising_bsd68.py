"""Weights that ship, and classical methods, on BSD68: ``python -m energynet.experiments.denoising_bsd68 --data DIR``.

Each use of test pictures is appended to the log. The protocol is that of the experiment: noise with a fixed seed, not
clipped; the answer clipped; means over pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from energynet import Termination
from energynet.diagnostics import laplace
from energynet.energies import Denoiser, denoiser, pretrained
from energynet.energies.denoiser import cropped, padded

from .data import Data
from .data.pictures import load
from .denoising import NOISE_SEED, Denoising, DenoisingOptions, noisy
from .find import find_rival
from .fits import Setup
from .log import log_test
from .results import read_json, write_json
from .solves import SolveLog
from .task import FittedRival, Rival

MIDDLE = 128
NINETY = 1.645


@dataclass(frozen=True)
class Wanted:
    """Which methods, on which pictures."""

    data: Path
    """The folder that holds train400/ and bsd68/."""
    method: tuple[str, ...] = ("ridge", "total-variation", "non-local-means")
    """Names of weights that ship, or of classical methods, which choose their number on training pictures first."""
    sigmas: tuple[float, ...] = (25.0,)
    """Noise levels, of 255."""
    pictures: int = 68
    """How many, from the first on."""
    unsure: int = 0
    """Of how many of them Laplace's intervals are compared with the true error, in the middle 128 × 128 pixels."""
    out: Path = Path("docs/results/denoising/bsd68.json")
    """Figures, by method; those of other methods stay."""
    test_log: Path = Path("docs/results/test_log.json")
    """Where each use is logged."""


class Shipped(nn.Module):
    """A denoiser whose weights ship, as a model of the experiment."""

    def __init__(self, layer: Denoiser) -> None:
        super().__init__()
        self.layer, self.solves = layer, SolveLog()
        self.layer.on_failure = "warn"

    def forward(self, inputs: Tensor) -> Tensor:  # (B, 2, H, W) -> (B, 1, H, W)
        y, sigma = inputs[:, :1], inputs[:, 1, 0, 0]
        solution = self.solves.add(self.layer.solve(padded(y, self.layer.margin), sigma))
        return cropped(solution.value, self.layer.margin)


def model_of(rival: Rival, data: Data) -> nn.Module:
    """The model of a method: with the weights that ship, or fitted to training pictures."""
    if rival.name in pretrained.PRIORS:
        return Shipped(denoiser(rival.name))
    if not isinstance(rival, FittedRival):
        raise ValueError(f"{rival.name} has no weights that ship; there are {', '.join(pretrained.available())}.")
    model = rival.build(None)
    rival.fit(model, data.train, rival.rates, 0)
    return model


@torch.no_grad()
def coverage(layer: Denoiser, clean: Tensor, sigma: float) -> dict[str, float]:
    """The share of pixels whose true value lies in Laplace's 90 % interval, and the correlation of deviation and error."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    top, left = ((size - MIDDLE) // 2 for size in clean.shape[-2:])
    inside, deviations, errors = [], [], []
    for one in clean[..., top : top + MIDDLE, left : left + MIDDLE]:
        inputs = noisy(one[None], torch.tensor([sigma / 255]), generator)
        context = padded(inputs[:, :1], layer.margin), sigma / 255
        solution = layer.solve(*context)
        deviation = cropped(laplace(layer.energy, solution, *context, noise=sigma / 255), layer.margin)
        error = (cropped(solution.value, layer.margin) - one).abs()
        inside.append((error <= NINETY * deviation).double().mean())
        deviations.append(deviation.flatten())
        errors.append(error.flatten())
    pair = torch.stack([torch.cat(deviations), torch.cat(errors)])
    covered, together = torch.stack(inside).mean(), torch.corrcoef(pair)[0, 1]
    return {f"covered_90_{sigma:g}": float(covered), f"correlation_{sigma:g}": float(together)}


def exactness(layer: Denoiser, clean: Tensor, sigma: float) -> float:
    """By how much the PSNR of the first picture changes when it is solved to 1e-6, in dB."""
    model = Shipped(layer.with_termination(Termination(atol=0.0, rtol=1e-6, max_steps=5000)))
    inputs = noisy(clean[:1], torch.tensor([sigma / 255]), torch.Generator().manual_seed(NOISE_SEED))
    with torch.no_grad():
        errors = [(found(inputs).clamp(0, 1) - clean[:1]).square().mean() for found in (model, Shipped(layer))]
    return float(10 * (errors[1] / errors[0]).log10().abs())


def evaluate(wanted: Wanted) -> dict[str, Any]:
    """Run it; returns what it writes."""
    task, data = Denoising(DenoisingOptions(test_sigmas=wanted.sigmas)), load(wanted.data)
    rows = data.test[torch.arange(min(wanted.pictures, len(data.test)))]
    told: dict[str, Any] = read_json(wanted.out) if wanted.out.is_file() else {}
    for name in wanted.method:
        rival = find_rival(name, Denoising)
        model = model_of(rival, data)
        figures = task.evaluate(task.predict_test(model, rows), rows, {}) | {"pictures": len(rows)}
        if isinstance(model, Shipped):
            count = model.solves.take()
            figures |= {"steps": count.forward_steps or 0.0, "converged": count.converged or 0.0}
            figures[f"solved_exactly_{wanted.sigmas[0]:g}"] = exactness(model.layer, rows.targets, wanted.sigmas[0])
            if wanted.unsure:
                figures |= coverage(model.layer, rows.targets[: wanted.unsure], wanted.sigmas[0])
        log_test(wanted.test_log, Setup(task, data, rival, rival.rates, 0), figures)
        told[name] = {**figures, "trained": pretrained.trained_by(name) if isinstance(model, Shipped) else "classical"}
        wanted.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(wanted.out, told)
        print(name, written(figures), flush=True)
    return told


def written(figures: Mapping[str, float]) -> str:
    """The figures in a line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


if __name__ == "__main__":
    evaluate(tyro.cli(Wanted))

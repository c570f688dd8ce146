"""Denoisers whose weights ship with the package."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from energynet.energies.banks import CosineStart
from energynet.energies.denoiser import Denoiser
from energynet.energies.potentials import Huber
from energynet.energies.priors import AdaptivePrior, Prior, RidgePrior

WEIGHTS = Path(__file__).parent / "weights"
PRIORS: Mapping[str, Callable[[], Prior]] = {
    "ridge": lambda: RidgePrior(CosineStart(7), Huber(48, concavity=0.99)),
    "convex-ridge": lambda: RidgePrior(CosineStart(7), Huber(48)),
    "adaptive": lambda: AdaptivePrior(CosineStart(5), width=40, depth=4),
}
"""The priors of the experiment on denoising, untrained."""
DTYPES = {"F32": torch.float32, "F16": torch.float16}


def denoiser(name: str = "ridge") -> Denoiser:
    """A trained denoiser of photographs, for noise levels between about 10/255 and 55/255.

    Its prior may be used with other data terms: ``Restoration(denoiser().energy.prior, Blur())``.

    Example:
        >>> denoise = denoiser("ridge")
        >>> denoise(torch.rand(1, 1, 12, 12), sigma=25 / 255).shape             # pictures (B, C, H, W) in [0, 1]
        torch.Size([1, 1, 12, 12])

    Args:
        name: of the prior; ``available()`` lists those whose weights ship.

    Returns:
        A `Denoiser` in evaluation mode.

    Raises:
        ValueError: if no weights of this name ship.

    Source: trained by the experiment on denoising; ``trained_by(name)`` is the command.
    """
    if name not in available():
        raise ValueError(f"no weights {name!r} ship with the package; there are {', '.join(available())}.")
    prior = PRIORS[name]()
    tensors, _ = read_weights(WEIGHTS / f"{name}.safetensors")
    prior.load_state_dict({key: value.float() for key, value in tensors.items()})
    return Denoiser(prior).eval()


def available() -> list[str]:
    """The names of the denoisers whose weights ship.

    Example:
        >>> "ridge" in available()
        True
    """
    return sorted(name for name in PRIORS if (WEIGHTS / f"{name}.safetensors").is_file())


def trained_by(name: str) -> str:
    """How the weights of a denoiser were trained: the command and the time."""
    return read_weights(WEIGHTS / f"{name}.safetensors")[1].get("trained", "")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file of safetensors, which need not be installed."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata: dict[str, str] = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        part = bytearray(raw[8 + length + begin : 8 + length + end])
        tensors[name] = torch.frombuffer(part, dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata

"""The flow of a user's own frames, with weights that are trained already."""

import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from energynet.energies import Effort, FlowCorrection, FlowEstimate, OpticalFlow, flow_to_color, warp

from .data.flow_files import LabeledPair, read_flow, read_picture, write_flow
from .data.flow_pairs import gray
from .flow_models import EnergyFlow, HandEnergy, Implicit, hand_energy
from .flow_pictures import colored, comparison, save_picture
from .flow_tiles import in_tiles

Say = Callable[[str], None]
WEIGHTS = "flow.safetensors"
"""The model.safetensors of a run of the method `energy`."""
SMALLEST = 16


def trained(folder: Path | None = None) -> OpticalFlow:
    """Optical flow with the weights that the package contains, or with those of a run's folder.

    Where the package contains none, the energy is the one that was written by hand.

    Example:
        >>> trained()(torch.rand(1, 1, 32, 40), torch.rand(1, 1, 32, 40)).shape
        torch.Size([1, 2, 32, 40])

    Args:
        folder: that of one run, such as ``results/energy/seed-0``.

    Raises:
        ValueError: if the run has trained something else.
    """
    if folder is None:
        weights = resources.files("energynet.experiments").joinpath("weights", WEIGHTS)
        if not weights.is_file():
            return OpticalFlow(hand_energy()).requires_grad_(False)
        model: nn.Module = EnergyFlow(FlowCorrection(), Implicit(), Effort())
        model.load_state_dict(load(weights.read_bytes()))
    else:
        from .runs import load_model

        model, _ = load_model(folder)
    if not isinstance(model, EnergyFlow | HandEnergy):
        raise ValueError(f"{folder} holds a {type(model).__name__}; needed are the weights of an energy for optical flow.")
    return model.flow.requires_grad_(False)


def show(frames: Sequence[Path], truth: Path | None, weights: Path | None, out: Path, say: Say) -> None:
    """Compute the flow of two pictures, or of an example, and write what comes of it.

    Args:
        frames: two pictures of one size; none: scikit-image's stereo pair, whose flow is known.
        truth: the true flow of the frames.
        weights: the folder of a run; None: those of the package.
        out: the folder for ``flow.flo``, ``flow.png``, ``warped.png``, ``error.png`` and, with the true flow, ``comparison.png``.
        say: prints a line.

    Raises:
        OSError, ValueError: if a file is missing, is no picture or has another size.
    """
    pair = read_pair(frames, truth) if frames else example()
    say(f"{pair.name}: {pair.first.shape[1]} × {pair.first.shape[2]} pixels, {len(pair.first)} channel(s)")
    began = time.perf_counter()
    estimate = in_tiles(trained(weights), gray(pair.first), gray(pair.second), say)
    flow, length = estimate.flow[0], torch.linalg.vector_norm(estimate.flow[0], dim=0)
    hidden = 1 - float(estimate.visible.float().mean())
    say(f"{time.perf_counter() - began:.1f} s; motion {float(length.mean()):.2f} pixels on average, {float(length.max()):.1f} at "
        f"most; {100 * hidden:.1f} % of the pixels are hidden in the second frame or outside of it")  # fmt: skip
    for line in write_results(pair, estimate, out):
        say(line)
    if bool(pair.valid.any()):
        error = torch.linalg.vector_norm(flow - pair.flow, dim=0)[pair.valid]
        still = torch.linalg.vector_norm(pair.flow, dim=0)[pair.valid]
        far = 100 * float((error > 3).float().mean())
        say(
            f"end-point error {float(error.mean()):.3f} pixels over {error.numel()} pixels with known flow "
            f"(no motion at all: {float(still.mean()):.3f}); {far:.1f} % are off by more than 3"
        )


def read_pair(frames: Sequence[Path], truth: Path | None) -> LabeledPair:
    """Two pictures, and their true flow where it is given; otherwise it is known nowhere."""
    if len(frames) != 2:
        raise ValueError(f"--frames needs two pictures, got {len(frames)}: {', '.join(map(str, frames)) or 'none'}.")
    first, second = (read_picture(path) for path in frames)
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"the frames differ in size: {frames[0]} has {_size(first)} pixels, {frames[1]} {_size(second)}. "
            "Crop or resize one of them; optical flow compares two views of one scene through one camera."
        )
    if min(first.shape[1:]) < SMALLEST:
        raise ValueError(f"{frames[0]} has {_size(first)} pixels; needed are at least {SMALLEST} × {SMALLEST}.")
    if truth is None:
        flow, valid = torch.zeros(2, *first.shape[1:]), torch.zeros(first.shape[1:], dtype=torch.bool)
    else:
        flow, valid = read_flow(truth)
        if flow.shape[1:] != first.shape[1:]:
            raise ValueError(f"the true flow {truth} has {_size(flow)} pixels, the frames have {_size(first)}.")
    return LabeledPair(f"{frames[0].name} → {frames[1].name}", first, second, flow, valid)


def example() -> LabeledPair:
    """Scikit-image's stereo pair of a motorcycle at half its size: the disparity is a flow to the left."""
    import numpy as np
    from skimage import data

    from energynet.energies.flow_fields import resize_flow

    left, right, disparity = data.stereo_motorcycle()
    frames = [torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0) / 255 for image in (left, right)]
    shift = torch.from_numpy(disparity.astype(np.float32))
    valid = torch.isfinite(shift)
    size = (left.shape[0] // 2, left.shape[1] // 2)
    first, second = (
        torch.nn.functional.interpolate(f[None], size=size, mode="bilinear", antialias=True)[0] for f in frames
    )
    flow = torch.stack([-torch.where(valid, shift, 0), torch.zeros_like(shift)])[None]
    # Where the disparity of one of the four pixels is not known, that of their mean is not.
    share = resize_flow(valid.float().expand(1, 2, *valid.shape), size)[0, 0] * (valid.shape[1] / size[1])
    return LabeledPair("scikit-image's stereo pair", first, second, resize_flow(flow, size)[0], share > 0.999)


def write_results(pair: LabeledPair, estimate: FlowEstimate, out: Path) -> list[str]:
    """Write the flow and its pictures; lines that say what stands where."""
    flow = estimate.flow[0]
    out.mkdir(parents=True, exist_ok=True)
    write_flow(out / "flow.flo", flow)
    save_picture(out / "flow.png", flow_to_color(estimate.flow)[0])
    warped = warp(pair.second[None], estimate.flow)[0].clamp(0, 1)
    save_picture(out / "warped.png", warped)
    error = (warped - pair.first).abs().mean(0, keepdim=True) if len(warped) == len(pair.first) else torch.zeros_like(flow[:1])
    save_picture(out / "error.png", colored((4 * error).clamp(0, 1)))
    lines = [
        f"{out / 'flow.flo'}: the flow",
        f"{out / 'flow.png'}: the flow in colors; the hue is the direction, white is no motion",
        f"{out / 'warped.png'}: the second frame, moved back onto the first",
        f"{out / 'error.png'}: how far that differs from the first frame, four times as bright; "
        f"{255 * float(error[estimate.visible[0]].mean()):.1f} of 255 on average where it is visible",
    ]
    if bool(pair.valid.any()):
        save_picture(out / "comparison.png", comparison(pair, flow))
        lines.append(f"{out / 'comparison.png'}: first frame and true flow; below, this flow and its error")
    return lines


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]} × {image.shape[-1]}"

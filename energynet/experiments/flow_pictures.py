"""Pictures of optical flow, and writing them."""

from pathlib import Path

import torch
from torch import Tensor

from energynet.energies import flow_to_color

from .data.flow_files import LabeledPair


def save_picture(path: Path, image: Tensor) -> None:  # (C, H, W)
    """Write a picture of range 1 in 8 bits; the ending of the name says how."""
    import cv2

    values = (255 * image.detach().cpu().clamp(0, 1)).round().byte()
    array = values.movedim(0, -1).flip(-1) if len(values) == 3 else values[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, array.contiguous().numpy())[1].tobytes())


def comparison(pair: LabeledPair, *flows: Tensor) -> Tensor:  # (2, H, W) each -> (3, h, w)
    """The first frame and the true flow; below, each flow and its error, black for 3 pixels and more."""
    largest = float(torch.linalg.vector_norm(pair.flow, dim=0).max()) or 1.0
    rows = [torch.cat([colored(pair.first), known(flow_to_color(pair.flow[None], largest)[0], pair.valid)], -1)]
    for flow in flows:
        error = torch.linalg.vector_norm(flow - pair.flow, dim=0)[None]
        rows.append(torch.cat([flow_to_color(flow[None], largest)[0], colored(known(1 - error / 3, pair.valid))], -1))
    return torch.cat(rows, -2)


def known(image: Tensor, valid: Tensor) -> Tensor:  # (C, H, W), (H, W)
    """Gray where nothing is known."""
    return torch.where(valid, image, 0.5)


def colored(image: Tensor) -> Tensor:  # (1 or 3, H, W) -> (3, H, W)
    """With three channels."""
    return image.expand(3, -1, -1)

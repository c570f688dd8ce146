"""Files of optical flow: pictures, Middlebury's .flo, KITTI's PNG, and the folders of the usual data sets."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = 202021.25
"""The first number of a .flo file."""
UNKNOWN = 1e9
"""A .flo file marks pixels whose flow is not known by values above it."""


@dataclass(frozen=True)
class LabeledPair:
    """Two frames of range 1, the flow between them, and where it is known."""

    name: str
    first: Tensor  # (C, H, W)
    second: Tensor  # (C, H, W)
    flow: Tensor  # (2, H, W)
    valid: Tensor  # (H, W) bool


class PairSource(ABC):
    """A pair that is not read yet. Subclasses are final."""

    @abstractmethod
    def load(self) -> LabeledPair:
        """Read it.

        Raises:
            ValueError: if a file is damaged or sizes differ.
        """


@dataclass(frozen=True)
class PairFiles(PairSource):
    """A pair in three files."""

    name: str
    first: Path
    second: Path
    flow: Path

    def load(self) -> LabeledPair:
        flow, valid = read_flow(self.flow)
        frames = read_picture(self.first), read_picture(self.second)
        for path, frame in zip((self.first, self.second), frames):
            if frame.shape != (len(frames[0]), *valid.shape):
                raise ValueError(f"{path} has shape {tuple(frame.shape)}, its flow {self.flow} {tuple(flow.shape)}.")
        return LabeledPair(self.name, *frames, flow, valid)


@dataclass(frozen=True)
class ArchivedPair(PairSource):
    """A pair of an .npz file with ``frame0``, ``frame1``, ``flow`` and sometimes ``valid``, one pair or several."""

    path: Path
    number: int | None

    def load(self) -> LabeledPair:
        with np.load(self.path) as arrays:
            one = {key: arrays[key] if self.number is None else arrays[key][self.number] for key in arrays.files}
        flow = torch.from_numpy(one["flow"]).movedim(-1, 0).float()
        valid = torch.from_numpy(one["valid"]) if "valid" in one else torch.ones(flow.shape[1:], dtype=torch.bool)
        name = self.path.stem if self.number is None else f"{self.path.stem}-{self.number}"
        return LabeledPair(name, _image(one["frame0"]), _image(one["frame1"]), flow, valid)


def find_pairs(folder: Path) -> list[PairSource]:
    """The pairs with known flow in a folder.

    These layouts are understood: FlyingChairs (``00001_img1.ppm``, ``00001_img2.ppm``, ``00001_flow.flo``), Sintel
    (``clean/SCENE/frame_0001.png`` and ``flow/SCENE/frame_0001.flo``; the final pass in ``final``), KITTI (``000000_10.png``
    and ``000000_11.png`` in ``image_2``, ``colored_0`` or ``image_0``; ``flow_occ``), Middlebury
    (``other-data/SCENE/frame10.png``, ``other-gt-flow/SCENE/flow10.flo``) and .npz files.

    Args:
        folder: one that holds these files or folders.

    Returns:
        The pairs in the order of their names.

    Raises:
        FileNotFoundError: if there is no folder, or no pair in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one with pairs of FlyingChairs, Sintel, KITTI, Middlebury or .npz.")
    found = [*_chairs(folder), *_sintel(folder), *_kitti(folder), *_middlebury(folder), *_archives(folder)]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no pair with known flow. Looked for NAME_img1.ppm and NAME_flow.flo (FlyingChairs), "
            "flow/SCENE/*.flo (Sintel), flow_occ/*_10.png (KITTI), other-gt-flow/SCENE/flow10.flo (Middlebury) and *.npz."
        )
    return found


def _chairs(folder: Path) -> list[PairSource]:
    flows = sorted(folder.glob("*_flow.flo"))
    stems = [(flow, flow.name.removesuffix("_flow.flo")) for flow in flows]
    return [PairFiles(stem, _beside(flow, f"{stem}_img1"), _beside(flow, f"{stem}_img2"), flow) for flow, stem in stems]


def _sintel(folder: Path) -> list[PairSource]:
    pairs: list[PairSource] = []
    for flow in sorted(folder.glob("flow/*/*.flo")):
        number = int(re.findall(r"\d+", flow.stem)[-1])
        for kind in ("clean", "final"):
            scene = folder / kind / flow.parent.name
            frames = [scene / f"frame_{k:04d}.png" for k in (number, number + 1)]
            if all(frame.is_file() for frame in frames):
                pairs.append(PairFiles(f"{kind}/{flow.parent.name}/{number:04d}", frames[0], frames[1], flow))
    return pairs


def _kitti(folder: Path) -> list[PairSource]:
    pairs: list[PairSource] = []
    for flow in sorted(folder.glob("flow_occ/*_10.png")):
        for images in ("image_2", "colored_0", "image_0"):
            frames = [folder / images / flow.name, folder / images / flow.name.replace("_10", "_11")]
            if all(frame.is_file() for frame in frames):
                pairs.append(PairFiles(flow.stem, frames[0], frames[1], flow))
                break
    return pairs


def _middlebury(folder: Path) -> list[PairSource]:
    pairs: list[PairSource] = []
    for flow in sorted(folder.glob("other-gt-flow/*/flow10.flo")):
        frames = [folder / "other-data" / flow.parent.name / f"frame{k}.png" for k in (10, 11)]
        if all(frame.is_file() for frame in frames):
            pairs.append(PairFiles(flow.parent.name, frames[0], frames[1], flow))
    return pairs


def _archives(folder: Path) -> list[PairSource]:
    pairs: list[PairSource] = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            if not {"frame0", "frame1", "flow"} <= set(arrays.files):
                continue
            several = arrays["flow"].ndim == 4
            numbers: Sequence[int | None] = range(len(arrays["flow"])) if several else (None,)
        pairs += [ArchivedPair(path, number) for number in numbers]
    return pairs


def _beside(flow: Path, stem: str) -> Path:
    found = sorted(flow.parent.glob(stem + ".*"))
    return found[0] if found else flow.parent / (stem + ".ppm")


def read_picture(path: Path) -> Tensor:  # -> (C, H, W)
    """A picture with C = 1 or 3 channels, of range 1; 8 or 16 bits, transparency is dropped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture.
    """
    import cv2

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    data = np.frombuffer(path.read_bytes(), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if len(data) else None
    if image is None:
        raise ValueError(f"{path} ({len(data)} bytes) is no picture that OpenCV reads: PNG, JPEG, TIFF, PPM, WebP, BMP.")
    if image.ndim == 3:
        image = image[..., 2::-1] if image.shape[-1] >= 3 else image[..., 0]
    return _image(np.ascontiguousarray(image))


def _image(values: Any) -> Tensor:  # (H, W) or (H, W, 3) -> (C, H, W)
    """Integers scaled by their largest value."""
    top = np.iinfo(values.dtype).max if np.issubdtype(values.dtype, np.integer) else 1
    scaled = torch.from_numpy(values.astype(np.float32) / np.float32(top))
    return scaled.movedim(-1, 0) if scaled.ndim == 3 else scaled[None]


def read_flow(path: Path) -> tuple[Tensor, Tensor]:  # -> (2, H, W), (H, W) bool
    """A flow and where it is known, from Middlebury's .flo or KITTI's PNG.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if path.suffix.lower() == ".flo":
        return _read_flo(path)
    if path.suffix.lower() == ".png":
        return _read_kitti(path)
    raise ValueError(f"{path}: a flow is read from a .flo file or a 16-bit PNG of KITTI, not from {path.suffix or 'this'}.")


def write_flow(path: Path, flow: Tensor, valid: Tensor | None = None) -> None:  # (2, H, W), (H, W) bool
    """Write a flow as Middlebury's .flo, or as KITTI's PNG, which rounds to 1/64 pixel.

    Raises:
        ValueError: if the name ends otherwise, the shape is not ``(2, H, W)``, or PNG cannot hold the values, 512 and more.
    """
    if flow.ndim != 3 or len(flow) != 2:
        raise ValueError(f"a flow file holds one flow (2, H, W), got {tuple(flow.shape)}.")
    valid = torch.ones(flow.shape[1:], dtype=torch.bool) if valid is None else valid.cpu()
    flow = flow.detach().cpu().float()
    if path.suffix.lower() == ".flo":
        _write_flo(path, torch.where(valid, flow, 1e10))
    elif path.suffix.lower() == ".png":
        _write_kitti(path, flow, valid)
    else:
        raise ValueError(f"{path}: a flow is written to a .flo file or a .png of KITTI.")


def _read_flo(path: Path) -> tuple[Tensor, Tensor]:
    data = path.read_bytes()
    magic = np.frombuffer(data[:4], "<f4")
    if len(data) < 12 or magic[0] != np.float32(MAGIC):
        raise ValueError(f"{path} is no .flo file: it does not begin with {MAGIC} and two sizes.")
    width, height = (int(side) for side in np.frombuffer(data[4:12], "<i4"))
    if min(width, height) < 1 or len(data) != 12 + 8 * width * height:
        raise ValueError(f"{path} says {height} × {width} pixels, {12 + 8 * width * height} bytes, and has {len(data)}.")
    flow = torch.from_numpy(np.frombuffer(data[12:], "<f4").astype(np.float32).reshape(height, width, 2)).movedim(-1, 0)
    valid = (flow.abs() < UNKNOWN).all(0) & torch.isfinite(flow).all(0)
    return torch.where(valid, flow, 0).contiguous(), valid


def _write_flo(path: Path, flow: Tensor) -> None:
    sides, values = np.array([flow.shape[2], flow.shape[1]], "<i4"), flow.movedim(0, -1).numpy().astype("<f4")
    path.write_bytes(np.array([MAGIC], "<f4").tobytes() + sides.tobytes() + values.tobytes())


def _read_kitti(path: Path) -> tuple[Tensor, Tensor]:
    import cv2

    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.shape[2:] != (3,):
        raise ValueError(f"{path} is no flow of KITTI, a PNG with three channels of 16 bits.")
    values = torch.from_numpy(image.astype(np.float32))
    valid = values[..., 0] > 0  # OpenCV reverses the channels: valid, v, u
    return torch.where(valid, (values[..., [2, 1]].movedim(-1, 0) - 2**15) / 64, 0), valid


def _write_kitti(path: Path, flow: Tensor, valid: Tensor) -> None:
    import cv2

    scaled = (64 * flow + 2**15).round()
    if bool(((scaled < 0) | (scaled >= 2**16)).any(0)[valid].any()):
        raise ValueError(f"{path}: KITTI's PNG holds flows below 512 pixels, got {float(flow.abs()[:, valid].amax()):.0f}.")
    image = torch.stack([valid.float(), torch.where(valid, scaled[1], 0), torch.where(valid, scaled[0], 0)], -1)
    path.write_bytes(cv2.imencode(".png", image.numpy().astype(np.uint16))[1].tobytes())

"""Pictures in files: PNG, JPEG and TIFF, gray or in color, of 8 or 16 bits, with or without alpha."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np


class PictureError(ValueError):
    """A file is no picture that can be used; the message says why."""


@dataclass(frozen=True)
class Picture:
    """A picture with values in [0, 1], and what is needed to write it as it was."""

    values: np.ndarray  # (C, H, W) float32, C 1 or 3, in OpenCV's order
    alpha: np.ndarray | None  # (H, W), as in the file
    depth: np.dtype[Any]

    @classmethod
    def read(cls, path: Path) -> "Picture":
        """Read a file.

        Raises:
            PictureError: if it is missing, empty, no picture, or of another kind.
        """
        if not path.is_file():
            raise PictureError(f"{path} is not a file.")
        if not path.stat().st_size:
            raise PictureError(f"{path} is empty.")
        raw: Any = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if raw is None:
            raise PictureError(f"{path} is no picture that can be read; PNG, JPEG and TIFF can.")
        known = raw.dtype.name in ("uint8", "uint16") and (raw.ndim == 2 or (raw.ndim == 3 and raw.shape[2] in (1, 3, 4)))
        if not known:
            shape = " × ".join(map(str, raw.shape))
            raise PictureError(f"{path} holds {shape} values of {raw.dtype}; gray or color of 8 or 16 bits can be read.")
        planes = raw[..., None] if raw.ndim == 2 else raw
        alpha = planes[..., 3] if planes.shape[2] == 4 else None
        values = planes[..., :3].transpose(2, 0, 1).astype(np.float32) / np.iinfo(raw.dtype).max
        return cls(values, alpha, raw.dtype)

    def write(self, path: Path, values: np.ndarray) -> None:
        """Write other values of the same shape, with this picture's alpha and depth."""
        most = np.iinfo(self.depth).max
        planes = np.rint(np.clip(values, 0, 1) * most).astype(self.depth).transpose(1, 2, 0)
        if self.alpha is not None:
            planes = np.concatenate([planes, self.alpha[..., None]], 2)
        done, code = cv2.imencode(path.suffix or ".png", planes)
        if not done:
            raise PictureError(f"{path} cannot be written in this format; end its name with .png.")
        path.parent.mkdir(parents=True, exist_ok=True)
        code.tofile(path)

    @property
    def gray(self) -> np.ndarray:  # (H, W)
        """The mean over colors."""
        mean: np.ndarray = self.values.mean(0)
        return mean


def estimated_noise(values: np.ndarray) -> float:  # (C, H, W)
    """The standard deviation of the noise: the median response of a filter that sees neither slopes nor edges along an axis.

    It is too high where a picture is all texture.

    Raises:
        PictureError: for pictures below 8 × 8, whose noise cannot be told.

    Source: Immerkær (1996), Fast noise variance estimation; Donoho and Johnstone (1994), for the median.
    """
    if min(values.shape[1:]) < 8:
        raise PictureError(f"the noise of a picture of {values.shape[1]} × {values.shape[2]} cannot be estimated; give --sigma.")
    second = np.array([1.0, -2.0, 1.0], np.float32) / 6**0.5
    kernel = second[:, None] * second
    found = [np.median(np.abs(cv2.filter2D(plane, -1, kernel)[1:-1, 1:-1])) / 0.6745 for plane in values]
    return float(np.mean(found))


def read_kernel(path: Path) -> np.ndarray:  # (h, w), odd sides, sum 1
    """A blur kernel from a picture; sides are made odd by zeros.

    Raises:
        PictureError: if it is black.
    """
    kernel = Picture.read(path).gray
    if kernel.sum() <= 0:
        raise PictureError(f"{path} is black: a kernel must have weight.")
    kernel = np.pad(kernel, [(0, 1 - side % 2) for side in kernel.shape])
    return kernel / kernel.sum()


def read_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:  # (H, W) of 0 and 1
    """Which pixels are known: those where the picture is bright.

    Raises:
        PictureError: if it has another size, or nothing is known.
    """
    mask = (Picture.read(path).gray > 0.5).astype(np.float32)
    if mask.shape != tuple(shape):
        raise PictureError(f"{path} has {mask.shape[0]} × {mask.shape[1]} pixels, the picture {shape[0]} × {shape[1]}.")
    if not mask.any():
        raise PictureError(f"{path} is black: no pixel is known.")
    return mask

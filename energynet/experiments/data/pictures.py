"""Gray pictures: a folder that the user names, or scikit-image's own."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import Data, Rows


def embedded() -> Data:
    """Pictures that come with scikit-image, at half size, in tiles; *camera* is the test picture."""
    from skimage import data, transform

    sources = (data.coins, data.moon, data.page, data.astronaut, data.chelsea, data.coffee, data.rocket)
    small = [transform.rescale(_gray(source()), 0.5, anti_aliasing=True) for source in sources]  # type: ignore[no-untyped-call]
    tiles = [tile for picture in small for tile in _tiles(picture, 96)]
    camera = transform.rescale(_gray(data.camera()), 0.5, anti_aliasing=True)
    return _as_data("scikit-image", np.stack(tiles), camera[None])


def load(folder: Path) -> Data:
    """Train400 and BSD68: ``train400/train400.npz`` and ``bsd68/bsd68.npz``.

    Args:
        folder: the folder above both.

    Returns:
        Clean pictures in [0, 1], ``(N, 1, H, W)``, as inputs and as targets.

    Raises:
        FileNotFoundError: when one is missing.
    """
    archives = folder / "train400" / "train400.npz", folder / "bsd68" / "bsd68.npz"
    missing = [str(path) for path in archives if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no {' and no '.join(missing)}; give the folder that holds train400/ and bsd68/.")
    train, test = (np.load(path)["images"].astype(np.float32) / 255 for path in archives)
    return _as_data("bsd68", train, test)


def _as_data(name: str, train: np.ndarray, test: np.ndarray) -> Data:
    clean, held = _tensor(train), _tensor(test)
    return Data(name, Rows(clean, clean), Rows(held, held))


def _tensor(pictures: np.ndarray) -> Tensor:  # (N, H, W) -> (N, 1, H, W)
    return torch.from_numpy(pictures.astype(np.float32))[:, None]


def _gray(picture: np.ndarray) -> np.ndarray:
    from skimage.color import rgb2gray

    return rgb2gray(picture) if picture.ndim == 3 else picture / 255


def _tiles(picture: np.ndarray, side: int) -> list[np.ndarray]:
    rows, columns = (size // side for size in picture.shape)
    return [picture[i * side : (i + 1) * side, j * side : (j + 1) * side] for i in range(rows) for j in range(columns)]

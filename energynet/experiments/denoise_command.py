"""``energynet run denoise``: denoise, deblur or inpaint a picture with the weights that ship."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from torch import Tensor

from energynet import Termination, minimize
from energynet.diagnostics import laplace
from energynet.energies import Blur, Denoiser, Identity, Mask, Operator, Restoration, denoiser
from energynet.energies.denoiser import cropped, padded

from .fits import convergence_warnings
from .picture_files import Picture, PictureError, estimated_noise, read_kernel, read_mask

OVERLAP = 32
Window = tuple[slice, slice]
UNSURE = 128
"""Side of the part whose uncertainty is shown."""
LOOSE = Termination(atol=0.0, rtol=1e-3, max_steps=500)


@dataclass(frozen=True)
class Denoise:
    """Denoise a picture; without --image, one that comes with scikit-image, to which noise is added."""

    image: Path | None = None
    """PNG, JPEG or TIFF; gray, or color, which is treated channel by channel; alpha is kept."""
    sigma: float | None = None
    """Standard deviation of the noise, of 255; none: it is estimated."""
    kernel: Path | None = None
    """A picture of the blur: deblur as well."""
    mask: Path | None = None
    """A picture that is black where pixels are missing: fill them in."""
    method: str = "ridge"
    """Whose weights are used."""
    out: Path = Path("denoised")
    """Folder of the result and of the figure."""
    tile: int = 512
    """Side of the tiles in which a large picture is treated, which bounds the memory."""
    threads: int = 0
    """CPU threads; 0: as PyTorch chooses."""


@dataclass(frozen=True)
class Problem:
    """What is to be restored, of one picture: an operator and what it depends on, cut as tiles are."""

    operator: Operator
    kernel: Tensor | None = None  # (h, w)
    mask: Tensor | None = None  # (1, 1, H, W)

    def known(self, window: Window, margin: int) -> tuple[Tensor, ...]:
        """What the operator takes in a window, with a margin."""
        if self.mask is not None:
            return (padded(self.mask[..., window[0], window[1]], margin),)
        return () if self.kernel is None else (self.kernel,)

    @property
    def reach(self) -> int:
        """How far beyond a tile the restored picture is wanted: further than what acts on it."""
        return OVERLAP + (0 if self.kernel is None else max(self.kernel.shape))


def denoise(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        PictureError: if a file cannot be used; the message says why.
    """
    wanted = tyro.cli(Denoise, args=list(arguments), prog="energynet run denoise")
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    if wanted.kernel and wanted.mask:
        raise PictureError("--kernel and --mask cannot be used together yet; give one of them.")
    if wanted.sigma is not None and not 0 < wanted.sigma < 255:
        raise PictureError(f"--sigma must lie between 0 and 255, got {wanted.sigma:g}.")
    console, began = Console(), time.perf_counter()
    picture, clean = (Picture.read(wanted.image), None) if wanted.image else embedded_picture(wanted.sigma or 25.0)
    sigma = wanted.sigma or (25.0 if clean is not None else 255 * max(estimated_noise(picture.values), 0.2 / 255))
    layer = denoiser(wanted.method)
    values, unsure = restore_picture(layer, picture, sigma / 255, problem_of(wanted, picture), wanted.tile, console)
    name = wanted.image.name if wanted.image else "camera.png"
    picture.write(wanted.out / name, values)
    draw(wanted.out / "figure.png", picture.values, values, unsure, clean)
    told = "" if clean is None else f"PSNR {psnr(picture.values, clean):.2f} dB before, {psnr(values, clean):.2f} dB after. "
    console.print(f"{told}Noise {sigma:.1f} of 255{'' if wanted.sigma or clean is not None else ' (estimated)'}, "
                  f"{time.perf_counter() - began:.1f} s. {wanted.out / name}, {wanted.out / 'figure.png'}",
                  soft_wrap=True, highlight=False)  # fmt: skip


def embedded_picture(sigma: float) -> tuple[Picture, np.ndarray]:
    """scikit-image's *camera* at half size, with noise, and clean."""
    from skimage import data, transform

    clean = transform.rescale(data.camera() / 255, 0.5, anti_aliasing=True).astype(np.float32)[None]
    noise = np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)
    return Picture(clean + np.float32(sigma / 255) * noise, None, np.dtype(np.uint8)), clean


def problem_of(wanted: Denoise, picture: Picture) -> Problem:
    """The operator that the options name."""
    if wanted.kernel:
        return Problem(Blur(), kernel=torch.from_numpy(read_kernel(wanted.kernel)))
    if wanted.mask:
        return Problem(Mask(), mask=torch.from_numpy(read_mask(wanted.mask, picture.values.shape[1:]))[None, None])
    return Problem(Identity())


@torch.no_grad()
def restore_picture(layer: Denoiser, picture: Picture, sigma: float, problem: Problem, tile: int, console: Console
                    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The restored values, and standard deviations of the first channel in the middle."""
    y = torch.from_numpy(picture.values)[:, None]  # (C, 1, H, W)
    height, width = y.shape[-2:]
    energy, margin = Restoration(layer.energy.prior, problem.operator), layer.margin

    def solve(part: Tensor, window: Window) -> tuple[Tensor, tuple[Any, ...]]:
        context = padded(part[..., window[0], window[1]], margin), sigma, *problem.known(window, margin)
        solution = minimize(energy, None, *context, solver=layer.solver, termination=LOOSE, on_failure="warn")
        return solution.value, context

    result = torch.empty_like(y)
    windows = list(tiles(height, width, tile, problem.reach))
    with convergence_warnings() as failures:
        for wide, inner, narrow in track(windows, "tiles", console=console, transient=True, disable=len(windows) == 1):
            result[..., inner[0], inner[1]] = cropped(solve(y, wide)[0], margin)[..., narrow[0], narrow[1]]
        middle = tuple(slice((size - min(size, UNSURE)) // 2, (size + min(size, UNSURE)) // 2) for size in y.shape[-2:])
        value, context = solve(y[:1], (middle[0], middle[1]))
        unsure = cropped(laplace(energy, value, *context, noise=sigma), margin)[0, 0]
    if failures:
        console.print("Some tiles did not converge to a relative error of 0.001; their best point is used.")
    return result[:, 0].numpy(), unsure.numpy()


def tiles(height: int, width: int, side: int, reach: int) -> Iterator[tuple[Window, Window, Window]]:
    """Windows that cover a picture: with what is around, without, and the latter within the former.

    Example:
        >>> [(wide[1], inner[1]) for wide, inner, _ in tiles(3, 10, 5, 2)]
        [(slice(0, 7, None), slice(0, 5, None)), (slice(3, 10, None), slice(5, 10, None))]
    """
    for top in range(0, height, side):
        for left in range(0, width, side):
            parts = [_along(start, side, reach, size) for start, size in ((top, height), (left, width))]
            (a, b, c), (d, e, f) = parts
            yield (a, d), (b, e), (c, f)


def _along(start: int, side: int, reach: int, size: int) -> tuple[slice, slice, slice]:
    stop = min(start + side, size)
    low, high = max(start - reach, 0), min(stop + reach, size)
    return slice(low, high), slice(start, stop), slice(start - low, stop - low)


def psnr(values: np.ndarray, clean: np.ndarray) -> float:
    """Of values clipped to [0, 1]."""
    return float(-10 * np.log10(np.square(np.clip(values, 0, 1) - clean).mean()))


def draw(path: Path, before: np.ndarray, after: np.ndarray, unsure: np.ndarray, clean: np.ndarray | None) -> None:
    """Before and after, the middle of both, and there the standard deviations, beside the true error where it is known."""
    from matplotlib.figure import Figure

    middle = tuple(slice((size - part) // 2, (size - part) // 2 + part) for size, part in zip(before.shape[1:], unsure.shape))
    columns = 4 if clean is not None else 3
    figure = Figure(figsize=(3.6 * columns, 7.0), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    shown = [("noisy" if clean is not None else "before", before), ("restored", after)]
    if clean is not None:
        shown.append(("clean", clean))
    for column, (title, values) in enumerate(shown):
        for axis, part in ((axes[0, column], values), (axes[1, column], values[:, middle[0], middle[1]])):
            _show(axis, part)
        ending = f", {psnr(values, clean):.2f} dB" if clean is not None and values is not clean else ""
        axes[0, column].set_title(f"{title}{ending}")
        axes[1, column].set_title("its middle")
    maps = [("standard deviation (Laplace)", unsure)]
    if clean is not None:
        maps.append(("true error", np.abs(after - clean)[0, middle[0], middle[1]]))
    most = float(np.nanquantile(unsure, 0.995)) * (1.0 if clean is None else 1.5)
    for row, (title, values) in enumerate(maps):
        drawn = axes[row, columns - 1].imshow(255 * values, cmap="viridis", vmin=0, vmax=255 * most)
        axes[row, columns - 1].set_title(title)
        figure.colorbar(drawn, ax=axes[row, columns - 1], label="of 255", shrink=0.8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(bool(axis.images))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _show(axis: Any, values: np.ndarray) -> None:
    planes = np.clip(values, 0, 1)
    picture = planes[0] if len(planes) == 1 else planes[::-1].transpose(1, 2, 0)  # OpenCV has blue first
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1)

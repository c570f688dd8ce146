"""Filter banks for image energies, written so that their gradient is cheap on a CPU.

The gradient of ``conv2d`` with respect to its input is a transposed convolution, which costs several times the convolution
itself. Here the windows of the image are laid out by shifting it, first down and then across, and one matrix product applies
all filters; its gradient is a matrix product and the same shifts in reverse. These are ordinary operations: they can be
differentiated to any order, mapped by ``torch.func`` and compiled. ``python -m tests.benchmarks.filters`` compares the
implementations.
"""

import enum
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class Boundary(enum.Enum):
    """What a filter sees beyond the border of an image; the value is PyTorch's name for it.

    ``INSIDE`` uses only windows that lie inside the image. ``ZERO`` is black all around. ``REFLECT`` mirrors at the center
    of the outermost pixels, and ``REPLICATE`` repeats these pixels. With ``PERIODIC`` opposite borders meet.

    Example:
        >>> Boundary.REFLECT.repeats(2)
        4
    """

    INSIDE = "valid"
    ZERO = "constant"
    PERIODIC = "circular"
    REFLECT = "reflect"
    REPLICATE = "replicate"

    def repeats(self, margin: int) -> int:
        """How often a filter may see a pixel: ‖padded image‖² is at most this many times ‖image‖² (if the image is not
        smaller than the margin).
        """
        along_one_side = {Boundary.REFLECT: 2, Boundary.REPLICATE: margin + 1}.get(self, 1)
        return along_one_side**2


def filter_bank(x: Tensor, weight: Tensor, boundary: Boundary = Boundary.INSIDE) -> Tensor:
    """The response of every filter at every pixel: the cross-correlation that ``conv2d`` computes.

    Example:
        >>> x, weight = torch.ones(2, 1, 8, 9), torch.ones(4, 1, 3, 3)
        >>> filter_bank(x, weight).shape, filter_bank(x, weight, Boundary.REFLECT).shape
        (torch.Size([2, 4, 6, 7]), torch.Size([2, 4, 8, 9]))

    Args:
        x: images ``(B, C, H, W)``.
        weight: filters ``(F, C, k, k)``, k odd except with ``Boundary.INSIDE``; or those of each sample, ``(B, F, C, k, k)``.
        boundary: what a filter sees beyond the border.

    Returns:
        ``(B, F, H, W)``; with ``Boundary.INSIDE`` ``(B, F, H − k + 1, W − k + 1)``.

    Raises:
        ValueError: if channels do not match, or the image is smaller than a filter needs.
    """
    size = weight.shape[-1]
    _check(x, weight, boundary)
    if boundary is not Boundary.INSIDE:
        x = pad(x, (size // 2,) * 4, mode=boundary.value)
    rows = x.shape[-2] - size + 1
    columns = x.shape[-1] - size + 1
    # In two rounds 2 k slices do, where at once it takes k².
    down = torch.cat([x[..., i : i + rows, :] for i in range(size)], 1)  # (B, k C, rows, W)
    windows = torch.cat([down[..., j : j + columns] for j in range(size)], 1)  # (B, k k C, rows, columns)
    matrix = weight.transpose(-1, -3).flatten(-3)  # (F, k k C) or (B, F, k k C), in the order of the windows
    return (matrix @ windows.flatten(2)).unflatten(2, (rows, columns))


def largest_response(weight: Tensor) -> Tensor:  # (F, C, k, k) -> 0-d
    r"""A bound on ‖filter responses‖² / ‖image‖², for images of any size with zeros around.

    It is the largest :math:`\sum_f |\hat w_f(\omega)|^2` over frequencies (for several channels, the largest singular value
    squared). The frequencies are sampled at 12 k points per side. Between N samples, a trigonometric polynomial of degree d
    exceeds its largest sample by a factor of at most 1/cos(πd/N) in each of the two dimensions; the bound includes this
    factor.

    Example:
        >>> difference = torch.tensor([[[[0.0, 0.0, 0.0], [0.0, -1.0, 1.0], [0.0, 0.0, 0.0]]]])
        >>> largest_response(difference).round(decimals=1)                  # 4, and more for what may lie between
        tensor(4.1000)

    Source: Ehlich and Zeller (1964), Schwankung von Polynomen zwischen Gitterpunkten.
    """
    size, points = weight.shape[-1], 12 * weight.shape[-1]
    spectrum = torch.fft.rfft2(weight.float() if weight.dtype.itemsize < 4 else weight, (points, points))  # (F, C, N, N/2 + 1)
    gram = torch.einsum("fcuv,fduv->uvcd", spectrum.conj(), spectrum)
    # tr(G⁴)^(1/4) is the largest eigenvalue of G, or up to C^(1/4) more, and differentiable.
    squared = gram @ gram
    trace = (squared.real.square() + squared.imag.square()).sum((-2, -1))
    between = math.cos(math.pi * (size - 1) / points) ** 2
    return (trace.amax().pow(1 / 4) / between).to(weight.dtype)


def cosine_filters(size: int, channels: int = 1) -> Tensor:  # -> ((size² − 1) channels, channels, size, size)
    """The patterns of the discrete cosine transform without the constant one, for each channel: slow waves come first.

    Example:
        >>> filters = cosine_filters(3)
        >>> filters.shape, float(filters.flatten(1).norm(dim=1).round(decimals=4).unique())
        (torch.Size([8, 1, 3, 3]), 1.0)
    """
    places = (torch.arange(size) + 0.5) * (math.pi / size)
    waves = torch.cos(torch.arange(size)[:, None] * places)
    waves = waves / waves.norm(dim=1, keepdim=True)
    patterns = torch.einsum("ai,bj->abij", waves, waves).flatten(0, 1)  # (k², k, k)
    speed = torch.arange(size).square()
    order = (speed[:, None] + speed).flatten().argsort(stable=True)[1:]
    return torch.einsum("pij,cd->pcdij", patterns[order], torch.eye(channels)).flatten(0, 1)


class BoundedFilters(nn.Module):
    """A parametrization of a filter bank: zero mean in every channel, and ‖responses‖ ≤ ‖image‖ with the boundary given.

    Filters that are assigned are taken with zero mean, and scaled together until the bound is met.

    Example:
        >>> weight = BoundedFilters(Boundary.ZERO)(torch.randn(8, 1, 5, 5))
        >>> x = torch.randn(2, 1, 16, 16)
        >>> bool(filter_bank(x, weight, Boundary.ZERO).norm() <= x.norm()), float(weight.sum().abs()) < 1e-5
        (True, True)

    Args:
        boundary: what a filter sees beyond the border.

    Raises:
        ValueError: by a call, if filters have a single pixel.
    """

    def __init__(self, boundary: Boundary) -> None:
        super().__init__()
        self.boundary = boundary

    def forward(self, weight: Tensor) -> Tensor:  # (F, C, k, k)
        if weight.shape[-1] < 2:
            raise ValueError(f"BoundedFilters needs filters of 2 × 2 and more, got {tuple(weight.shape)}: they have zero mean.")
        weight = weight - weight.mean((-2, -1), keepdim=True)
        repeats = self.boundary.repeats(weight.shape[-1] // 2)
        return weight / (repeats * largest_response(weight)).sqrt()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The filters themselves: those that are already what `forward` returns stay as they are."""
        return weight

    def extra_repr(self) -> str:
        return f"{self.boundary}"


def _check(x: Tensor, weight: Tensor, boundary: Boundary) -> None:
    size = weight.shape[-1]
    seen = f"images {tuple(x.shape)} and filters {tuple(weight.shape)}, {boundary}"
    fits = x.ndim == 4 and (weight.ndim == 4 or (weight.ndim == 5 and len(weight) in (1, len(x))))
    if not fits or x.shape[1] != weight.shape[-3] or weight.shape[-2] != size:
        raise ValueError(
            "filter_bank needs images (B, C, H, W) and square filters (F, C, k, k), or (B, F, C, k, k), with the same C, got "
            f"{seen}. A gray image has C = 1: x.unsqueeze(1) adds it."
        )
    if boundary is not Boundary.INSIDE and size % 2 == 0:
        raise ValueError(f"filter_bank keeps the size of an image for filters of odd size only, got {seen}. Use 3, 5 or 7.")
    least = size if boundary in (Boundary.INSIDE, Boundary.PERIODIC) else size // 2 + 1
    if min(x.shape[-2:]) < least:
        raise ValueError(f"filter_bank needs images of at least {least} × {least} pixels, got {seen}. Use smaller filters.")

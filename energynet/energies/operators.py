"""What a camera did to a picture: linear operators A with their transposes, for the data term ½‖Ax − y‖²."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, pad


class Operator(ABC):
    """A linear map A and its transpose, ⟨Ax, y⟩ = ⟨x, Aᵀy⟩; what they depend on comes with each call."""

    @abstractmethod
    def apply(self, x: Tensor, *known: Any) -> Tensor:  # (B, C, H, W) -> like y
        """A x."""

    @abstractmethod
    def transpose(self, y: Tensor, *known: Any) -> Tensor:  # like y -> (B, C, H, W)
        """Aᵀ y."""

    def guide(self, y: Tensor, *known: Any) -> Tensor:  # like y -> (B, C, H, W)
        """A first picture, where a solve starts and from which a prior may take its weights."""
        return self.transpose(y, *known)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Identity(Operator):
    """A = I: denoising.

    Example:
        >>> Identity().apply(torch.ones(1, 1, 2, 2)).shape
        torch.Size([1, 1, 2, 2])
    """

    def apply(self, x: Tensor, *known: Any) -> Tensor:
        return x

    def transpose(self, y: Tensor, *known: Any) -> Tensor:
        return y


class Mask(Operator):
    """A x = m x, m one where a pixel is known and zero elsewhere: inpainting. The mask comes with the call.

    Example:
        >>> mask = torch.tensor([[1.0, 0.0]])[None, None]
        >>> Mask().apply(torch.full((1, 1, 1, 2), 3.0), mask).flatten()
        tensor([3., 0.])
    """

    def apply(self, x: Tensor, *known: Any) -> Tensor:
        return known[0] * x

    def transpose(self, y: Tensor, *known: Any) -> Tensor:
        return known[0] * y

    def guide(self, y: Tensor, *known: Any) -> Tensor:
        """The known pixels, and averages of neighbors, from further and further off, for those that are not."""
        mask = known[0].expand_as(y)
        total, weight, filled, side = mask * y, mask, mask * y, 1
        missing = mask == 0
        while side < max(y.shape[-2:]) and bool(missing.any()):
            total, weight = _blurred(total, side), _blurred(weight, side)
            found = missing & (weight > 1e-6)
            filled = torch.where(found, total / weight.clamp_min(1e-6), filled)
            missing, side = missing & ~found, 2 * side
        return filled


class Blur(Operator):
    """A x = k * x, a convolution with a kernel (h, w) of odd sides that comes with the call; beyond its border, the picture is
    mirrored.

    Example:
        >>> kernel = torch.full((3, 3), 1 / 9)
        >>> Blur().apply(torch.ones(1, 1, 5, 5), kernel).std() < 1e-6
        tensor(True)
    """

    def apply(self, x: Tensor, *known: Any) -> Tensor:
        kernel = _kernel(known[0], x)
        h, w = kernel.shape[-2:]
        padded = pad(x.flatten(0, 1)[:, None], (w // 2, w // 2, h // 2, h // 2), mode="reflect")
        return conv2d(padded, kernel.flip(-2, -1)).reshape(x.shape)

    def transpose(self, y: Tensor, *known: Any) -> Tensor:
        kernel = _kernel(known[0], y)
        h, w = kernel.shape[-2:]
        spread = conv_transpose2d(y.flatten(0, 1)[:, None], kernel.flip(-2, -1))
        return _fold(_fold(spread, w // 2, -1), h // 2, -2).reshape(y.shape)

    def guide(self, y: Tensor, *known: Any) -> Tensor:
        """The blurred picture itself."""
        return y


class Pair(Operator):
    """An operator of two functions of the user's: x ↦ A x and y ↦ Aᵀ y.

    Example:
        >>> half = Pair(lambda x: x[..., ::2], lambda y: torch.stack([y, 0 * y], -1).flatten(-2))
        >>> half.transpose(torch.ones(1, 1, 1, 2)).flatten()
        tensor([1., 0., 1., 0.])

    Args:
        apply: x, and what comes with the call.
        transpose: y, and the same.
    """

    def __init__(self, apply: Callable[..., Tensor], transpose: Callable[..., Tensor]) -> None:
        self._apply, self._transpose = apply, transpose

    def apply(self, x: Tensor, *known: Any) -> Tensor:
        return self._apply(x, *known)

    def transpose(self, y: Tensor, *known: Any) -> Tensor:
        return self._transpose(y, *known)


def _kernel(kernel: Tensor, x: Tensor) -> Tensor:  # (h, w) -> (1, 1, h, w)
    if kernel.ndim != 2 or not all(side % 2 for side in kernel.shape):
        raise ValueError(f"a kernel must be (h, w) with odd sides, got {tuple(kernel.shape)}. Add a row or column of zeros.")
    if any(side // 2 >= n for side, n in zip(kernel.shape, x.shape[-2:])):
        raise ValueError(f"a kernel {tuple(kernel.shape)} reaches over the whole picture {tuple(x.shape)}. Cut its zeros away.")
    return kernel[None, None].to(x)


def _fold(spread: Tensor, margin: int, dim: int) -> Tensor:
    """The transpose of padding by reflection: what lies beyond the border is added to what it mirrors."""
    if not margin:
        return spread
    n = spread.shape[dim] - 2 * margin
    inside = spread.narrow(dim, margin, n)
    before = spread.narrow(dim, 0, margin).flip(dim)  # mirrors 1 … margin
    after = spread.narrow(dim, margin + n, margin).flip(dim)  # mirrors n − 1 − margin … n − 2
    one, most = inside.narrow(dim, 0, 1) * 0, inside.narrow(dim, 0, n - 1 - margin) * 0
    return inside + torch.cat([one, before, most], dim) + torch.cat([most, after, one], dim)


def _blurred(x: Tensor, side: int) -> Tensor:
    """Sums over squares of 2 side + 1 pixels."""
    width = 2 * min(side, min(x.shape[-2:]) - 1) + 1
    box = x.new_ones(1, 1, 1, width) / width
    flat = x.flatten(0, 1)[:, None]
    return conv2d(conv2d(flat, box, padding=(0, width // 2)), box.mT, padding=(width // 2, 0)).reshape(x.shape)

"""Preconditioners: approximations M of a Hessian with a cheap inverse. They change the speed of a solve but not its result."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from energynet._torch.autodiff import columns
from energynet._torch.numbers import check_whole
from energynet.energy import EnergyLike

Inverse = Callable[[Any], Any]
"""p -> M⁻¹ p, like p."""

POSITIVE = 100  # the lower limit of curvatures, in rounding units of the largest one
OF_REST = 0.1  # the lower limit of an estimate, as a fraction of the rest of its row of the Hessian, which causes its error


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A point, and the information on the Hessian there that a preconditioner may use."""

    x: Any
    """The point in the user's structure."""
    code: tuple[Any, ...]
    energy: EnergyLike | None
    """None for an optimality condition without an energy."""
    ravel: Callable[[Any], Tensor]  # like x -> (*batch, n)
    unravel: Callable[[Tensor], Any]  # (*batch, n) -> like x
    product: Callable[[Tensor], Tensor]  # p -> H p, (*batch, n)
    batch_dims: int  # of x


class HessianPreconditioner(ABC):
    """A preconditioner that is computed from the Hessian, and not from the context."""

    @abstractmethod
    def inverse(self, place: Place) -> Callable[[Tensor], Tensor]:  # (*batch, n) -> (*batch, n)
        """p -> M⁻¹ p, symmetric and positive definite."""


Preconditioner = Callable[..., Inverse] | HessianPreconditioner
"""A function ``(x, *context) -> (p -> M⁻¹ p)``, or a ready-made one."""


@runtime_checkable
class KnowsDiagonal(Protocol):
    """An energy that offers the diagonal of its Hessian."""

    def hessian_diagonal(self, x: Any, *code: Any) -> Any:
        """The diagonal of the Hessian, like ``x``."""


@runtime_checkable
class KnowsBlocks(Protocol):
    """An energy that offers the 2 × 2 blocks of its Hessian."""

    def hessian_blocks(self, x: Any, *code: Any) -> Tensor:
        """The block of each pair, ``(B, 2, 2, ...)`` for x ``(B, 2, ...)``."""


@runtime_checkable
class KnowsMajorizer(Protocol):
    """An energy that offers quadratics above it."""

    def majorizer(self, x: Any, *code: Any) -> Callable[[Any], Tensor]:
        """A quadratic function u -> ``(B,)`` that, up to a constant, majorizes the energy and agrees with its gradient at x."""


@dataclasses.dataclass(frozen=True)
class HessianDiagonal(HessianPreconditioner):
    """The diagonal of the Hessian, which is worthwhile if curvatures differ between the unknowns, as with masks and weights.

    It is exact if the energy has a method ``hessian_diagonal(x, *code) -> like x``, where the code is the result of
    `Energy.encode`, and for up to ``probes`` unknowns. Otherwise, ``probes`` products with vectors of ±1 estimate it.

    Example:
        >>> import torch
        >>> from energynet import ConjugateGradient, ImplicitAdjoint, minimize
        >>> scale = torch.logspace(0, 3, 8)
        >>> energy = lambda x, z: 0.5 * (scale * (x - z).square()).sum(-1)
        >>> z = torch.ones(1, 8, requires_grad=True)
        >>> x = minimize(energy, torch.zeros(1, 8), z, adjoint=ImplicitAdjoint(ConjugateGradient(HessianDiagonal()))).value
        >>> torch.autograd.grad(x.sum(), z)[0].shape
        torch.Size([1, 8])

    Args:
        probes: the number of products, if the energy does not provide the diagonal.

    Raises:
        ValueError: if probes < 1.

    Source: Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix.
    """

    probes: int = 10

    def __post_init__(self) -> None:
        check_whole(self, "probes")

    def inverse(self, place: Place) -> Callable[[Tensor], Tensor]:
        diagonal = _positive(self._diagonal(place))
        return lambda p: p / diagonal

    def _diagonal(self, place: Place) -> Tensor:  # (*batch, n)
        if isinstance(place.energy, KnowsDiagonal):
            return place.ravel(place.energy.hessian_diagonal(place.x, *place.code))
        x = place.ravel(place.x)
        if x.shape[-1] <= self.probes:
            return torch.diagonal(columns(place.product, x).movedim(0, -1), dim1=-2, dim2=-1)
        mean, squares = torch.zeros_like(x), torch.zeros_like(x)
        for signs in _signs(x, self.probes):
            image = place.product(signs.expand_as(x))
            mean, squares = mean + signs * image / self.probes, squares + image.square() / self.probes
        return torch.maximum(mean, OF_REST * torch.clamp(squares - mean.square(), min=0).sqrt())


@dataclasses.dataclass(frozen=True)
class HessianBlocks(HessianPreconditioner):
    """The 2 × 2 blocks of the Hessian that couple two channels at the same place, such as the two components of a flow.

    x is one tensor ``(B, 2, ...)``. The blocks are exact if the energy has a method
    ``hessian_blocks(x, *code) -> (B, 2, 2, ...)``, where the code is the result of `Energy.encode`. Otherwise, ``2 · probes``
    products estimate them, which is exact if there are no other couplings.

    Example:
        >>> import torch
        >>> from energynet import NewtonCG, minimize
        >>> def energy(u, slope):                                                     # (B, 2, H, W) twice
        ...     return 0.5 * ((slope * u).sum(1) - 1).square().sum((1, 2)) + 0.01 * u.square().sum((1, 2, 3))
        >>> solver = NewtonCG(preconditioner=HessianBlocks())
        >>> minimize(energy, torch.zeros(1, 2, 4, 4), torch.randn(1, 2, 4, 4), solver=solver).value.shape
        torch.Size([1, 2, 4, 4])

    Args:
        probes: half the number of products, if the energy does not provide the blocks.

    Raises:
        ValueError: if probes < 1; at a solve, if x has another shape.

    Source: Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix, block by block.
    """

    probes: int = 10

    def __post_init__(self) -> None:
        check_whole(self, "probes")

    def inverse(self, place: Place) -> Callable[[Tensor], Tensor]:
        x, dim = place.x, place.batch_dims
        if not isinstance(x, Tensor) or x.ndim <= dim or x.shape[dim] != 2:
            seen = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"HessianBlocks needs x to be one tensor (B, 2, ...), got {seen}. Use HessianDiagonal().")
        if isinstance(place.energy, KnowsBlocks):
            blocks = place.energy.hessian_blocks(x, *place.code)
            (first, across), (_, second) = (row.unbind(dim) for row in blocks.unbind(dim))
            return _of_blocks(place, first, across, second, torch.zeros_like(first))
        return _of_blocks(place, *self._probed(place))

    def _probed(self, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Estimates of the entries of the blocks, ``(B, ...)`` each, and a lower limit of their eigenvalues."""
        x, dim, rows, rest = place.x, place.batch_dims, [], torch.zeros_like(place.x).sum(place.batch_dims)
        for k in (0, 1):
            mean, squares = torch.zeros_like(x), torch.zeros_like(x)
            for signs in _signs(x.select(dim, 0).flatten(dim), self.probes):
                pattern = signs.reshape(x.shape[dim + 1 :]).expand_as(x.select(dim, 0))
                none = torch.zeros_like(pattern)
                vector = torch.stack([pattern, none] if k == 0 else [none, pattern], dim)
                image = place.unravel(place.product(place.ravel(vector)))
                mean, squares = mean + pattern.unsqueeze(dim) * image / self.probes, squares + image.square() / self.probes
            rows.append(mean.unbind(dim))
            rest = rest + torch.clamp(squares - mean.square(), min=0).sum(dim)
        return rows[0][0], 0.5 * (rows[0][1] + rows[1][0]), rows[1][1], OF_REST * rest.sqrt()


def check_preconditioner(value: Any, name: str) -> None:
    """Refuse a value that is not a preconditioner.

    Raises:
        TypeError: with the remedy.
    """
    if value is None or isinstance(value, HessianPreconditioner) or (callable(value) and not isinstance(value, type)):
        return
    shown = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise TypeError(
        f"{name} must be HessianDiagonal(), HessianBlocks() or a function (x, *context) -> (p -> M⁻¹ p), but {shown} was "
        "passed. A fixed diagonal d is lambda x, *context: (lambda p: p / d)."
    )


def applied(function: Callable[..., Inverse], place: Place) -> Callable[[Tensor], Tensor]:  # (*batch, n) -> (*batch, n)
    """The result of a user's function at a point, on flat vectors.

    Raises:
        TypeError: if it does not return a function.
    """
    inverse = function(place.x, *place.code)
    if not callable(inverse) or isinstance(inverse, Tensor):
        raise TypeError(
            f"A preconditioner must return a function p -> M⁻¹ p, but returned {type(inverse).__name__}. A fixed diagonal d is "
            "lambda x, *context: (lambda p: p / d)."
        )
    return lambda p: place.ravel(inverse(place.unravel(p)))


def _signs(like: Tensor, count: int) -> list[Tensor]:  # (n,) each
    """Irregular vectors of ±1, which are the same in each run."""
    place = torch.arange(like.shape[-1], dtype=torch.float64, device=like.device)
    waves = (43758.5453 * torch.sin(12.9898 * place + 78.233 * k) for k in range(count))
    return [torch.where(wave - wave.floor() < 0.5, -1, 1).to(like.dtype) for wave in waves]


def _positive(diagonal: Tensor) -> Tensor:  # (*batch, n)
    """Magnitudes, with zeros replaced by a small positive value."""
    diagonal = torch.where(torch.isfinite(diagonal), diagonal.abs(), 0)
    largest = diagonal.amax(-1, keepdim=True) if diagonal.shape[-1] else diagonal.sum(-1, keepdim=True)
    least = POSITIVE * torch.finfo(diagonal.dtype).eps * largest
    return torch.maximum(diagonal, torch.where(largest > 0, least, 1))


def _of_blocks(place: Place, first: Tensor, across: Tensor, second: Tensor, least: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of 2 × 2 blocks with these entries, ``(B, ...)`` each, shifted where an eigenvalue is below the limit."""
    dim = place.batch_dims
    finite = torch.isfinite(first + across + second + least)
    first, across, second, least = (torch.where(finite, t, 0) for t in (first, across, second, least))
    mean, radius = 0.5 * (first + second), torch.hypot(0.5 * (first - second), across)
    largest = (mean.abs() + radius).flatten(dim).amax(-1).reshape(*mean.shape[:dim], *[1] * (mean.ndim - dim))
    least = torch.maximum(least, torch.where(largest > 0, POSITIVE * torch.finfo(mean.dtype).eps * largest, 1))
    shift = torch.clamp(least - (mean - radius), min=0)
    first, second = first + shift, second + shift
    determinant = first * second - across.square()

    def solve(p: Tensor) -> Tensor:
        q, r = place.unravel(p).unbind(dim)
        return place.ravel(torch.stack([(second * q - across * r) / determinant, (first * r - across * q) / determinant], dim))

    return solve

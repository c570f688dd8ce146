"""A dense factorization for A u = v, for small problems, batched per sample."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet._torch.autodiff import readable
from energynet.solvers.base import Solver
from energynet.solvers.problem import Linear
from energynet.step import Kind

Inverse = Callable[[Tensor], Tensor]  # (*batch, n, 1) -> (*batch, n, 1)


class DenseState(NamedTuple):
    residual: Tensor  # A u − v, (*batch, n)
    solved: Tensor  # (*batch) bool, whether the solver has taken its only step


@dataclasses.dataclass(frozen=True)
class Dense(Solver):
    """Forms the matrix by n simultaneous products and factorizes it by Cholesky or LU, in one step, for up to a few hundred n.

    A symmetric matrix must have no negative eigenvalue, and v must have no component along eigenvectors whose eigenvalues are
    below rounding errors. Otherwise the sample is reported as DIVERGED, and so are a singular general matrix and one that is
    too ill-conditioned for the tolerance. The memory is n² numbers per sample, and n times that of one product.

    Example:
        >>> import torch
        >>> from energynet import FPI_GD, ImplicitAdjoint
        >>> from energynet.linear import Dense
        >>> layer = FPI_GD(lambda x, z: 0.5 * (x - z).square().sum(-1), 1.0, adjoint=ImplicitAdjoint(Dense()))
        >>> z = torch.ones(1, 2, requires_grad=True)
        >>> torch.autograd.grad(layer(z, x0=torch.zeros(1, 2)).sum(), z)[0].round(decimals=4)
        tensor([[1., 1.]])

    Source: Golub and Van Loan (2013), Matrix computations, sections 3.4, 3.5 and 4.2.
    """

    sees_saddles: ClassVar[bool] = True
    measures_first: ClassVar[bool] = True
    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.LINEAR, Kind.SYMMETRIC})

    def init(self, problem: Linear, x0: Tensor) -> DenseState:
        residual = problem.residual(x0)
        return DenseState(residual, torch.zeros_like(residual.sum(-1), dtype=torch.bool))

    def update(self, problem: Linear, x: Tensor, state: DenseState) -> tuple[Tensor, DenseState]:
        matrix, residual = problem.matrix(x), state.residual
        inverse, usable = _cholesky(matrix) if problem.symmetric else _lu(matrix)
        for _ in range(2):  # the second pass is iterative refinement
            move = inverse(residual.to(matrix.dtype).unsqueeze(-1)).squeeze(-1)
            x = x - torch.where(usable.unsqueeze(-1), move, 0).to(x.dtype)
            residual = problem.residual(x)
        return x, DenseState(residual, torch.ones_like(state.solved))

    def breakdown(self, state: DenseState) -> Tensor:
        return state.solved


def _cholesky(matrix: Tensor) -> tuple[Inverse, Tensor]:
    """The inverse, and whether the matrix is numerically positive definite, independently of the scaling of its variables."""
    factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
    pivots, diagonal = factor.diagonal(dim1=-2, dim2=-1).square(), matrix.diagonal(dim1=-2, dim2=-1)
    usable = (info == 0) & (pivots > _rounding(matrix) * diagonal).all(-1)
    if readable(usable) and not bool(usable.all()):
        return _pseudo_inverse(matrix)
    factor = _or_identity(factor, usable)
    return lambda right: torch.cholesky_solve(right, factor), usable


def _pseudo_inverse(matrix: Tensor) -> tuple[Inverse, Tensor]:
    """The pseudoinverse without eigenvalues below rounding errors, and whether no eigenvalue is negative beyond those."""
    matrix = (matrix + matrix.mT) / 2
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).abs()
    scale = torch.clamp(diagonal, min=diagonal.amax(-1, keepdim=True) * 100 * torch.finfo(matrix.dtype).eps)
    scale = torch.where(scale > 0, scale, 1).rsqrt()
    finite = torch.isfinite(matrix).all(-1).all(-1)
    scaled = torch.where(finite[..., None, None], scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2), 0)
    values, vectors = torch.linalg.eigh(scaled)
    vectors, doubt = scale.unsqueeze(-1) * vectors, 10 * _rounding(matrix) * values.abs().amax(-1, keepdim=True)
    inverse = torch.where(values > doubt, 1 / torch.where(values > doubt, values, 1), 0)
    return lambda right: vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ right)), finite & (values >= -doubt).all(-1)


def _lu(matrix: Tensor) -> tuple[Inverse, Tensor]:
    """The inverse, and whether every pivot exceeds the rounding error of its column, with rows scaled to unit length."""
    row = _length(matrix, -1)
    factor, pivots, _ = torch.linalg.lu_factor_ex(matrix / row)
    diagonal = factor.diagonal(dim1=-2, dim2=-1).abs()
    usable = (diagonal > _rounding(matrix) * _length(matrix / row, -2).squeeze(-2)).all(-1)
    factor = _or_identity(factor, usable)
    return lambda right: torch.linalg.lu_solve(factor, pivots, right / row), usable


def _rounding(matrix: Tensor) -> float:
    return matrix.shape[-1] * torch.finfo(matrix.dtype).eps


def _length(matrix: Tensor, dim: int) -> Tensor:
    """The norms of the rows or columns; 1 for those that are zero."""
    size = torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)
    return torch.where(size == 0, 1, size)


def _or_identity(factor: Tensor, usable: Tensor) -> Tensor:
    return torch.where(usable[..., None, None], factor, torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device))

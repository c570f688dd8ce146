"""Constraints and nonsmooth terms in the form of proximal maps, for `minimize`, `FPI_GD` and `ProximalStep`.

A bound, radius or weight is a float, a tensor, or a pytree of these with the structure of ``x``. A tensor may require grad and
broadcasts to ``x``. So for ``x`` of shape ``(B, n)``, one value per sample has the shape ``(B, 1)`` for `Box` and `L1`, which act
on each element, and ``(B,)`` for `Simplex`, `CappedSimplex`, `L2Ball` and `GroupL2`, which act along the last dimension.

The maps are differentiable to any order wherever the derivatives exist; at a kink they return a one-sided derivative. NaN
in the input gives NaN in the output.
"""

import dataclasses
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import readable
from energynet.projections import (
    clip,
    each,
    is_value,
    last,
    like,
    onto_ball,
    onto_capped_simplex,
    onto_simplex,
    refuse_crossed,
    refuse_negative,
    refuse_others,
    shrink,
    shrink_group,
)
from energynet.proximal import Prox
from energynet.step import per_sample
from energynet.total_variation import TotalVariation

__all__ = ["Affine", "Box", "CappedSimplex", "GroupL2", "L1", "L2Ball", "NonNegative", "Prox", "Simplex", "TotalVariation"]


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Box(Prox):
    """Bounds on every element: lower ≤ x ≤ upper.

    Example:
        >>> import torch
        >>> Box(0.0, torch.tensor([1.0, 2.0]))(torch.tensor([[-3.0, 3.0]]), 1.0)      # (B, 2) -> (B, 2)
        tensor([[0., 2.]])

    Args:
        lower: a float or a tensor that broadcasts to ``x``; None: no bound.
        upper: a float or a tensor that broadcasts to ``x``; None: no bound.

    Raises:
        ValueError: if lower > upper somewhere.
    """

    is_box: ClassVar[bool] = True
    lower: Any = None
    upper: Any = None

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            refuse_others("Box", name, [bound for bound in _tree.leaves(getattr(self, name)) if bound is not None])
        if is_value(self.lower) != is_value(self.upper):
            both = like(self.lower, self.upper), like(self.upper, self.lower)
        else:
            both = self.lower, self.upper
        _tree.map_structure(refuse_crossed, *both)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return each(clip, x, self.lower, self.upper)


@final
@dataclasses.dataclass(frozen=True)
class NonNegative(Prox):
    """x ≥ 0.

    Example:
        >>> import torch
        >>> NonNegative()(torch.tensor([[-3.0, 3.0]]), 1.0)
        tensor([[0., 3.]])
    """

    is_box: ClassVar[bool] = True

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return each(lambda x: clip(x, 0.0, None), x)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Simplex(Prox):
    """x ≥ 0 with Σ x = radius along the last dimension.

    Example:
        >>> import torch
        >>> Simplex()(torch.tensor([[0.5, 0.5, -1.0], [3.0, 0.0, 0.0]]), 1.0)          # (B, n) -> (B, n)
        tensor([[0.5000, 0.5000, 0.0000],
                [1.0000, 0.0000, 0.0000]])

    Args:
        radius: a float, or a tensor that broadcasts to ``x`` without its last dimension, as ``(B,)``.

    Raises:
        ValueError: if the radius is negative.

    Source: Held, Wolfe and Crowder (1974); Duchi et al. (2008), Efficient projections onto the l1-ball.
    """

    radius: Any = 1.0

    def __post_init__(self) -> None:
        refuse_negative("Simplex", "radius", self.radius)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return each(onto_simplex, x, self.radius)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class CappedSimplex(Prox):
    """0 ≤ x ≤ upper with Σ x = radius along the last dimension, such as portfolio weights with an upper limit.

    Example:
        >>> import torch
        >>> CappedSimplex(upper=0.6)(torch.tensor([[3.0, 0.1, 0.0], [0.0, 0.0, 0.0]]), 1.0)        # (B, n) -> (B, n)
        tensor([[0.6000, 0.2500, 0.1500],
                [0.3333, 0.3333, 0.3333]])

    Args:
        upper: a float or a tensor that broadcasts to ``x``.
        radius: a float, or a tensor that broadcasts to ``x`` without its last dimension, as ``(B,)``.

    Raises:
        ValueError: if one of them is negative; when called, if Σ upper < radius. Under ``vmap`` or on an accelerator, where
            values cannot be read at once, the result is NaN instead.

    Source: Wang and Lu (2015), Projection onto the capped simplex.
    """

    upper: Any
    radius: Any = 1.0

    def __post_init__(self) -> None:
        refuse_negative("CappedSimplex", "upper", self.upper)
        refuse_negative("CappedSimplex", "radius", self.radius)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return each(onto_capped_simplex, x, self.upper, self.radius)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class L2Ball(Prox):
    """‖x − center‖ ≤ radius along the last dimension.

    Example:
        >>> import torch
        >>> L2Ball(radius=1.0)(torch.tensor([[3.0, 4.0], [0.1, 0.2]]), 1.0)            # (B, n) -> (B, n)
        tensor([[0.6000, 0.8000],
                [0.1000, 0.2000]])

    Args:
        radius: a float, or a tensor that broadcasts to ``x`` without its last dimension, as ``(B,)``.
        center: a float or a tensor that broadcasts to ``x``; None: 0.

    Raises:
        ValueError: if the radius is negative.
    """

    radius: Any = 1.0
    center: Any = None

    def __post_init__(self) -> None:
        refuse_negative("L2Ball", "radius", self.radius)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return each(onto_ball, x, self.radius, self.center)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class L1(Prox):
    """The term weight · ‖x‖₁: elements smaller than γ · weight become zero, and the others shrink by this amount.

    Example:
        >>> import torch
        >>> L1(weight=2.0)(torch.tensor([[3.0, -0.5]]), 0.5)
        tensor([[2., 0.]])

    Args:
        weight: a float or a tensor that broadcasts to ``x``.

    Raises:
        ValueError: if a weight is negative.

    Source: Donoho and Johnstone (1994), soft thresholding.
    """

    weight: Any

    def __post_init__(self) -> None:
        refuse_negative("L1", "weight", self.weight)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return each(lambda x, weight: shrink(x, per_sample(step_size, x.ndim) * weight), x, self.weight)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class GroupL2(Prox):
    """The term weight · Σ ‖x‖ with one norm per group along the last dimension: whole groups become zero.

    Example:
        >>> import torch
        >>> GroupL2(weight=2.5)(torch.tensor([[[3.0, 4.0], [0.6, 0.8]]]), 1.0)         # (B, groups, n)
        tensor([[[1.5000, 2.0000],
                 [0.0000, 0.0000]]])

    Args:
        weight: a float, or a tensor that broadcasts to ``x`` without its last dimension, as ``(groups,)``.

    Raises:
        ValueError: if a weight is negative.

    Source: Yuan and Lin (2006), Model selection and estimation in regression with grouped variables.
    """

    weight: Any

    def __post_init__(self) -> None:
        refuse_negative("GroupL2", "weight", self.weight)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        return each(lambda x, weight: shrink_group(x, per_sample(step_size, x.ndim) * last(weight)), x, self.weight)


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Affine(Prox):
    """The linear constraint matrix · x = right along the last dimension.

    The matrix is factorized once per solve, Aᵀ = Q R, and the projection is x − Q Qᵀ x + Q R⁻ᵀ b.

    Example:
        >>> import torch
        >>> from energynet.proximal import ProximalStep
        >>> plane = Affine(torch.ones(1, 2), torch.ones(1))                            # (m, n), (m,)
        >>> ProximalStep(lambda x: x.square().sum(-1), 0.5, plane)(torch.zeros(3, 2))[0]
        tensor([0.5000, 0.5000])

    Args:
        matrix: ``(m, n)``, m ≤ n, rows linearly independent; or ``(B, m, n)`` for ``x`` of shape ``(B, n)``.
        right: ``(m,)`` or ``(B, m)``.

    Raises:
        ValueError: if shapes do not fit, or the rows are dependent to working precision.
    """

    matrix: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, Tensor) or not isinstance(self.right, Tensor):
            kinds = f"{type(self.matrix).__name__} and {type(self.right).__name__}"
            raise TypeError(f"Affine needs tensors as its matrix and right-hand side, got {kinds}. Pass torch.as_tensor(...).")
        m, n = self.matrix.shape[-2:]
        if m > n or self.right.shape[-1:] != (m,):
            raise ValueError(
                f"Affine needs a matrix (m, n) with m ≤ n and a right-hand side (m,), got {tuple(self.matrix.shape)} and "
                f"{tuple(self.right.shape)}."
            )

    def encode(self, *context: Any) -> tuple[Tensor, Tensor]:
        working = torch.promote_types(self.matrix.dtype, torch.float32)  # no half-precision factorizations exist
        q, r = torch.linalg.qr(self.matrix.mT.to(working))
        pivots = r.detach().diagonal(dim1=-2, dim2=-1).abs()
        least = 100 * torch.finfo(r.dtype).eps * torch.linalg.matrix_norm(r.detach()).unsqueeze(-1)
        if readable(pivots) and bool((pivots <= least).any()):
            raise ValueError(
                f"Affine needs linearly independent rows; one of the {r.shape[-1]} is a combination of the others, to within "
                f"{float(pivots.min()):.1e}. Remove redundant rows."
            )
        weights = torch.linalg.solve_triangular(r.mT, self.right.to(working).unsqueeze(-1), upper=False)
        return q, (q @ weights).squeeze(-1)

    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        q, particular = code or self.encode()
        return each(lambda x: (x - (q @ (q.mT @ x.to(q.dtype).unsqueeze(-1))).squeeze(-1) + particular).to(x.dtype), x)

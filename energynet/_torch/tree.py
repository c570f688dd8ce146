"""Converts pytrees to one flat tensor; this is the only module that uses ``torch.utils._pytree``.

Solvers work on one tensor of shape ``(*batch, n)``. A `Layout` records how the user's pytree is stored in it.
"""

import dataclasses
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.utils._pytree as _pytree
from torch import Tensor

map_structure: Callable[..., Any] = _pytree.tree_map
flatten: Callable[[Any], tuple[list[Any], Any]] = _pytree.tree_flatten
unflatten: Callable[[Any, Any], Any] = _pytree.tree_unflatten
TreeSpec = _pytree.TreeSpec
leaves: Callable[[Any], list[Any]] = _pytree.tree_leaves


def register_dataclass(cls: type, field: Callable[[Any, str], Any] = getattr) -> type:
    """Register a dataclass as a pytree, so that ``torch.func.vmap`` can return it; fields that are None are not leaves.

    Args:
        cls: the dataclass.
        field: (value, name) -> the field of the value.
    """

    def flatten(value: Any) -> tuple[list[Any], tuple[str, ...]]:
        fields = {f.name: field(value, f.name) for f in dataclasses.fields(value)}
        present = {name: v for name, v in fields.items() if v is not None}
        return list(present.values()), tuple(present)

    _pytree.register_pytree_node(cls, flatten, lambda values, names: cls(**dict(zip(names, values, strict=True))))
    return cls


def least_precise(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype with the largest rounding unit."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mapping between a pytree of tensors and one tensor of shape ``(*batch, n)``."""

    spec: Any
    shapes: tuple[torch.Size, ...]  # the shapes for one sample
    dtypes: tuple[torch.dtype, ...]
    batch_dims: int
    bare: bool  # whether the pytree is a single tensor without a container

    @classmethod
    def of(cls, tree: Any, batch_dims: int) -> "Layout":
        tensors, spec = flatten(tree)
        shapes = tuple(t.shape[batch_dims:] for t in tensors)
        return cls(spec, shapes, tuple(t.dtype for t in tensors), batch_dims, isinstance(tree, Tensor))

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, self.dtypes)

    @property
    def rounding(self) -> float:
        """The rounding unit of the least precise tensor."""
        return torch.finfo(least_precise(*self.dtypes)).eps

    def ravel(self, tree: Any) -> Tensor:  # -> (*batch, n)
        tensors = [tree] if isinstance(tree, Tensor) else leaves(tree)
        batch = tensors[0].shape[: self.batch_dims]
        parts = [t.reshape((*batch, shape.numel())) for t, shape in zip(tensors, self.shapes, strict=True)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.to(self.dtype) for part in parts], dim=-1)

    def unravel(self, flat: Tensor) -> Any:  # (*batch, n) ->
        batch = flat.shape[:-1]
        if self.bare:
            return flat.reshape((*batch, *self.shapes[0])).to(self.dtypes[0])
        sizes = [shape.numel() for shape in self.shapes]
        parts = [flat] if len(sizes) == 1 else flat.split(sizes, dim=-1)
        rows = zip(parts, self.shapes, self.dtypes, strict=True)
        return unflatten([part.reshape((*batch, *shape)).to(dtype) for part, shape, dtype in rows], self.spec)

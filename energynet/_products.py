"""How matrix products stand in a recorded program: as the libraries that compute them are fastest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

SMALL = 2**16  # elements; beyond, the product of a library is faster
LANES = 16  # columns that a library computes at once


def products() -> dict[Any, Callable[..., Any]]:
    """How products are recorded, where that is not as they come: a thin one and one with a shared matrix; and what cannot be."""
    aten = torch.ops.aten
    return {aten.mm.default: _thin, aten.bmm.default: _shared, aten._linalg_check_errors.default: _raising}


def _raising(info: Tensor, name: str, is_matrix: bool) -> Any:
    raise RuntimeError(f"{name} raises where a matrix is singular, which a program cannot: use its variant ending in _ex")


def _thin(a: Tensor, b: Tensor) -> Any:  # (1, k), (k, n)
    """A product with one row, as of one small problem, by a matrix and a vector: that is fused with what stands around it."""
    known = all(isinstance(n, int) for n in (*a.shape, *b.shape))
    if not known or a.device.type != "cpu" or a.shape[0] != 1 or b.numel() > SMALL:
        return NotImplemented
    return torch.mv(b.mT, a[0]).unsqueeze(0)


def _shared(a: Tensor, b: Tensor) -> Any:  # (B, n, k), (B, k, m)
    """Products with the same matrix, of which ``vmap`` makes as many as there are samples, as one product."""
    if b.stride(0) == 0:
        return torch.mm(a.flatten(0, 1), b[0]).unflatten(0, a.shape[:2])
    if a.stride(0) == 0 and b.shape[2] == 1:
        return torch.mm(b.squeeze(2), a[0].mT).unsqueeze(2)
    return NotImplemented


def ragged(matrix: Tensor | None) -> bool:
    """Whether a product with this matrix has so many columns that MKL is slow with the last of them."""
    if matrix is None or matrix.device.type != "cpu" or matrix.dtype != torch.float32:
        return False
    columns = matrix.shape[1]
    return isinstance(columns, int) and columns > 2 * LANES and columns % LANES > LANES // 2


def widened(graph: fx.Graph, product: fx.Node) -> fx.Node:
    """Give a product's second matrix columns of zeros, up to a whole number of `LANES`; return that matrix."""
    a, b = product.args
    columns = product.meta["val"].shape[1]
    with graph.inserting_before(product):
        wide = graph.call_function(torch.ops.aten.constant_pad_nd.default, (b, [0, -columns % LANES]))
        whole = graph.call_function(torch.ops.aten.mm.default, (a, wide))
        part = graph.call_function(torch.ops.aten.slice.Tensor, (whole, 1, 0, columns))
    product.replace_all_uses_with(part, propagate_meta=True)
    graph.erase_node(product)
    return wide

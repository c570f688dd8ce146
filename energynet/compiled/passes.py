"""A pass over Inductor's graphs on a CPU, which prevents that expensive functions are recomputed."""

from typing import Any

import torch
from torch import Tensor, fx


def dear_once(graph: fx.Graph) -> None:
    """Compute expensive functions once and not for each element of a larger result, such as a vector that scales all rows.

    Inductor recomputes elementwise operations wherever they are read, unless they are marked to be stored.
    """
    dear: dict[fx.Node, fx.Node] = {}  # nodes that contain an expensive function -> the node that computes it
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not (_elementwise(node) or node.target in _VIEWS):
            continue
        parts = [n for n in node.all_input_nodes if n in dear]
        if parts or node.target in _DEAR:
            dear[node] = dear[parts[0]] if node.target in _VIEWS else node
        for part in parts:
            if _far_smaller(part.meta["val"].shape, value.shape):
                dear[part].meta["inductor_realize_to_strides"] = True


def _far_smaller(part: torch.Size, whole: torch.Size) -> bool:
    return all(isinstance(n, int) for n in (*part, *whole)) and len(part) > 0 and 8 * part.numel() <= whole.numel()


def _elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _named(*names: str) -> set[Any]:
    return {getattr(torch.ops.aten, name).default for name in names}


_VIEWS = _named("expand", "unsqueeze", "view", "permute")
_DEAR = _named("exp", "expm1", "log", "log1p", "sin", "cos", "tan", "sinh", "cosh", "tanh", "sigmoid", "erf")

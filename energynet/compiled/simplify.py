"""Makes a recorded graph smaller before it is compiled: it removes what is unused, what changes nothing, and repetitions.

Python records an energy again for its value, for its gradient and for each linearization, also at the same point. Inductor would
generate code for each of them, because it finds repetitions only within a kernel.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx

from energynet.compiled.layouts import layout

_ATEN = torch.ops.aten
_VIEWS = {_ATEN.alias.default, _ATEN.view.default, _ATEN.expand.default, _ATEN.permute.default}
_NEUTRAL_ONE = {_ATEN.pow.Tensor_Scalar, _ATEN.mul.Tensor, _ATEN.mul.Scalar, _ATEN.div.Tensor}
_COPIES = {_ATEN.clone.default, _ATEN.lift_fresh_copy.default, _ATEN.empty.memory_format, _ATEN.empty_strided.default}


def simplify(graph: fx.GraphModule) -> None:
    """Simplify a graph in place, unless it contains in-place operations."""
    nodes = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if any(node.target._schema.is_mutable for node in nodes):
        return
    known: dict[Hashable, fx.Node] = {}
    for node in nodes:
        _transpose_once(node)
        if _needs_own_memory(node):
            continue
        same = _unchanged(node) or known.setdefault(_key(node), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _needs_own_memory(node: fx.Node) -> bool:
    """Whether the result may not share memory: a copy, a random number, a result of the graph, or a value that a loop updates."""
    if node.target in _COPIES or torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        return True
    return any(user.op == "output" or isinstance(user.target, torch._ops.HigherOrderOperator) for user in node.users)


def _transpose_once(node: fx.Node) -> None:
    """Replace the permutation of a permutation by one of the original tensor."""
    before: Any = node.args[0] if node.args else None
    if node.target is _ATEN.permute.default and before.target is _ATEN.permute.default:
        source, first = before.args
        node.args = (source, [first[k] for k in node.args[1]])  # type: ignore[union-attr]


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The argument, if the operation returns it as it is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not _alike(node.meta.get("val"), source.meta.get("val")):
        return None
    if node.target is _ATEN.permute.default:
        return source if list(node.args[1]) == sorted(node.args[1]) else None  # type: ignore[arg-type]
    if node.target in _NEUTRAL_ONE:
        return source if len(node.args) == 2 and isinstance(node.args[1], (int, float)) and node.args[1] == 1 else None
    return source if node.target in _VIEWS else None


def _alike(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and layout(one) == layout(other)


def _key(node: fx.Node) -> Hashable:
    """Equal for two nodes that compute the same."""
    return node.target, _parts(node.args), _parts(node.kwargs)


def _parts(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(map(_parts, value))
    if isinstance(value, dict):
        return tuple((name, _parts(part)) for name, part in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))  # 1, 1.0 and True are equal, as are 0.0 and -0.0

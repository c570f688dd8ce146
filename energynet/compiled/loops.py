"""Keeps loops as loops in a recorded program: each `while_loop` becomes one ``torch.while_loop``.

Computations in its body that depend only on constants are moved before the loop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from energynet._torch import tree as _tree
from energynet.compiled.layouts import layout
from energynet.compiled.simplify import simplify


def record_loop(condition: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any, limit: int | Tensor,
                every: int) -> Any:  # fmt: skip
    """Record a `while_loop` as one ``torch.while_loop`` of the current program."""
    from torch._higher_order_ops.while_loop import while_loop_op

    leaves, spec = _tree.flatten((torch.zeros((), dtype=torch.int64, device=_tree.leaves(carry)[0].device), carry))
    leaves = _apart([leaf.contiguous() for leaf in leaves])

    def test(*leaves: Tensor) -> Tensor:
        count, carry = _tree.unflatten(list(leaves), spec)
        return condition(carry) & (count < limit)

    def update(*leaves: Tensor) -> list[Tensor]:
        count, carry = _tree.unflatten(list(leaves), spec)
        for _ in range(every):
            carry = body(carry)
        return _fresh(_tree.leaves((count + every, carry)), leaves)

    test_graph, test_captured = _subgraph(test, leaves)
    update_graph, update_captured = _subgraph(update, leaves)
    captured = _hoist(update_graph, update_captured, len(leaves))
    operands = _apart([*test_captured, *captured], leaves)
    _widen(test_graph, len(leaves) + len(test_captured), len(captured))
    _widen(update_graph, len(leaves), len(test_captured))
    run: Callable[..., Any] = while_loop_op  # its own annotation knows of one operand
    result = run(test_graph, update_graph, tuple(leaves), tuple(operands))
    return _tree.unflatten(list(result), spec)[1]


def _apart(tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors, copied where they are views or share memory with one another or with others.

    ``torch.while_loop`` does not accept such tensors, and Inductor's C++ wrapper frees a view after the first iteration.
    """
    taken = {t.untyped_storage()._cdata for t in others}
    result = []
    for t in tensors:
        base = t._base
        if base is not None and layout(base) == layout(t):  # they share memory, though fake tensors may not say so
            t = base  # a copy of the same elements would be optimized away
        own = t.is_contiguous() and not t._is_view() and t.untyped_storage()._cdata not in taken
        result.append(t if own else t.clone(memory_format=torch.contiguous_format))
        taken.add(result[-1].untyped_storage()._cdata)
    return result


def _fresh(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a loop body, contiguous, with their own memory, and with the dtypes of the inputs."""
    return _apart([t.to(before.dtype).contiguous() for t, before in zip(outputs, inputs, strict=True)], inputs)


def _subgraph(function: Callable[..., Any], examples: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The function as a graph with its captured tensors as additional inputs, and these tensors."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

    from energynet.compiled.inductor import recorded_as

    with disable_proxy_modes_tracing():
        fresh = [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device) for t in examples]
        graph = make_fx(function, recorded_as(), _allow_non_fake_inputs=True)(*fresh)
    captured = lift(graph)
    simplify(graph)
    return graph, captured


def lift(graph: fx.GraphModule) -> list[Tensor]:
    """Make each constant tensor of a graph an additional input; return these tensors.

    A literal in the code, such as ``torch.tensor([1.0, 2.0])``, is marked; see `written_out`.
    """
    nodes = list(graph.graph.nodes)
    last = [n for n in nodes if n.op == "placeholder"][-1]
    captured: dict[Any, tuple[Tensor, fx.Node]] = {}
    for node in nodes:
        value = getattr(graph, node.target) if node.op == "get_attr" else None
        if not isinstance(value, Tensor):
            continue
        each, repeats = _once(value)
        if node.users and all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users):
            setattr(each, _MARK, True)
        key = _place(each)
        if key not in captured:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"captured_{len(captured)}")
            last.meta["val"] = each
            captured[key] = (each, last)
        place = captured[key][1]
        if repeats:
            with graph.graph.inserting_before(node):
                place = graph.graph.call_function(torch.ops.aten.expand.default, (place, repeats))
            place.meta["val"] = value
        node.replace_all_uses_with(place)
        graph.graph.erase_node(node)
    graph.recompile()
    return [value for value, _ in captured.values()]


_MARK = "_energynet_written_out"


def written_out(tensor: Tensor) -> bool:
    """Whether the tensor is a literal, which the code creates from Python numbers at each call."""
    return hasattr(tensor, _MARK)


def _once(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """A tensor without repeated elements, and the sizes for ``expand`` that restore it; no sizes if nothing is repeated."""
    sizes = [n if step == 0 and n != 1 and isinstance(n, int) else -1 for n, step in zip(tensor.shape, tensor.stride())]
    for dim, n in enumerate(sizes):
        tensor = tensor if n == -1 else tensor.narrow(dim, 0, 1)
    return tensor, [] if set(sizes) <= {-1} else sizes


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is the same for two views of the same elements."""
    return tensor.untyped_storage()._cdata, *layout(tensor)


def _widen(graph: fx.GraphModule, position: int, count: int) -> None:
    """Add inputs that the graph does not use."""
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    last = places[position - 1]
    for _ in range(count):
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"unused_{position}_{id(last)}")
    graph.recompile()


def _hoist(graph: fx.GraphModule, captured: list[Tensor], carried: int) -> list[Tensor]:
    """Move computations that depend only on captured tensors out of a loop body: the results become inputs."""
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    fixed: dict[fx.Node, Any] = dict(zip(places[carried:], captured, strict=True))
    written = _written(graph.graph)
    for node in list(graph.graph.nodes):
        if _movable(node) and written.isdisjoint(_memory(node)) and all(n in fixed for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: fixed[n])
            fixed[node] = node.target(*args, **kwargs)
    crossing = _crossing(graph, fixed)
    last = places[-1]
    for node in crossing:
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"hoisted_{node.name}")
        last.meta["val"] = fixed[node]
        node.replace_all_uses_with(last)
    graph.graph.eliminate_dead_code()
    for place in places[carried:]:
        if place in crossing or not place.users:
            graph.graph.erase_node(place)
    graph.recompile()
    return [fixed[node] for node in crossing]


def _crossing(graph: fx.GraphModule, fixed: dict[fx.Node, Any]) -> list[fx.Node]:
    """The fixed nodes that the rest of the body reads; cheap ones, such as constants and ``expand``, are recomputed there."""
    crossing: dict[fx.Node, None] = {}
    literal: set[fx.Node] = set()  # nodes that depend only on numbers in the code
    for node in graph.graph.nodes:
        if node.op != "placeholder" and literal.issuperset(node.all_input_nodes):
            literal.add(node)
    asked = [n for node in graph.graph.nodes if node not in fixed for n in node.all_input_nodes if n in fixed]
    seen: set[fx.Node] = set()
    while asked:
        node = asked.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" or not _cheap(node, fixed[node], node in literal):
            crossing[node] = None
        else:
            asked.extend(n for n in node.all_input_nodes)
    order = {node: k for k, node in enumerate(graph.graph.nodes)}
    return sorted(crossing, key=order.__getitem__)


def _written(graph: fx.Graph) -> set[int]:
    """The memory of all arguments of in-place operations; such values are not constants."""
    return {m for node in graph.nodes if _is_mutable(node) for n in node.all_input_nodes for m in _memory(n)}


def _memory(node: fx.Node) -> list[int]:
    return [t.untyped_storage()._cdata for t in _tree.leaves(node.meta.get("val")) if isinstance(t, Tensor)]


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _movable(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not _is_mutable(node) and torch.Tag.nondeterministic_seeded not in target.tags


def _cheap(node: fx.Node, value: Any, is_literal: bool) -> bool:
    if not isinstance(value, Tensor):
        return True  # a size, or several results at once
    if is_literal and (value.dim() == 0 or not node.all_input_nodes):
        return node.target is not torch.ops.aten.eye.default  # it would prevent vectorization of the kernel that contains it
    return value._is_view() or any(step == 0 and size != 1 for size, step in zip(value.shape, value.stride()))

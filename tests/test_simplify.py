"""Recorded graphs become smaller, and compute the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from energynet import Compiled, minimize
from energynet.compiled.inductor import recorded_as
from energynet.compiled.simplify import simplify


def simplified(function: Callable[[Tensor], list[Tensor]], x: Tensor) -> tuple[fx.GraphModule, list[str]]:
    """The graph of a function at x, and the names of the operations in it."""
    graph = make_fx(function, recorded_as())(x)
    expected = graph(x)
    simplify(graph)
    for found, right in zip(graph(x), expected, strict=True):
        assert torch.equal(found, right) or torch.isnan(right).any()
        assert torch.equal(torch.signbit(found), torch.signbit(right)) and found.dtype == right.dtype
    return graph, [n.target._schema.name.removeprefix("aten::") for n in graph.graph.nodes if n.op == "call_function"]


X = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]], dtype=torch.float64)


def test_repetitions_are_computed_once() -> None:
    _, names = simplified(lambda x: [(x.exp() + 1) * x.exp().sum(-1, keepdim=True)], X)
    assert names == ["exp", "add", "sum", "mul"]


def test_what_changes_nothing_or_is_unused_is_removed() -> None:
    def function(x: Tensor) -> list[Tensor]:
        x.sin().sum()
        return [(x.mT.mT.expand(2, 3).reshape(2, 3) * 1.0).pow(1).div(1).neg()]

    assert simplified(function, X)[1] == ["neg"]


def test_a_transposed_matrix_is_transposed_once() -> None:
    assert simplified(lambda x: [x.permute(1, 0).permute(1, 0).permute(1, 0) + 1], X)[1] == ["permute", "add"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [torch.full_like(x, 0.0).reciprocal() + torch.full_like(x, -0.0).reciprocal()],
        lambda x: [torch.full((2, 3), 2).pow(2) / 3 + torch.full((2, 3), 2.0).pow(2)],
        lambda x: [x.long() * 1.0],
        lambda x: [(x * 1).sum(-1, keepdim=True) + x.sum(-2, keepdim=True)],
        lambda x: [x.expand(4, 2, 3) * 2, x.double().float().double() + 0.1],
    ],
)
def test_what_differs_in_sign_or_type_stays_apart(function: Callable[[Tensor], list[Tensor]]) -> None:
    simplified(function, X)


def test_results_share_no_memory() -> None:
    graph, _ = simplified(lambda x: [x.exp(), x.exp(), x.clone(), x.clone(), x.exp().sum()], X)
    found = graph(X)
    assert len({t.data_ptr() for t in (X, *found)}) == 6


def test_random_numbers_are_drawn_each_time() -> None:
    graph = make_fx(lambda x: [torch.rand_like(x) - torch.rand_like(x)], recorded_as())(X)
    simplify(graph)
    assert (graph(X)[0] != 0).all()


def test_writing_into_memory_leaves_a_graph_as_it_is() -> None:
    _, names = simplified(lambda x: [x.clone().mul_(2) + x.clone() * 1.0 + x.clone() * 1.0], X)
    assert names.count("mul") == 2 and names.count("mul_") == 1


class Counted(Exception):
    """Ends a compilation once the graph has been counted."""


@pytest.mark.slow
def test_a_solve_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are a tenth above the numbers of November 2026; compiling takes time in proportion to them."""
    counts: list[int] = []

    def count(graph: fx.GraphModule, *_: object) -> None:
        graphs = [module.graph for module in graph.modules() if isinstance(module, fx.GraphModule)]
        counts.append(sum(node.op == "call_function" for each in graphs for node in each.nodes))
        raise Counted

    monkeypatch.setattr("energynet.compiled.inductor.compile_graph", count)
    torch.manual_seed(0)
    A, b = torch.randn(40, 32, dtype=torch.float64) / 6, torch.randn(1, 40, dtype=torch.float64, requires_grad=True)

    def energy(x: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (x @ A.T - b).square().sum(-1) + 0.1 * x.cosh().log().sum(-1)

    with pytest.warns(UserWarning, match="could not be compiled"):
        x = minimize(energy, torch.zeros(1, 32, dtype=torch.float64), b, driver=Compiled(capacity=63)).value
        x.sum().backward()
    forward, adjoint = counts
    assert forward < LIMITS[0] and adjoint < LIMITS[1]


LIMITS = (1810, 490)

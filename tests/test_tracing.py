"""What stands in a recorded program."""

from collections.abc import Callable

import pytest
import torch
from compiling import records
from problems import TIGHT, LogCosh, some_context
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import energynet.compiled.cpu_loops
import energynet.compiled.loops
import energynet.compiled.passes
from energynet import (
    FPI_GD,
    CompilationError,
    Compiled,
    Eager,
    fixed_point,
)
from energynet._torch.autodiff import columns, gradient_of_sum, linearize, recording_program
from energynet._torch.while_loop import while_loop
from energynet.compiled.decompositions import recorded_as
from energynet.compiled.loops import record_loop
from energynet.compiled.passes import dear_once


@pytest.mark.parametrize("every", [2, 7, 1000])
def test_looking_less_often_changes_no_answer(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    energy, z = LogCosh(), some_context(3, requires_grad=True)
    found, looks, says_no = [], [], energynet._torch.while_loop._says_no
    monkeypatch.setattr(energynet._torch.while_loop, "_says_no", lambda condition: looks[-1].append(1) or says_no(condition))
    for driver in (Eager(check_every=1), Eager(check_every=every)):
        looks.append([])
        layer = FPI_GD(energy, energy.step_size, start=energy.start, termination=TIGHT, driver=driver)
        solution = layer.solve(z)
        found.append([solution.value, solution.num_steps, torch.autograd.grad(solution.value.square().sum(), z)[0]])
    for expected, got in zip(*found, strict=True):
        assert torch.equal(expected, got)
    assert len(looks[1]) < 0.7 * len(looks[0])
    with pytest.raises(ValueError, match="check_every ≥ 1 or None, got 0"):
        Eager(check_every=0)


def body_of(update: Callable[[Tensor], Tensor], every: int = 1) -> list[str]:
    """Names of the operations in the body of a recorded loop."""
    return [str(n.target) for n in recorded(update, every).nodes if n.op == "call_function"]


def recorded(update: Callable[[Tensor], Tensor], every: int = 1) -> torch.fx.Graph:
    """The body of a recorded loop."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with torch.no_grad(), recording_program(record_loop), mode:
        graph = make_fx(
            lambda x: while_loop(lambda x: x.sum() < 1, update, x, limit=9, every=every), _allow_non_fake_inputs=True
        )(mode.from_tensor(torch.zeros(4, 4)))
    (loop,) = (n for n in graph.graph.nodes if "while_loop" in str(n.target) and n.op == "call_function")
    body: torch.fx.Graph = getattr(graph, loop.args[1].target).graph
    return body


def test_a_program_makes_so_many_updates_between_two_looks() -> None:
    for every in (1, 3):
        assert body_of(torch.sin, every).count("aten.sin.default") == every


def test_what_is_written_to_in_place_stays_in_a_loop() -> None:
    """It is no constant, though it is made of constants."""

    def update(x: Tensor) -> Tensor:
        mask = torch.zeros(4, 4)
        mask[0, 1] = 1.0
        return x.sin() + mask @ torch.ones(4, 4)

    assert "aten.mm.default" in body_of(update)


@pytest.mark.parametrize("use", [lambda t: t.tolist()[0], lambda t: t.numpy()[0].item(), lambda t: sum(float(v) for v in [t])])
def test_numbers_of_a_captured_tensor_are_not_baked_in(use: Callable[[Tensor], float]) -> None:
    captured = torch.ones(1)
    with pytest.raises(CompilationError, match="Python reads"):
        fixed_point(lambda x: 0.1 * x + use(captured), torch.zeros(4, 3), driver=Compiled(strict=True))


@pytest.mark.parametrize("use", {
    "alpha": lambda x, c: torch.add(x, x, alpha=c), "index": lambda x, c: x[:, c].unsqueeze(1), "slice": lambda x, c: x[:, :c],
    "roll": lambda x, c: torch.roll(x, c, 1), "fill": lambda x, c: x * torch.full((3,), c),
    "new": lambda x, c: x * torch.tensor([c]),
    "split": lambda x, c: torch.tensor_split(x, c, dim=1)[0], "beta": lambda x, c: torch.nn.functional.softplus(x, c),
    "truth": lambda x, c: 2 * x if torch.is_nonzero(c) else x,
}.items(), ids=lambda item: item[0])  # fmt: skip
def test_nor_numbers_that_pytorch_reads_by_itself(use: tuple[str, Callable[[Tensor, Tensor], Tensor]]) -> None:
    captured = torch.tensor([1]) if use[0] == "split" else torch.tensor(1)
    with pytest.raises(CompilationError, match="read"):
        fixed_point(lambda x: 0.1 * x + 0.0 * use[1](x.detach(), captured).sum(), torch.zeros(4, 3), driver=Compiled(strict=True))


@pytest.mark.parametrize("name", ["cholesky", "inv"])
def test_what_raises_by_its_values_is_refused(name: str) -> None:
    eye, function = torch.eye(3), getattr(torch.linalg, name)
    with pytest.raises(CompilationError, match="_ex"):
        fixed_point(lambda x: 0.1 * x @ function(eye), torch.zeros(4, 3), driver=Compiled(strict=True))


def test_what_depends_on_constants_alone_leaves_a_loop_and_chance_stays() -> None:
    A = torch.ones(4, 4)
    body = body_of(lambda x: x.sin() + torch.eye(4) @ A @ A)
    assert "aten.sin.default" in body and "aten.mm.default" not in body
    assert "aten.sum.default" not in body_of(lambda x: x.sin() * (A * A).sum())
    assert recorded(lambda x: x * (2 * torch.ones(()) * 3)).find_nodes(op="placeholder")[2:] == []
    assert "aten.rand.default" in body_of(lambda x: x + torch.rand_like(A))
    assert "aten.rand.default" in body_of(lambda x: x + torch.rand(4, 4))


@pytest.mark.parametrize("square", [lambda y: y**2, lambda y: y.square(), lambda y: 0.5 * y * y])
def test_the_curvature_of_squares_leaves_a_loop(square: Callable[[Tensor], Tensor]) -> None:
    """Of ½‖A x‖², the whole matrix AᵀA, for which I is not multiplied with A first; the rest of a Hessian does not."""
    A = torch.ones(5, 4)

    def energy(x: Tensor) -> Tensor:
        return square(x @ A.mT).sum() + x.cosh().log().sum()

    def update(x: Tensor) -> Tensor:
        return x @ columns(linearize(lambda x: gradient_of_sum(energy, x), x[0], transposed=True), x[0])

    body = body_of(update)
    assert body.count("aten.mm.default") == 1 and "aten.eye.default" not in body and "aten.expm1.default" in body


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cosh", "sinh"])
def test_hyperbolic_functions_by_one_exponential(name: str, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype)
    ours, theirs = recorded_as()[getattr(torch.ops.aten, name).default], getattr(torch, name)
    largest = float(torch.tensor(limit.max, dtype=torch.float64).log())
    x = torch.cat([torch.linspace(-largest, largest, 100_001), torch.logspace(-40, 1, 1_001)]).to(dtype)[1:]
    x = torch.cat([x, torch.tensor([0.0, limit.tiny, limit.tiny * limit.eps, torch.inf, torch.nan], dtype=dtype)])
    x = torch.cat([x, -x])
    torch.testing.assert_close(ours(x), theirs(x), rtol=4 * limit.eps, atol=0, equal_nan=True)
    known = ~x.isnan()
    assert torch.equal(ours(x)[known].signbit(), theirs(x)[known].signbit())
    assert ours(x.half()) is NotImplemented


def test_log_cosh_and_its_derivatives_take_one_function() -> None:
    body = body_of(lambda x: x + gradient_of_sum(lambda x: x.cosh().log(), x))
    assert {"aten.cosh.default", "aten.sinh.default"}.isdisjoint(body) and "aten.expm1.default" in body


def columns_of(product: Callable[[Tensor, Tensor], Tensor], A: Tensor) -> list[str]:
    """The products and copies of a recorded program that takes the columns of a linear map."""
    with recording_program(record_loop):
        graph = make_fx(lambda x, A: columns(lambda v: product(v, A), x), recorded_as())(A[0], A).graph
    return [str(n.target)[5:-8] for n in graph.nodes if str(n.target) in ("aten.mm.default", "aten.clone.default")]


def test_the_product_of_all_unit_vectors_is_the_matrix() -> None:
    A = torch.ones(4, 4)
    assert columns_of(lambda v, A: v @ A, A) == ["clone"]
    assert columns_of(lambda v, A: torch.func.grad(lambda v: 0.5 * (v @ A).square().sum())(v), A) == ["clone", "mm"]
    assert columns_of(lambda v, A: 2 * v @ A, A) == ["mm"]
    assert columns_of(lambda v, A: v.flip(0) @ A, A) == ["mm"]
    assert columns_of(lambda v, A: v.mul_(2) @ A, A)[-1] == "mm"
    assert columns_of(lambda v, A: (v.view(2, 2) @ A[:2]).view(-1), A) == ["mm"]

    def one_by_one(v: Tensor, A: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(v):
            raise RuntimeError("not at once")
        return (v.view(2, 2) @ A[:2, :2]).view(-1)

    assert columns_of(one_by_one, A) == ["mm"] * 4
    assert columns_of(lambda v, A: torch.func.grad(lambda A: columns(lambda w: w @ A * v, v).sum())(A).sum(0), A)


def test_the_identity_of_an_energy_is_multiplied() -> None:
    """It may be written into; and where A has an element that is not finite, the product is not A."""
    assert "aten.mm.default" in body_of(lambda x: torch.eye(4) @ x)


@records
def test_the_columns_of_a_linear_map_are_written_into_and_not_its_matrix() -> None:
    A = torch.arange(12.0).view(3, 4)
    found = []
    for driver in (Eager(), Compiled(strict=True)):
        update = lambda x: 0.1 * x + columns(lambda v: v @ A, A[:, 0]).mul_(2).view(-1)  # noqa: E731
        found.append(fixed_point(update, torch.zeros(12), driver=driver).value)
    torch.testing.assert_close(*found)
    torch.testing.assert_close(A, torch.arange(12.0).view(3, 4), rtol=0, atol=0)


def test_what_is_dear_is_computed_once_for_all_rows() -> None:
    """Such as the bend of a potential, which Inductor would compute anew for each element of the Hessian."""

    def marked(function: Callable[..., Tensor]) -> list[str]:
        graph = make_fx(function)(torch.ones(40), torch.ones(40, 40)).graph
        dear_once(graph)
        return [str(n.target) for n in graph.nodes if n.meta.get("inductor_realize_to_strides")]

    assert marked(lambda x, A: A * (1 - x.tanh() ** 2)) == ["aten.rsub.Scalar"]
    assert marked(lambda x, A: A * x.cosh().unsqueeze(0).expand(40, 40)) == ["aten.cosh.default"]
    assert marked(lambda x, A: A * (2 * x) + x.exp().sum() * A) == []
    assert marked(lambda x, A: A[:5] * x.exp()) == []


def test_products_with_one_matrix_are_one_and_it_is_not_repeated() -> None:
    """What ``vmap`` makes of a product with a matrix that all samples share."""
    A = torch.ones(5, 4).mT @ torch.ones(5, 4)
    many = A.expand(4, 4, 4)
    for update in (lambda x: torch.bmm(x.unsqueeze(1), many).squeeze(1), lambda x: torch.bmm(many, x.unsqueeze(2)).squeeze(2)):
        body = recorded(update)
        names = [str(n.target) for n in body.nodes]
        assert "aten.mm.default" in names and "aten.bmm.default" not in names
        assert max(n.meta["val"].numel() for n in body.find_nodes(op="placeholder")) == 16


@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_with_one_matrix_is_that_of_as_many(rows: int) -> None:
    torch.manual_seed(0)
    own, shared = torch.randn(6, rows, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64).expand(6, 5, 4)
    product = recorded_as()[torch.ops.aten.bmm.default]
    torch.testing.assert_close(product(own, shared), torch.bmm(own, shared), rtol=1e-14, atol=1e-14)
    turned = product(shared.mT, own.mT)
    if rows == 1:
        torch.testing.assert_close(turned, torch.bmm(shared.mT, own.mT), rtol=1e-14, atol=1e-14)
    else:
        assert turned is NotImplemented
    assert product(own, shared.contiguous()) is NotImplemented

"""The energy of the forward is the energy of the backward: what a solve read is fixed, or seen to have changed."""

import argparse
import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compiling import records
from problems import TIGHT
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    FPI_NN,
    ChangedFunctionError,
    Energy,
    ImplicitAdjoint,
    LostGradientError,
    NeumannAdjoint,
    OneStepAdjoint,
    Picard,
    Solution,
    UnrolledAdjoint,
    fixed_point,
    implicit,
    minimize,
)
from energynet.constraints import NonNegative
from energynet.engine.shared_state import SharedState, Survey

F64 = torch.float64
X0 = torch.zeros(1, 2, dtype=F64)
KS = (1.0, 3.0, 9.0)


def pulled(x: Tensor, k: Any, z: Tensor) -> Tensor:
    """Its minimum is k z / (1 + k)."""
    return (k * (x - z) ** 2 + x**2).sum(-1)


def context() -> Tensor:
    return torch.ones(1, 2, dtype=F64, requires_grad=True)


def slopes(answers: list[Tensor], z: Tensor) -> list[float]:
    """dx/dz of each, to the first order by one backward after all solves."""
    return [torch.autograd.grad(x.sum(), z)[0][0, 0].item() for x in answers]


RIGHT = pytest.approx([k / (1 + k) for k in KS], rel=1e-9)


def solved(energy: Callable[..., Tensor], z: Tensor, **options: Any) -> Tensor:
    return minimize(energy, X0, z, termination=TIGHT, **options).value


# ------------------------------------------------------------------------------------------------- what is fixed

k = 0.0  # a global that energies read


def helper(x: Tensor, z: Tensor) -> Tensor:
    return pulled(x, k, z)


def by_a_helper(x: Tensor, z: Tensor) -> Tensor:
    return helper(x, z)


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Tensor:
        return function(*args)

    return wrapper


class ByMethod:
    def __init__(self, k: float) -> None:
        self.k = k

    def energy(self, x: Tensor, z: Tensor) -> Tensor:
        return pulled(x, self.k, z)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return pulled(x, self.k, z)


class ByModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.ks = 0.0, [0.0]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return pulled(x, self.k + self.ks[0], z)


@pytest.mark.parametrize("wrap", [
    lambda f: f,
    lambda f: lambda x, z: f(x, z),
    lambda f: functools.partial(f),
    lambda f: lambda x, z, f=f: f(x, z),
    lambda f: lambda x, z: sum(g(x, z) for g in [f]),
    lambda f: lambda x, z, fs=(f,): fs[0](x, z),
    decorated,
    lambda f: torch.func.vmap(lambda x, z: f(x[None], z[None])[0]),
    lambda f: torch.enable_grad()(f),
    lambda f: functools.reduce(lambda g, _: lambda x, z: g(x, z), range(5), f),
    staticmethod,
], ids=["lambda", "nested", "partial", "default", "comprehension", "tuple", "decorated", "vmapped", "PyTorch's wrapper", "deep",
        "staticmethod"])  # fmt: skip
def test_a_variable_bound_anew_after_the_solve(wrap: Callable[..., Any]) -> None:
    z, answers = context(), []
    for k in KS:
        inner = lambda x, z: pulled(x, k, z)  # noqa: E731, B023
        energy = wrap(inner)
        answers.append(solved(energy, z))
    assert slopes(answers, z) == RIGHT


@pytest.mark.parametrize("energy", [helper, by_a_helper, lambda x, z: pulled(x, k, z), lambda x, z: [helper(x, z)][0]])
def test_a_global_bound_anew_after_the_solve(energy: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    z, answers = context(), []
    for value in KS:
        monkeypatch.setitem(globals(), "k", value)
        answers.append(solved(energy, z))
    assert slopes(answers, z) == RIGHT


def test_attributes_of_what_is_the_energy_set_anew_after_the_solve() -> None:
    z, module, called = context(), ByModule(), ByMethod(0.0)
    for energy in (module, module.forward, called, functools.partial(module), nn.Sequential(module)[0]):
        answers = []
        for value in KS:
            module.k = called.k = value - 1
            module.ks[0] = 1.0
            called.k += 1
            answers.append(solved(energy, z))
        assert slopes(answers, z) == RIGHT


CHECKPOINTED = pytest.param(UnrolledAdjoint(checkpoint=True), marks=pytest.mark.slow)


@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), UnrolledAdjoint(), CHECKPOINTED])
def test_all_adjoints_and_higher_orders(adjoint: Any) -> None:
    z, answers = context(), []
    for k in KS:
        answers.append(solved(lambda x, z: pulled(x, k * z, z), z, step_size=0.09, solver=Picard(), adjoint=adjoint))  # noqa: B023
    # x = z k z / (1 + k z), at z = 1: x' = (2k + k²) / (1 + k)², x'' = 2k / (1 + k)³
    for k, x in zip(KS, answers, strict=True):
        (first,) = torch.autograd.grad(x.sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z)
        assert first[0, 0].item() == pytest.approx((2 * k + k**2) / (1 + k) ** 2, rel=1e-6)
        assert second[0, 0].item() == pytest.approx(2 * k / (1 + k) ** 3, rel=1e-5)


@pytest.mark.parametrize("adjoint", [OneStepAdjoint(), NeumannAdjoint(3)])
def test_inexact_adjoints_take_the_same_problem(adjoint: Any) -> None:
    z, answers, alone = context(), [], []
    for k in KS:
        energy = lambda x, z: pulled(x, k, z)  # noqa: E731, B023
        answers.append(solved(energy, z, step_size=0.09, solver=Picard(), adjoint=adjoint))
        alone += slopes([solved(energy, z, step_size=0.09, solver=Picard(), adjoint=adjoint)], z)
    assert slopes(answers, z) == alone


def test_maps_conditions_layers_and_a_prox() -> None:
    z = context()
    maps, conditions, networks, layers, proximal = [], [], [], [], []
    for k in KS:
        shrink = lambda x, z: (k * z + 0 * x) / (1 + k)  # noqa: E731, B023
        maps.append(fixed_point(shrink, X0, z).value)
        conditions.append(implicit(lambda z: k * z / (1 + k), lambda x, z: (1 + k) * x - k * z, symmetric=True)(z))  # noqa: B023
        networks.append(FPI_NN(shrink, start=X0)(z))
        layers.append(FPI_GD(lambda x, z: pulled(x, k, z), start=lambda z: k * X0, termination=TIGHT)(z))  # noqa: B023
        clamp = lambda x, step_size: x.clamp(max=k / (1 + k)) + 0 * k * step_size  # noqa: E731, B023
        proximal.append(solved(lambda x, z: ((x - z) ** 2).sum(-1), z, prox=clamp))
    for answers in (maps, conditions, networks, layers):
        assert slopes(answers, z) == RIGHT
    assert slopes(proximal, z) == [0.0] * 3  # at the bound; with the last one, 0.9, the first two would be inside of it
    for k, x in zip(KS, proximal, strict=True):
        assert x[0, 0].item() == pytest.approx(k / (1 + k))
    nonnegative = [solved(lambda x, z: pulled(x, k, z), z, prox=NonNegative()) for k in KS]  # noqa: B023
    assert slopes(nonnegative, z) == pytest.approx(list(RIGHT.expected), rel=1e-6)


def test_under_torch_func_after_the_variable_has_changed() -> None:
    z, pullbacks = context().detach(), []
    for k in KS:
        pullbacks.append(torch.func.vjp(lambda z: solved(lambda x, z: pulled(x, k, z), z), z)[1])  # noqa: B023
    assert [pull(torch.ones_like(z))[0][0, 0].item() for pull in pullbacks] == RIGHT
    rows = torch.func.vmap(lambda z: solved(lambda x, z: pulled(x, k, z), z))(torch.stack([z, 2 * z]))
    assert rows[1, 0, 0].item() == pytest.approx(2 * 0.9)
    jacobian = torch.func.jacrev(lambda z: solved(lambda x, z: pulled(x, k, z), z))(z)
    torch.testing.assert_close(jacobian.reshape(2, 2), 0.9 * torch.eye(2, dtype=F64))


def test_meta_gradients_over_tasks_as_in_imaml() -> None:
    """min_w ½‖X w − y‖² + ½ λ‖w − θ‖² for each task; the meta gradient by one backward after the loop."""
    generator = torch.Generator().manual_seed(0)
    options: Any = {"generator": generator, "dtype": F64}
    tasks = [(torch.randn(5, 3, **options), torch.randn(5, **options)) for _ in range(4)]
    theta = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    loss, each = torch.zeros((), dtype=F64), torch.zeros(1, 3, dtype=F64)
    for X, y in tasks:
        def energy(w: Tensor, theta: Tensor) -> Tensor:
            return 0.5 * (w @ X.T - y).square().sum(-1) + (w - theta).square().sum(-1)  # noqa: B023

        w = minimize(energy, torch.zeros(1, 3, dtype=F64), theta, termination=TIGHT).value
        loss = loss + (w @ X.T - y).square().sum()
        H = X.T @ X + 2 * torch.eye(3, dtype=F64)
        each = each + 2 * torch.linalg.solve(H, 2 * X.T @ (X @ w.detach()[0] - y))
    (meta,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(meta, each, rtol=1e-8, atol=1e-10)


def test_a_copied_and_a_pickled_layer() -> None:
    z, layer = context(), FPI_GD(ByModule(), start=X0, termination=TIGHT)
    answers = []
    for value in KS:
        layer.energy.k = value
        twin = copy.deepcopy(layer) if value == 1.0 else pickle.loads(pickle.dumps(layer))
        answers += [twin(z)]
    assert slopes(answers, z) == RIGHT


# ------------------------------------------------------------------------------------------------- what raises

SCALE = 1.0


class Settings:
    k = 1.0


@dataclasses.dataclass
class Options:
    k: float = 1.0
    unread: int = 0


class Slotted:
    __slots__ = ("k",)


class ReadsGlobals(nn.Module):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return pulled(x, SCALE, z)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.ones((), dtype=F64))

    def forward(self) -> Tensor:
        return self.k


def changes() -> dict[str, tuple[Callable[..., Tensor], Callable[[], Any], str]]:
    """An energy that reads 1.0, what changes that, and how the message calls it."""
    tensor, numbers, names = torch.ones((), dtype=F64), [1.0], {"k": 1.0}
    array, options, slotted, module, method = np.ones(1), Options(), Slotted(), Frozen(), ByMethod(1.0)
    slotted.k = 1.0
    held = ByModule()
    held.options = options
    held.forward = lambda x, z: pulled(x, held.options.k, z)  # type: ignore[method-assign]
    plain, arguments = Options(), argparse.Namespace(k=1.0)
    nested = {"inner": [tensor]}
    return {
        "tensor": (lambda x, z: pulled(x, tensor, z), lambda: tensor.fill_(9.0), r"tensor \(a tensor of shape \(\)\)"),
        "view": (lambda x, z: pulled(x, tensor, z), lambda: tensor.view(1).mul_(9.0), "tensor"),
        "list": (lambda x, z: pulled(x, numbers[0], z), lambda: numbers.__setitem__(0, 9.0), "numbers"),
        "dictionary": (lambda x, z: pulled(x, names["k"], z), lambda: names.update(k=9.0), "names"),
        "array": (lambda x, z: pulled(x, float(array[0]), z), lambda: array.fill(9.0), "array"),
        "nested": (lambda x, z: pulled(x, nested["inner"][0], z), lambda: tensor.fill_(9.0), r"nested\['inner'\]\[0\]"),
        "object": (lambda x, z: pulled(x, options.k, z), lambda: setattr(options, "k", 9.0), r"options\.k"),
        "a library's object": (lambda x, z: pulled(x, arguments.k, z), lambda: setattr(arguments, "k", 9.0), r"arguments\.k"),
        "object of a module": (held, lambda: setattr(options, "k", 9.0), r"options\.k"),
        "slot": (lambda x, z: pulled(x, slotted.k, z), lambda: setattr(slotted, "k", 9.0), r"slotted\.k"),
        "class": (lambda x, z: pulled(x, Settings.k, z), lambda: setattr(Settings, "k", 9.0), r"Settings\.k"),
        "method": (method.energy, lambda: setattr(method, "k", 9.0), ""),
        "buffer of a captured module": (lambda x, z: pulled(x, module(), z), lambda: module.k.fill_(9.0), r"module\.k"),
        "attribute of a captured module": (lambda x, z: pulled(x, held.k + 1, z), lambda: setattr(held, "k", 8.0), r"held\.k"),
        "global of a method": (ReadsGlobals(), lambda: globals().__setitem__("SCALE", 9.0), "SCALE"),
        "unbound method": (functools.partial(ByMethod.energy, plain), lambda: setattr(plain, "k", 9.0), r"\.k"),
        "list in a partial": (functools.partial(lambda k, x, z: pulled(x, k[0], z), numbers), lambda: numbers.insert(0, 9.0), ""),
    }


@pytest.mark.parametrize("what", changes())
def test_what_cannot_be_fixed_raises_and_is_named(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "k", 1.0)
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    energy, change, name = changes()[what]
    z = context()
    x, y = solved(energy, z), solved(energy, z)
    assert slopes([x], z) == pytest.approx([0.5])
    change()
    if not name:
        assert slopes([y], z) == pytest.approx([0.5])  # it was copied
        return
    with pytest.raises(ChangedFunctionError, match=f"{name}.*changed after the solve"):
        torch.autograd.grad(y.sum(), z)
    assert slopes([solved(energy, z)], z) == pytest.approx([0.9])  # another solve is of the problem as it is now


def test_a_change_between_two_orders_raises() -> None:
    z, scale = context(), [1.0]
    x = solved(lambda x, z: pulled(x, scale[0] * z, z), z)
    (slope,) = torch.autograd.grad(x.sum(), z, create_graph=True)
    scale[0] = 9.0
    with pytest.raises(ChangedFunctionError, match="scale"):
        torch.autograd.grad(slope.sum(), z)


def test_a_change_is_seen_by_a_checkpoint_and_forward_mode() -> None:
    z, scale = context(), torch.ones((), dtype=F64)
    x = solved(lambda x, z: pulled(x, scale, z), z, step_size=0.2, adjoint=UnrolledAdjoint(checkpoint=True), solver=Picard())
    scale.fill_(9.0)
    with pytest.raises(ChangedFunctionError, match="scale"):
        torch.autograd.grad(x.sum(), z)


def test_a_parameter_changed_in_place_is_told_by_autograd() -> None:
    z, energy = context(), Frozen()
    energy.forward = lambda x, z: pulled(x, energy.k, z)  # type: ignore[method-assign]
    x = solved(lambda x, z, m=energy: pulled(x, m.k, z), z)
    with torch.no_grad():
        energy.k.fill_(9.0)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(x.sum(), z)


def test_what_is_not_read_may_change() -> None:
    z, options, unread, step = context(), Options(), [1], 0
    x = solved(lambda x, z: pulled(x, options.k, z), z)
    options.unread, step = 5, 7
    unread.append(step)
    assert slopes([x], z) == pytest.approx([0.5])
    with torch.no_grad():
        assert isinstance(minimize(lambda x: pulled(x, 1.0, z), X0), Solution)


def test_logs_counters_and_caches_of_the_energy_itself_raise_no_alarm() -> None:
    z, log, cache, counts, times = context(), [], {}, Options(), 0

    def energy(x: Tensor, z: Tensor) -> Tensor:
        nonlocal times
        times += 1
        counts.unread += 1
        cache.setdefault("k", 1.0)
        value = pulled(x, cache["k"], z)
        log.append(value.detach())
        return value

    x = solved(energy, z)
    before = times
    assert len(log) == counts.unread == times > 0
    (slope,) = torch.autograd.grad(x.sum(), z, create_graph=True)
    assert times > before
    log.clear()
    assert slope[0, 0].item() == pytest.approx(0.5) and torch.autograd.grad(slope.sum(), z)[0].abs().max() < 1e-9


calls = 0


def test_a_global_counter_raises_no_alarm() -> None:
    def energy(x: Tensor, z: Tensor) -> Tensor:
        global calls
        calls += 1
        return pulled(x, 1.0, z)

    z = context()
    assert slopes([solved(energy, z)], z) == pytest.approx([0.5]) and calls > 2


def test_a_module_that_logs_and_an_encoder_that_keeps_something() -> None:
    class Logs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log: list[Tensor] = []

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            value = pulled(x, 1.0, z)
            self.log.append(value.detach())
            self.last = value
            return value

    class Keeps(Energy):
        def encode(self, z: Tensor) -> Tensor:
            self.last = z.detach() * 1
            return z

        def evaluate(self, x: Tensor, z: Tensor) -> Tensor:
            return pulled(x, 1.0, z)

    z = context()
    for energy in (Logs(), Keeps()):
        assert slopes([solved(energy, z), solved(energy, z)], z) == pytest.approx([0.5, 0.5])


# ------------------------------------------------------------------------------------------------- stale graphs, constants


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=F64))
        self.late = False

    def forward(self, x: Tensor) -> Tensor:
        self.last = (x - self.w).square().sum(-1)
        return self.last


def test_a_stale_graph_on_an_attribute_is_no_input() -> None:
    energy = Remembers()
    energy(X0).sum().backward()
    energy.other = energy.last  # that the energy neither reads nor sets
    energy.w.grad = None
    for _ in range(2):
        minimize(energy, X0, termination=TIGHT).value.sum().backward()
    torch.testing.assert_close(energy.w.grad, torch.full((2,), 2.0, dtype=F64))
    energy.last = 2 * energy.w  # one with a graph that is read is an input still
    energy.forward = functools.partial(lambda self, x: (x - self.last).square().sum(-1), energy)  # type: ignore[method-assign]


def test_an_attribute_with_a_graph_that_is_used_only_later_raises() -> None:
    class Later(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x.detach() > 0.5).any()):
                return (x - 1).square().sum(-1) + (x - self.weight).square().sum(-1)
            return (x - 1).square().sum(-1)

    energy = Later()
    energy.weight = 2 * torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(LostGradientError, match="did not use it at x0"):
        minimize(energy, X0, step_size=0.4)


def test_shapes_comparisons_and_detached_values_of_a_capture_lose_nothing() -> None:
    w = torch.ones(2, dtype=F64, requires_grad=True)
    energies = [
        lambda x: (x - w.detach()).square().sum(-1),
        lambda x: (x - torch.ones(w.shape, dtype=w.dtype)).square().sum(-1),
        lambda x: (x - (w > 0).to(x.dtype)).square().sum(-1),
        lambda x: (x - torch.ones_like(w) * w.size(0) / w.numel()).square().sum(-1),
    ]
    for energy in energies:
        torch.testing.assert_close(minimize(energy, X0).value, torch.ones_like(X0))
    for energy in (lambda x: (x - w - 0 * w.detach()).square().sum(-1), lambda x: (w.shape[0] * x - w).square().sum(-1),
                   lambda x: (x - torch.zeros_like(x).copy_(w.expand_as(x))).square().sum(-1)):  # fmt: skip
        with pytest.raises(LostGradientError):
            minimize(energy, X0)
    torch.func.grad(lambda w: minimize(lambda x: (x - torch.ones(w.shape, dtype=F64)).square().sum(-1), X0).value.sum())(W)
    with pytest.raises(LostGradientError):
        torch.func.grad(lambda w: minimize(lambda x: (x - w.detach() - w).square().sum(-1), X0).value.sum())(W)


W = torch.ones(2, dtype=F64)


# ------------------------------------------------------------------------------------------------- torch.compile and scripts


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=F64))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return pulled(x, self.w, z)


def _in_place(module: Weighted) -> Any:
    module.compile()
    return module


def _forward(module: Weighted) -> Any:
    module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
    return module


COMPILED = {
    "module": torch.compile,
    "in place": _in_place,
    "its forward": _forward,
    "bound method": lambda m: torch.compile(m.forward),
    "twice": lambda m: torch.compile(torch.compile(m)),
    "in a module": lambda m: nn.Sequential(torch.compile(m))[0],
    "partial": lambda m: functools.partial(torch.compile(m)),
    "disabled": torch.compiler.disable,
}


@pytest.mark.parametrize("how", COMPILED)
def test_what_torch_compile_has_wrapped_is_unwrapped(how: str) -> None:
    module, z = Weighted(), context()
    x = solved(COMPILED[how](module), z)
    got = torch.autograd.grad(x.sum(), (z, module.w))
    for g, value in zip(got, (0.5, 0.25), strict=True):  # x = w z / (1 + w)
        torch.testing.assert_close(g, torch.full_like(g, value))


def test_functions_that_torch_compile_has_wrapped_are_unwrapped() -> None:
    z, answers = context(), []
    for k in KS:
        inner = torch.compile(lambda x, z: pulled(x, k, z))  # noqa: B023
        answers.append(solved(inner if k == 1 else lambda x, z, f=inner: f(x, z), z))
    assert slopes(answers, z) == RIGHT


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_functions_are_refused_also_where_they_are_captured() -> None:
    scripted = torch.jit.script(_scripted)
    for energy in (scripted, lambda x: scripted(x), functools.partial(scripted)):
        with pytest.raises(TypeError, match=r"_scripted is scripted.*Pass the function that was passed to torch.jit.script"):
            minimize(energy, X0)


def _scripted(x: Tensor) -> Tensor:
    return x.square().sum(-1)


# ------------------------------------------------------------------------------------------------- the walk itself


def test_a_survey_does_not_descend_into_libraries_or_large_data() -> None:
    data = list(range(100_000))
    survey = Survey(lambda x: torch.nn.functional.relu(x) + np.float64(1.0) + functools.reduce(max, data))
    assert [name for name, _, _ in survey.found] == ["data"]
    state = SharedState.of(survey)
    data[-1] = 0
    assert [read.name for read in state.reads if read.changed()] == ["data"]


def test_functions_that_refer_to_themselves_and_to_one_another() -> None:
    z, answers = context(), []
    for k in KS:
        def even(n: int, x: Tensor, z: Tensor) -> Tensor:
            return pulled(x, k, z) if n == 0 else odd(n - 1, x, z)  # noqa: B023

        def odd(n: int, x: Tensor, z: Tensor) -> Tensor:
            return even(n - 1, x, z)

        answers.append(solved(lambda x, z: even(4, x, z), z))
    assert slopes(answers, z) == RIGHT


# ------------------------------------------------------------------------------------------------- compiled


@records
def test_compiled_solves_are_of_the_energy_of_their_time() -> None:
    from energynet import Compiled

    driver, z, answers = Compiled(strict=True), context(), []
    options: dict[str, Any] = {"driver": driver, "step_size": 0.09, "solver": Picard()}
    for k in KS[1:]:
        answers.append(solved(lambda x, z: pulled(x, k, z), z, **options))  # noqa: B023
    assert slopes(answers, z) == pytest.approx([k / (1 + k) for k in KS[1:]])

    scale, before = torch.ones((), dtype=F64), driver.compilations
    energy = lambda x, z: pulled(x, scale, z)  # noqa: E731
    x = solved(energy, z, **options)
    scale.fill_(9.0)
    with pytest.raises(ChangedFunctionError, match="scale"):
        torch.autograd.grad(x.sum(), z)
    for value in KS:
        scale.fill_(value)
        assert slopes([solved(energy, z, **options)], z) == pytest.approx([value / (1 + value)])
    assert driver.compilations == before + 2  # forward and backward: values of tensors compile nothing anew

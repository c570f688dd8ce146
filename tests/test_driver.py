"""The compiled driver: the results of the eager one, and no second compilation."""

import copy
import pickle
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import TIGHT, LogCosh, some_context
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    LBFGS,
    Anderson,
    Broyden,
    CompilationError,
    Compiled,
    Eager,
    Nesterov,
    NewtonCG,
    Picard,
    Solver,
    Status,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet.fingerprint import Fingerprint

COMPILES = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # PyTorch's, about itself
]


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    for mark in COMPILES:
        test = mark(test)
    return test


SCALE = 1.0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.factor = 3.0

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return SCALE * self.weight * (x - self.factor * z).square().sum(-1)


def test_a_fingerprint_sees_what_the_code_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = Scaled()
    before = Fingerprint(energy, [energy.weight]).key
    assert Fingerprint(copy.deepcopy(energy)).key != before  # its weight is no input
    assert Fingerprint(energy, [energy.weight]).key == before
    energy.factor = 4.0
    assert Fingerprint(energy, [energy.weight]).key != before
    energy.factor = 3.0
    assert Fingerprint(energy.eval(), [energy.weight]).key != before
    assert Fingerprint(energy.train(), [energy.weight]).key == before
    monkeypatch.setattr("test_driver.SCALE", 2.0)
    assert Fingerprint(energy, [energy.weight]).key != before


def test_functions_made_anew_are_the_same_and_their_closures_count() -> None:
    def make(a: float, t: Tensor) -> object:
        return lambda x: a * x + t

    t = torch.ones(2)
    assert Fingerprint(make(1.0, t)).key == Fingerprint(make(1.0, t)).key
    assert Fingerprint(make(1.0, t)).key != Fingerprint(make(2.0, t)).key
    assert Fingerprint(make(1.0, t)).key != Fingerprint(make(1.0, t.clone())).key
    assert Fingerprint(make(1.0, t)).met[0] is t


def choosy(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).square().sum(-1) if x.sum() < 1e9 else x.sum(-1)


def test_what_cannot_be_compiled_is_told_once_or_raised() -> None:
    z, driver = torch.ones(2, 3), Compiled()
    with pytest.warns(UserWarning, match="could not be compiled.*torch.where.*Python runs the loop"):
        x = minimize(choosy, torch.zeros(2, 3), z, driver=driver).value
    torch.testing.assert_close(x, z, rtol=0, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimize(choosy, torch.zeros(2, 3), z, driver=driver)
    with pytest.raises(CompilationError, match=r"could not be compiled.*driver=Eager\(\)"):
        minimize(choosy, torch.zeros(2, 3), z, driver=Compiled(strict=True))
    assert driver.compilations == 0


def test_a_copy_has_the_options_and_none_of_the_programs() -> None:
    driver = Compiled(strict=True, capacity=7)
    for other in (copy.deepcopy(driver), pickle.loads(pickle.dumps(driver))):
        assert repr(other) == repr(driver) == "Compiled(strict=True, capacity=7)"
    with pytest.raises(ValueError, match="capacity ≥ 1, got 0"):
        Compiled(capacity=0)


@compiles
def test_every_order_and_jacrev_as_eager_and_compiled_once() -> None:
    energy, z, driver = LogCosh(), some_context(3, requires_grad=True), Compiled(strict=True)
    found = []
    for each in (Eager(), driver, driver):
        layer = FPI_GD(energy, energy.step_size, start=energy.start, termination=TIGHT, driver=each)
        x = layer(z)
        wanted = [z, *layer.parameters()]
        first = torch.autograd.grad(x.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        found.append([x, *first, *second, torch.func.jacrev(layer)(z.detach())])
        if each is driver and len(found) == 2:
            compilations = driver.compilations
    assert driver.compilations == compilations > 0
    for expected, got, again in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(got, again)


@compiles
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Nesterov(), LBFGS(), NewtonCG()], ids=repr)
def test_each_solver_as_eager(solver: Solver) -> None:
    energy, z = LogCosh(), some_context(3)
    x0 = energy.start(z)
    expected = minimize(energy, x0, z, solver=solver, termination=TIGHT)
    got = minimize(energy, x0, z, solver=solver, termination=TIGHT, driver=Compiled(strict=True))
    torch.testing.assert_close(got.value, expected.value, rtol=0, atol=1e-10)
    assert (got.num_steps - expected.num_steps).abs().max() <= 2


@compiles
def test_new_values_are_used_and_a_changed_attribute_compiles_anew() -> None:
    energy, z, driver = Scaled(), torch.ones(2, 3, dtype=torch.float64), Compiled(strict=True)

    def solve() -> Tensor:
        value: Tensor = minimize(energy, torch.zeros_like(z), z, step_size=0.1, solver=Picard(), driver=driver).value
        return value

    torch.testing.assert_close(solve(), 3 * z)
    with torch.no_grad():
        z.mul_(2)
        energy.weight.mul_(1.5)
    torch.testing.assert_close(solve(), 3 * z)
    assert driver.compilations == 1
    energy.factor = -1.0
    torch.testing.assert_close(solve(), -z)
    assert driver.compilations == 2


@compiles
def test_pytrees_failed_samples_and_captured_tensors() -> None:
    shift = torch.full((2,), 0.5)

    def step(x: dict[str, Tensor], z: Tensor) -> dict[str, Tensor]:
        return {"a": 0.5 * x["a"] + z, "b": 0.5 * x["b"] + shift}

    x0 = {"a": torch.zeros(3, 1), "b": torch.zeros(3, 2)}
    z = torch.tensor([[1.0], [torch.nan], [2.0]])
    options: dict[str, Any] = {"termination": Termination(max_steps=60), "on_failure": "ignore"}
    expected = fixed_point(step, x0, z, **options)
    got = fixed_point(step, x0, z, **options, driver=Compiled(strict=True))
    assert got.status.tolist() == expected.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert got.num_steps.tolist() == expected.num_steps.tolist()
    for name in x0:
        torch.testing.assert_close(got.value[name], expected.value[name], equal_nan=True)


def test_unrolled_gradients_and_traces_are_run_by_python() -> None:
    z, driver = torch.ones(2, 1, requires_grad=True), Compiled(strict=True)
    x = fixed_point(lambda x, z: 0.5 * x + z, torch.zeros(2, 1), z, adjoint=UnrolledAdjoint(), driver=driver).value
    torch.testing.assert_close(torch.autograd.grad(x.sum(), z)[0], torch.full((2, 1), 2.0), rtol=0, atol=1e-2)
    assert fixed_point(lambda x: 0.5 * x, torch.ones(2, 1), trace=True, driver=driver).trace is not None
    assert driver.compilations == 0

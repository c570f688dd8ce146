"""One program for every size of a batch. Here the record of a program is run as it is, since Inductor takes a minute for each."""

import logging
from typing import Any

import pytest
import torch
from problems import TIGHT
from torch import Tensor, fx

from energynet import (
    LBFGS,
    Anderson,
    Compiled,
    Eager,
    ImplicitAdjoint,
    Newton,
    Picard,
    Solver,
    minimize,
)
from energynet.linear import Dense

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Interpreted(fx.Interpreter):
    """Runs a recorded program with its loops."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if str(target) != "while_loop":
            return super().call_function(target, args, kwargs)
        test, body, carry, fixed = (*map(Interpreted, args[:2]), list(args[2]), args[3])
        while test.run(*carry, *fixed):
            carry = list(body.run(*carry, *fixed))
        return carry


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(graph: fx.GraphModule, inputs: Any, options: Any, parts: int) -> Any:
        return lambda tensors: Interpreted(graph).run(*tensors)

    monkeypatch.setattr("energynet._program._compiled", compiled)


def energy(x: Tensor, z: Tensor) -> Tensor:  # (B, 3), (B, 3) -> (B,)
    return 0.5 * (x - z).square().sum(-1) + x.cosh().log().sum(-1)


@pytest.mark.parametrize("solver", [Picard(), LBFGS(), Newton(), Anderson()], ids=repr)
def test_a_changed_batch_compiles_once_more(solver: Solver, caplog: pytest.LogCaptureFixture) -> None:
    driver, data = Compiled(strict=True), torch.randn(30, 3, dtype=torch.float64)
    step_size = 0.4 if isinstance(solver, Picard | Anderson) else None
    found = []
    for begin, end, programs in ((0, 3, 1), (0, 5, 2), (0, 7, 2), (3, 7, 2), (11, 30, 2)):  # parts of larger tensors too
        z = data[begin:end]
        x = minimize(energy, torch.zeros_like(z), z, solver=solver, step_size=step_size, termination=TIGHT, driver=driver).value
        found.append(x)
        assert driver.compilations == programs, (begin, end)
    every = minimize(energy, torch.zeros_like(data), data, solver=solver, step_size=step_size, termination=TIGHT, driver=Eager())
    torch.testing.assert_close(found[2], every.value[:7], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[4], every.value[11:], rtol=0, atol=1e-9)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_so_does_a_gradient_by_a_dense_matrix() -> None:
    driver, data = Compiled(strict=True), torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    for size, programs in ((3, 2), (5, 4), (9, 4)):
        found = []
        for each in (Eager(), driver):
            x = minimize(energy, torch.zeros(size, 3, dtype=torch.float64), data[:size], solver=Picard(), step_size=0.4,
                         termination=TIGHT, driver=each, adjoint=ImplicitAdjoint(Dense())).value  # fmt: skip
            found.append(torch.autograd.grad(x.square().sum(), data)[0])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        assert driver.compilations == programs

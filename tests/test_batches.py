"""One program for every size of a batch. Here the record of a program is run as it is, since Inductor takes a minute for each."""

import logging
import re
import sys

import pytest
import torch
from problems import TIGHT
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    LBFGS,
    AdjointReport,
    Anderson,
    Compiled,
    Eager,
    ImplicitAdjoint,
    Newton,
    Picard,
    Solver,
    WarmStart,
    minimize,
)
from energynet.linear import Dense

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("interpreted"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


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


def test_a_batch_with_other_strides_compiles_once_more() -> None:
    driver, options = Compiled(strict=True), {"solver": Picard(), "step_size": 0.3}

    def total(x: Tensor, *zs: Tensor) -> Tensor:
        return torch.stack([energy(x, z) for z in zs]).mean(0)

    def contexts(n: int) -> list[Tensor]:
        """Every other row, every other column, turned, one row for all, and a part from within."""
        return [torch.randn(2 * n, 3)[::2], torch.randn(n, 6)[:, ::2], torch.randn(3, n).mT, torch.randn(1, 3).expand(n, 3),
                torch.randn(n, 2, 3).mT[..., 0]]  # fmt: skip

    for size, programs in ((3, 1), (5, 2), (7, 2), (6, 2)):
        zs = contexts(size)
        x = minimize(total, torch.zeros(size, 3), *zs, driver=driver, **options).value
        torch.testing.assert_close(x, minimize(total, torch.zeros(size, 3), *zs, **options).value)
        assert driver.compilations == programs, size
    nothing = torch.zeros(0, 3)
    assert minimize(total, nothing, *[nothing] * 5, driver=driver, **options).value.shape == (0, 3)
    assert driver.compilations == 2


def test_a_captured_part_of_a_tensor_is_known_by_its_memory() -> None:
    scale, driver = torch.full((1,), 2.0).expand(3), Compiled(strict=True)
    for expected in (2.0, 3.0):
        scale[0] = expected
        found = minimize(lambda x: 0.5 * (x - scale).square().sum(-1), torch.zeros(2, 3), driver=driver).value
        torch.testing.assert_close(found, torch.full((2, 3), expected))
    assert driver.compilations == 1


class Model(nn.Module):
    """Owns the layer that solves its energy, and what is kept of the solves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.report, self.cache, self.calls, self.rate = AdjointReport(), WarmStart(), 0, 1.0
        self.layer = FPI_GD(self.energy, 0.4, start=torch.zeros_like, driver=Compiled(strict=True),
                            adjoint=ImplicitAdjoint(report=self.report))  # fmt: skip

    def energy(self, x: Tensor, z: Tensor) -> Tensor:
        return energy(x, self.rate * z @ self.weight)


layer = Model()
"""By the name of an attribute that the energy's code mentions."""


def test_unrelated_attributes_of_a_model_do_not_recompile() -> None:
    z, index = torch.ones(4, 3), [0, 1, 2, 3]
    for _ in range(3):
        solution = layer.layer.solve(z, x0=layer.cache.start(index, torch.zeros(4, 3)))
        layer.cache.store(index, solution)
        solution.value.sum().backward()
        assert layer.layer.driver.compilations == 2
    assert len(layer.report.records) == 3


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 3), 1.0

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return energy(x, self.seen * self.layer(z))


seen: list[int] = []


def test_an_attribute_by_the_name_of_a_global_is_not_that_global() -> None:
    global layer
    layer, before = FPI_GD(Named(), 0.4, start=torch.zeros_like, driver=Compiled(strict=True)), layer  # type: ignore[assignment]
    for _ in range(3):
        layer(torch.ones(4, 3))
        seen.append(1)
        assert layer.driver.compilations == 1  # type: ignore[union-attr]
    layer = before


def test_repeated_compilation_warns_and_names_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("energynet.compiled.cache.MANY", 2)
    model = Model()
    for _ in range(2):
        model.layer(torch.ones(4, 3))
        model.rate += 1.0
    with pytest.warns(UserWarning, match=r"Model.energy reads has changed 2 times.*Model.rate: 2.0 → 3.0"):
        model.layer(torch.ones(4, 3))
    model.rate += 1.0
    model.layer(torch.ones(4, 3))  # it is said once


def test_state_that_the_energy_does_not_read_does_not_recompile() -> None:
    model = Model()
    for _ in range(3):
        model.layer(torch.ones(4, 3))
        model.calls += 1
        assert model.layer.driver.compilations == 1


def test_a_long_compilation_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("energynet.compiled.announce.PATIENCE", 0.0)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)  # noqa: B023
        Compiled().clear()
        model = Model()
        model.layer(torch.ones(4, 3))
        model.rate = 5.0
        model.layer(torch.ones(4, 3))
        told = capsys.readouterr().err.splitlines()
        assert bool(told) == terminal
    assert re.match(r"energynet: compiling the solve of Model.energy by \w+\(.*\) for x of shape \(4, 3\)", told[0])
    assert "the last time it took" in told[1] and told[1].endswith("What it reads has changed: Model.rate: 1.0 → 5.0.")


def test_a_gradient_by_a_dense_matrix_compiles_once_more() -> None:
    driver, data = Compiled(strict=True), torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    for size, programs in ((3, 2), (5, 4), (9, 4)):
        found = []
        for each in (Eager(), driver):
            x = minimize(energy, torch.zeros(size, 3, dtype=torch.float64), data[:size], solver=Picard(), step_size=0.4,
                         termination=TIGHT, driver=each, adjoint=ImplicitAdjoint(Dense())).value  # fmt: skip
            found.append(torch.autograd.grad(x.square().sum(), data)[0])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        assert driver.compilations == programs

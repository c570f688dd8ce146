"""A batch in parts gives what the whole gives, and is not divided where a part cannot stand alone."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from compiling import COMPILER, compiles, compiles_thoroughly
from torch import Tensor, nn

from energynet import Compiled, Driver, Eager, Energy, NewtonCG, Picard, Status, Termination, minimize
from energynet.compiled.cache import Failure, Programs
from energynet.compiled.cpu_parts import in_parts
from energynet.compiled.partition import how_many

TIGHT = Termination(rtol=1e-11, atol=1e-12)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Curved(Energy):
    """½‖x − z‖² + Σ log cosh(x Wᵀ + b), with as many rows in W as there are samples."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W = nn.Parameter(torch.randn(m, n, dtype=torch.float64, generator=generator) / n)
        self.b = nn.Parameter(torch.randn(m, dtype=torch.float64, generator=generator))

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (x - z).square().sum(-1) + torch.log(torch.cosh(x @ self.W.T + self.b)).sum(-1)


def context(size: int, n: int) -> Tensor:
    return torch.randn(size, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def derivatives(energy: Energy, z: Tensor, order: int, **options: Any) -> list[Tensor]:
    z = z.clone().requires_grad_()
    x = minimize(energy, torch.zeros_like(z), z, termination=TIGHT, **options).value
    first = torch.autograd.grad(x.square().sum(), [z, *energy.parameters()], create_graph=order > 1)
    if order == 1:
        return [x.detach(), *first]
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [z, *energy.parameters()])
    return [x.detach(), *(t.detach() for t in (*first, *second))]


@COMPILER
@pytest.mark.parametrize("order", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.thorough)])
@pytest.mark.usefixtures("two_threads")
def test_values_and_derivatives_of_every_order_as_of_the_whole_batch(order: int) -> None:
    size, n = 128, 40
    energy, z, driver = Curved(n, size), context(size, n), Compiled(strict=True)
    expected = derivatives(energy, z, order, step_size=0.7, driver=Eager())
    got = derivatives(energy, z, order, step_size=0.7, driver=driver)
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)
    before = driver.compilations
    assert {key[3] for key in driver._programs._exact.values} == {2}  # every program was one of two parts
    for e, g in zip(expected, derivatives(energy, z, order, step_size=0.7, driver=driver), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)
    assert driver.compilations == before


@compiles
@pytest.mark.usefixtures("two_threads")
def test_steps_failures_and_other_sizes_of_the_batch() -> None:
    driver, energy = Compiled(strict=True), lambda x, z, a: (0.5 * a * (x - z).square()).sum(-1)
    for size, programs in ((128, 1), (192, 2), (256, 2), (512, 2)):
        z, a = context(size, 64), torch.linspace(0.1, 1.0, size, dtype=torch.float64).unsqueeze(1)
        z[3, 5], z[-1, 0] = torch.nan, torch.inf
        options: dict[str, Any] = {"step_size": 1.0, "solver": Picard(), "on_failure": "ignore"}
        expected = minimize(energy, torch.zeros_like(z), z, a, **options)
        got = minimize(energy, torch.zeros_like(z), z, a, **options, driver=driver)
        assert torch.equal(got.status, expected.status) and got.status[3] == got.status[-1] == Status.NONFINITE
        assert torch.equal(got.num_steps, expected.num_steps)
        torch.testing.assert_close(got.value, expected.value, equal_nan=True)
        assert driver.compilations == programs


@compiles_thoroughly
@pytest.mark.usefixtures("two_threads")
def test_problems_of_a_vmap_are_divided_as_well() -> None:
    z, weight, driver = context(64, 64), torch.linspace(0.5, 1.0, 64, dtype=torch.float64), Compiled(strict=True)

    def solve(z: Tensor, weight: Tensor, driver: Driver) -> Tensor:
        energy: Callable[..., Tensor] = lambda x, z, w: (w * torch.cosh(x - z)).sum()  # noqa: E731
        options: dict[str, Any] = {"termination": TIGHT, "solver": NewtonCG(), "driver": driver}
        value: Tensor = minimize(energy, torch.zeros_like(z), z, weight, **options).value
        return value

    def loss(weight: Tensor, driver: Driver) -> Tensor:
        return torch.func.vmap(lambda z: solve(z, weight, driver))(z).square().sum()

    found = [torch.func.grad(loss)(weight, each) for each in (Eager(), driver)]
    assert {key[3] for key in driver._programs._exact.values} == {2}
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.func.vmap(lambda z: solve(z, weight, driver))(z), z, rtol=0, atol=1e-9)


@compiles
@pytest.mark.usefixtures("two_threads")
def test_a_context_of_one_row_a_sample_may_become_shared() -> None:
    driver, z = Compiled(strict=True), torch.randn(2048, 3, dtype=torch.float64)
    options: dict[str, Any] = {"step_size": 0.5, "solver": Picard(), "termination": Termination(rtol=1e-10)}

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (x - z).square().sum(-1) + x.cosh().log().sum(-1)

    for given in (z, z[:1], z[0], z):
        x = minimize(energy, torch.zeros_like(z), given, driver=driver, **options).value
        torch.testing.assert_close(x, minimize(energy, torch.zeros_like(z), given, **options).value, rtol=0, atol=1e-12)


def divided(energy: Callable[..., Tensor], *inputs: Tensor, size: int = 128, n: int = 32) -> bool | None:
    """Whether the driver divides the batch; None: it asks nobody, since the batch is small."""
    driver, uncompiled = Compiled(), Failure(RuntimeError("Python runs the loop"))
    driver.clear()
    assert uncompiled.first_time()  # so that nobody warns
    options: dict[str, Any] = {"termination": Termination(max_steps=2), "on_failure": "ignore"}
    with mock.patch.object(Programs, "program", return_value=uncompiled):
        minimize(energy, torch.zeros(size, n), *inputs, driver=driver, **options)
    asked = list(driver._programs._own.values.values())
    return any(asked[0]) if asked else None


@pytest.mark.usefixtures("two_threads")
def test_what_cannot_stand_alone_is_not_divided() -> None:
    z = torch.randn(128, 32)
    square: Callable[[Tensor], Tensor] = lambda x: x.square().sum(-1)  # noqa: E731
    assert divided(lambda x, z: square(x - z), z)
    assert not divided(lambda x, z: square(x - (z - z.mean(0))), z)
    assert not divided(lambda x, z: square(x - (z - z.mean(0))), torch.zeros(128, 32))
    gate = torch.zeros(())  # lets nothing through, now
    assert not divided(lambda x, z, gate: square(x - gate * (z - z.mean(0))), z, gate)
    switch = torch.tensor(False)
    assert not divided(lambda x, z, switch: square(x - torch.where(switch, z - z.mean(0), z)), z, switch)
    assert not divided(lambda x, z: square(x - z - torch.relu(z.mean(0) - 10)), z)
    assert not divided(lambda x: square((x - 1).reshape(128, 32)))
    assert not divided(lambda x: square(x - z))  # from a closure
    assert divided(lambda x: square(x - 1))
    assert divided(lambda x, z: square(x - z), torch.randn(48, 32), size=48) is None


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("size", "n", "batch_dims", "count"), [
    (0, 64, 1, 1), (256, 64, 1, 2), (255, 64, 1, 1), (62, 999, 1, 1), (64, 63, 1, 1), (64, 64, 1, 2), (5000, 64, 0, 1),
    (65_536, 64, 1, 128), (4096, 4096, 1, 32), (300, 64, 1, 2),
])  # fmt: skip
def test_how_many_parts(size: int, n: int, batch_dims: int, count: int) -> None:
    assert how_many((torch.zeros(()).expand(size, n),), batch_dims) == count


def test_a_wrapper_of_another_form_is_refused() -> None:
    assert in_parts("anything", 1) == "anything"
    with pytest.raises(ValueError, match="another form"):
        in_parts("anything", 2)
    entry = "void inductor_entry_impl( {\npy::gil_scoped_release_simple release;\n"
    entry += "steal_from_raw_handles_to_raii_handles(input_handles, 3)\n"
    end = "output_handles[1] = buf;\n} // inductor_entry_impl\nnum_outputs=2,"
    found = in_parts(entry + end, 4)
    assert "PARTS = 4, INPUTS = 3, OUTPUTS = 2;" in found and "num_outputs=8," in found
    with pytest.raises(ValueError, match="integers are divided"):
        in_parts(entry + "auto tmp = remainder_integral(a, b);\n" + end, 4)

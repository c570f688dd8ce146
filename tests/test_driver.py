"""The compiled driver: the results of the eager one, and no second compilation."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import COMPILER, compiles, compiles_thoroughly, records
from problems import TIGHT, LogCosh, some_context
from test_fingerprint import Scaled, choosy
from torch import Tensor

from energynet import (
    FPI_GD,
    LBFGS,
    Anderson,
    Broyden,
    CompilationError,
    Compiled,
    Driver,
    Eager,
    GradientStep,
    LostGradientError,
    Nesterov,
    Newton,
    NewtonCG,
    Picard,
    Solver,
    Status,
    Step,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet.engine.binding import Binding
from energynet.engine.tasks import Task


def test_a_failed_compilation_warns_once_or_raises() -> None:
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


def test_copies_and_equal_drivers_share_their_programs() -> None:
    driver = Compiled(strict=True, capacity=7)
    for other in (copy.deepcopy(driver), pickle.loads(pickle.dumps(driver))):
        assert repr(other) == repr(driver) == "Compiled(strict=True, capacity=7, check_every=None)"
        assert other == driver and other._programs is driver._programs is not Compiled()._programs
    for wrong in ({"capacity": 0}, {"check_every": 0}):
        with pytest.raises(ValueError, match="Compiled needs a whole number"):
            Compiled(**wrong)


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


@compiles_thoroughly
def test_a_changed_batch_compiles_once_more_for_every_size() -> None:
    """As in `test_batches`, where the record is run, and in `test_partition`."""
    energy, driver = LogCosh(), Compiled(strict=True)
    layer = FPI_GD(energy, energy.step_size, start=energy.start, termination=TIGHT, driver=driver)
    for batch, programs in ((3, 2), (5, 4), (64, 4), (2, 4), (3, 4)):
        z = some_context(batch + 1)[1:].requires_grad_()  # a part of a larger tensor
        found = torch.autograd.grad(layer(z).square().sum(), [z, energy.A])
        eager = FPI_GD(energy, energy.step_size, start=energy.start, termination=TIGHT)
        expected = torch.autograd.grad(eager(z).square().sum(), [z, energy.A])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert driver.compilations == programs


@compiles
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Nesterov(), LBFGS()], ids=repr)
def test_each_solver_as_eager(solver: Solver) -> None:
    """`Newton` and `NewtonCG` are below."""
    z = some_context(3)

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (x - z).square().sum(-1) + (2 * x).cosh().log().sum(-1) + 0.2 * x.sum(-1).square()

    expected, got = (minimize(energy, torch.zeros_like(z), z, solver=solver, termination=TIGHT, driver=driver)
                     for driver in (Eager(), Compiled(strict=True)))  # fmt: skip
    torch.testing.assert_close(got.value, expected.value, rtol=0, atol=1e-10)
    assert (got.num_steps - expected.num_steps).abs().max() <= 2


@records
def test_check_every_changes_neither_solutions_nor_steps() -> None:
    energy, z = lambda x, z: 0.5 * (x - z).square().sum(-1) + x.cosh().log().sum(-1), some_context(5)
    found = []
    for every in (1, 3):
        driver = Compiled(strict=True, check_every=every)
        found.append(minimize(energy, torch.zeros_like(z), z, step_size=0.2, solver=Picard(), termination=TIGHT, driver=driver))
    torch.testing.assert_close(found[1].value, found[0].value, rtol=0, atol=1e-12)
    assert found[1].num_steps.tolist() == found[0].num_steps.tolist()


@records
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


def test_a_step_is_bound_once_until_something_that_it_reads_changes() -> None:
    energy, driver, shift = Scaled(), Compiled(), torch.zeros(())

    def around(x: Tensor, z: Tensor) -> Tensor:
        value: Tensor = energy(x, z) + shift
        return value

    first = driver.bind(GradientStep(around, 0.1))
    assert driver.bind(GradientStep(around, 0.1)).step is first.step
    assert driver.bind(GradientStep(around, 0.2)).step is not first.step
    energy.factor = 4.0
    assert driver.bind(GradientStep(around, 0.1)).mark != first.mark
    energy.factor = 3.0
    assert driver.bind(GradientStep(around, 0.1)).mark == first.mark
    shift.requires_grad_()
    assert driver.bind(GradientStep(around, 0.1)).mark != first.mark
    shift = torch.ones(())
    assert driver.bind(GradientStep(around, 0.1)).mark != first.mark


def test_a_binding_is_deleted_with_its_energy() -> None:
    driver, energy = Compiled(), Scaled()
    driver.bind(GradientStep(energy, 0.1))
    assert len(driver._programs._bound.values) == 1
    alive = weakref.ref(energy)
    del energy
    gc.collect()
    assert alive() is None and not driver._programs._bound.values


def test_a_bound_method_is_the_same_energy_each_time_it_is_named() -> None:
    model, driver = Pulled(2.0), Compiled()
    first = driver.bind(GradientStep(model.energy, 0.1))
    assert driver.bind(GradientStep(model.energy, 0.1)).step is first.step
    assert driver.bind(GradientStep(model.other, 0.1)).mark != first.mark
    assert driver.bind(GradientStep(Pulled(2.0).energy, 0.1)).mark == first.mark  # it reads the same
    model.pull = 3.0
    assert driver.bind(GradientStep(model.energy, 0.1)).mark != first.mark


def test_a_bound_method_is_deleted_with_its_module() -> None:
    driver, module = Compiled(), Scaled()
    driver.bind(GradientStep(module.forward, 0.1))
    assert len(driver._programs._bound.values) == 1
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None and not driver._programs._bound.values


def test_a_lost_gradient_is_reported_at_later_calls_too() -> None:
    weight, z = torch.ones(3), torch.ones(2, 3, requires_grad=True)

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return (x - weight * z).square().sum(-1)

    driver = Recording()
    for _ in range(2):
        minimize(energy, torch.zeros(2, 3), z, driver=driver)
    assert driver.looks == 1
    weight.requires_grad_()
    with pytest.raises(LostGradientError):
        minimize(energy, torch.zeros(2, 3), z, driver=driver)


class Pulled:
    """An object with energies for methods."""

    def __init__(self, pull: float) -> None:
        self.pull = pull

    def energy(self, x: Tensor) -> Tensor:
        return (x - self.pull).square().sum(-1)

    def other(self, x: Tensor) -> Tensor:
        return (x + self.pull).square().sum(-1)


class Recording(Driver):
    """Binds and looks as `Compiled` does, counts the looks, and runs Python."""

    def __init__(self) -> None:
        self.compiled, self.looks = Compiled(), 0

    def bind(self, step: Step) -> Binding:
        return self.compiled.bind(step)

    def examined(self, binding: Binding, tensors: Any, examine: Callable[[], Any]) -> Any:
        def look() -> Any:
            self.looks += 1
            return examine()

        return self.compiled.examined(binding, tensors, look)

    def call(self, function: Task, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return function(*tensors)


@COMPILER
@pytest.mark.parametrize("dtype", [
    pytest.param(torch.float64, marks=pytest.mark.slow),  # whose code is ours
    pytest.param(torch.float32, marks=pytest.mark.thorough),
])  # fmt: skip
def test_sums_and_extremes_of_rows(dtype: torch.dtype) -> None:
    """All elements of a register once each, also of one that is not full."""
    x = torch.linspace(-1, 2, 3 * 45, dtype=dtype).view(3, 45).sin().requires_grad_()

    def energy(y: Tensor, x: Tensor) -> Tensor:
        scale = x.amax(-1) - x.amin(-1) + 0.01 * x[:, :13].sum(-1).square() + x[:, 13:].prod(-1)  # between 0.8 and 1.7
        return scale * (y - x).square().sum(-1) + (y - y.amax(-1, keepdim=True)).exp().sum(-1).log()

    found = []
    for driver in (Eager(), Compiled(strict=True)):
        termination = Termination(atol=0, rtol=100 * torch.finfo(dtype).eps)
        y = minimize(energy, x.detach(), x, step_size=0.3, termination=termination, driver=driver).value
        found.append([y, *torch.autograd.grad(y.square().sum(), x)])
    torch.testing.assert_close(*found, rtol=3000 * torch.finfo(dtype).eps, atol=300 * torch.finfo(dtype).eps)


@records
def test_a_program_belongs_to_the_precision_around_the_call() -> None:
    A, z, driver = torch.randn(8, 8) / 8, torch.randn(2, 8), Compiled(strict=True)

    def step(x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(x @ A).to(x.dtype) + z

    def solve(driver: Driver) -> Tensor:
        value: Tensor = fixed_point(step, torch.zeros(2, 8), z, driver=driver).value
        return value

    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(solve(driver), solve(Eager()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(solve(driver), solve(Eager()), rtol=0, atol=1e-6)
    assert driver.compilations == 2


@records
def test_one_problem_without_a_batch_dimension() -> None:
    """Its products have one row, and are recorded as those of a matrix and a vector."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 4, dtype=torch.float64, generator=generator) / 4
    b = torch.randn(6, dtype=torch.float64, generator=generator, requires_grad=True)
    found = []

    def energy(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (x @ A.T - b).square().sum() + x.cosh().log().sum()

    for driver in (Eager(), Compiled(strict=True)):
        x = minimize(energy, A.new_zeros(4), A, b, step_size=0.4, termination=TIGHT, driver=driver).value
        found.append([x, torch.autograd.grad(x.square().sum(), b)[0]])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


WITHOUT_COMPILER = """
import warnings, torch
from energynet import Compiled, minimize
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    x = minimize(lambda x, z: (x - z).square().sum(-1), torch.zeros(2, 3), torch.ones(2, 3), step_size=0.5,
                 driver=Compiled()).value
assert torch.allclose(x, torch.ones(2, 3), atol=1e-4), x
print([str(w.message) for w in told if "could not be compiled" in str(w.message)])
"""


@pytest.mark.slow
def test_without_a_compiler_python_runs_the_loop_and_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, check=True)
    assert "no C++ compiler on this machine (install g++)" in done.stdout and "Python runs the loop instead" in done.stdout


@records
def test_writes_into_a_tensor_made_by_the_energy_are_seen() -> None:
    z = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    weight = torch.linspace(0.1, 0.9, 9, dtype=torch.float64).view(3, 3).requires_grad_()
    found = []

    def energy(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        shifted, mask = torch.zeros_like(x), torch.zeros(3, 3, dtype=x.dtype)
        shifted[:, 1:] = x[:, :-1]
        mask[torch.tensor([0, 1]), torch.tensor([1, 2])] = torch.tensor(1.0, dtype=x.dtype)
        return (x - z).square().sum(-1) + (shifted + x @ (weight * mask)).cosh().sum(-1)

    for driver in (Eager(), Compiled(strict=True)):
        x0 = torch.zeros(4, 3, dtype=torch.float64)
        x = minimize(energy, x0, z, weight, step_size=0.15, termination=TIGHT, driver=driver).value
        found.append([x, *torch.autograd.grad(x.square().sum(), [z, weight])])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@compiles
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_conjugated_and_negated_inputs() -> None:
    """PyTorch leaves these to whoever reads the numbers."""
    z = torch.complex(torch.rand(4, 3), torch.rand(4, 3)).conj()
    options: dict[str, Any] = {"step_size": 0.25, "driver": Compiled(strict=True)}  # that of one step to the minimum
    for given in (z.resolve_conj(), z.imag.resolve_neg()), (z, z.imag):
        both = lambda x, z, imag: (x - z.imag).square().sum(-1) + (x - imag).square().sum(-1)  # noqa: E731
        x = minimize(both, torch.zeros(4, 3), *given, **options).value
        torch.testing.assert_close(x, z.imag.resolve_neg(), rtol=0, atol=1e-5)
    with pytest.raises(CompilationError, match="resolve_conj"):
        minimize(lambda x: (x - z.imag).square().sum(-1), torch.zeros(4, 3), **options)


@records
def test_powers_compiled() -> None:
    """Each has its own derivatives, also where it is applied to zero."""
    A = torch.tensor([[1.0, 0.5], [0.0, 2.0], [0.3, 0.3]], dtype=torch.float64)
    z = torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64, requires_grad=True)
    found = []

    def energy(x: Tensor, z: Tensor) -> Tensor:
        terms = [((1 + (A @ x) ** 2) ** power).sum() for power in (2, 2.0, 2.5, 3, 1, 0)]
        return (A @ x - z).square().sum() + 0.1 * torch.stack(terms).sum() + x.cosh().log().sum()

    for driver in (Eager(), Compiled(strict=True)):
        x = minimize(energy, A.new_zeros(2), z, step_size=0.02, termination=TIGHT, driver=driver).value
        found.append([x, *torch.autograd.grad(x.square().sum(), z)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@compiles
def test_identities_that_an_energy_writes_into() -> None:
    A = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    writes: list[Callable[[Tensor], Any]] = [
        lambda unit: unit[0, 1].fill_(0.5),
        lambda unit: unit.diagonal().add_(1.0),
    ]

    def energy(x: Tensor) -> Tensor:  # (2, 3) -> (2,)
        terms = []
        for write in writes:
            unit = torch.eye(3, dtype=torch.float64)
            before = (unit @ A).mT
            write(unit)
            terms.append((x - before - 0.1 * (unit @ A).mT).square().sum(-1))
        return 0.5 * torch.stack(terms).sum(0)

    drivers = (Eager(), Compiled(strict=True))
    found = [minimize(energy, A.mT * 0, step_size=0.4, driver=d, termination=TIGHT).value for d in drivers]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@records
def test_where_the_product_with_an_identity_is_not_finite_both_drivers_say_so() -> None:
    A = torch.tensor([[1.0, 2.0], [3.0, torch.inf]])  # of which the first row is finite
    for driver in (Eager(), Compiled(strict=True)):
        energy = lambda x: (x - (torch.eye(2) @ A)[0]).square().sum(-1)  # noqa: E731
        found = minimize(energy, torch.ones(1, 2), step_size=0.4, driver=driver, on_failure="ignore")
        assert found.status.tolist() == [Status.NONFINITE]


@compiles
def test_labels_of_an_odd_number() -> None:
    torch.manual_seed(0)
    A, b = torch.randn(40, 47) / 8, torch.randn(5, 47, requires_grad=True)
    found = []

    def energy(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return (x @ A - b).square().sum(-1) + (x @ A).cosh().log().sum(-1) + x.square().sum(-1)

    for driver in (Eager(), Compiled(strict=True)):
        x = minimize(energy, A.new_zeros(5, 40), A, b, step_size=0.15, driver=driver).value
        found.append([x, *torch.autograd.grad(x.square().sum(), b)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@COMPILER
@pytest.mark.parametrize(
    ("solver", "dtype", "tolerance"),
    [pytest.param(LBFGS(), torch.float32, 1e-5, marks=pytest.mark.thorough),
     pytest.param(Newton(), torch.float64, 1e-10, marks=pytest.mark.slow),
     pytest.param(NewtonCG(), torch.float64, 1e-10, marks=pytest.mark.slow)],
)  # fmt: skip
def test_one_problem_whose_matrix_fills_a_cache(solver: Solver, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    A, b = torch.randn(330, 270, dtype=torch.float64) / 16, torch.randn(330, dtype=torch.float64)
    expected = torch.linalg.solve(A.mT @ A + torch.eye(270), A.mT @ b)
    energy = lambda x, A, b: 0.5 * (x @ A.mT - b).square().sum() + 0.5 * x.square().sum()  # noqa: E731
    limit = Termination(atol=0.1 * tolerance, rtol=0.1 * tolerance)
    A, b = A.to(dtype), b.to(dtype)
    eager, compiled = (minimize(energy, b.new_zeros(270), A, b, solver=solver, termination=limit, driver=driver)
                       for driver in (Eager(), Compiled(strict=True)))  # fmt: skip
    assert (compiled.value - expected).norm() <= tolerance * expected.norm()
    assert (compiled.num_steps - eager.num_steps).abs() <= 2

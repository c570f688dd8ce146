"""The compiled driver: the results of the eager one, and no second compilation."""

import array
import collections
import contextvars
import copy
import dataclasses
import gc
import logging
import os
import pickle
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from compiling import compiles
from problems import TIGHT, LogCosh, some_context
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import energynet.compiled.cpu_loops
import energynet.compiled.loops
import energynet.compiled.passes
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
from energynet._torch.autodiff import columns, gradient_of_sum, linearize, recording_program
from energynet.compiled.cpu_loops import in_place, rewriting
from energynet.compiled.decompositions import products
from energynet.compiled.fingerprint import Fingerprint
from energynet.compiled.fold import folded
from energynet.compiled.gemm import by_onednn
from energynet.compiled.loops import while_loop
from energynet.compiled.passes import dear_once
from energynet.compiled.pointers import with_pointers
from energynet.engine.binding import Binding
from energynet.engine.tasks import Pure

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


class Settings:
    class inner:
        scale = 1.0

    weights: ClassVar[list[float]] = [1.0, 2.0]
    scale = torch.tensor(1.0)

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * self.weights[0] * x


class Other(Settings):
    pass


@dataclasses.dataclass(slots=True)
class Slotted:
    scale: float = 1.0


def settings(x: Tensor) -> Tensor:
    return Settings.inner.scale * x


def imports(x: Tensor) -> Tensor:
    from outer.inner import scale  # type: ignore[import-not-found]

    return scale * outer.inner.scale * x  # type: ignore[name-defined]  # noqa: F821


def asks(x: Tensor) -> Tensor:
    import outer.inner  # type: ignore[import-not-found]

    return getattr(outer.inner, "scale") * x  # noqa: B009


VARIABLE = contextvars.ContextVar("VARIABLE", default="")
FACTOR: Any = 1.0
CHANGES: dict[str, Callable[[], tuple[Any, Callable[[], object]]]] = {
    "a list of the class": lambda: (Settings(), lambda: Settings.weights.__setitem__(0, 5.0)),
    "another list of the class": lambda: (Settings(), lambda: setattr(Settings, "weights", [1.0, 3.0])),
    "another tensor of the class": lambda: (Settings(), lambda: setattr(Settings, "scale", torch.tensor(2.0))),
    "a method of a subclass": lambda: (Other(), lambda: setattr(Other, "__call__", choosy)),
    "another class": lambda: (made := Settings(), lambda: setattr(made, "__class__", Other)),
    "an attribute of a class in a class": lambda: (settings, lambda: setattr(Settings.inner, "scale", 3.0)),
    "an attribute of a module in a module": lambda: (imports, lambda: setattr(sys.modules["outer.inner"], "scale", 3.0)),
    "a slot": lambda: (made := Slotted(), lambda: setattr(made, "scale", 3.0)),
    "an element of a set": lambda: (made := {1, 2}, lambda: made.add(3)),
    "a number in an array": lambda: (made := array.array("d", [1.0, 2.0]), lambda: made.__setitem__(0, 3.0)),
    "defaults": lambda: (made := types.FunctionType(choosy.__code__, {}), lambda: setattr(made, "__defaults__", (1.0,))),
    "code": lambda: (made := types.FunctionType(choosy.__code__, {}), lambda: setattr(made, "__code__", settings.__code__)),
    "the precision of a tensor": lambda: (made := torch.ones(2), lambda: setattr(made, "data", made.double())),
    "the order of modules": lambda: (
        made := nn.ModuleDict({"a": nn.Tanh(), "b": nn.Sigmoid()}), lambda: made.update({"a": made.pop("a")})
    ),
    "the order of a dictionary": lambda: (made := {"a": 1, "b": 2}, lambda: made.update({"a": made.pop("a")})),
    "an element of a queue": lambda: (made := collections.deque([1.0], 1), lambda: made.append(2.0)),
    "a byte": lambda: (made := bytearray(2), lambda: made.__setitem__(0, 3)),
    "a context variable": lambda: (VARIABLE, lambda: VARIABLE.set(len(VARIABLE.get()) * "x" + "x")),
    "what getattr asks a module for": lambda: (asks, lambda: setattr(sys.modules["outer.inner"], "scale", 3.0)),
    "what globals are asked for": lambda: (lambda x: globals()["FACTOR"] * x, lambda: globals().update(FACTOR=[])),
    "the layout of a tensor": lambda: (made := torch.ones(2, 3), lambda: made.t_()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_sees_a_change_of(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cls, name in ((Settings, "weights"), (Settings, "scale"), (Settings.inner, "scale")):
        value = getattr(cls, name)
        monkeypatch.setattr(cls, name, list(value) if isinstance(value, list) else value)
    outer, inner = types.ModuleType("outer"), types.ModuleType("outer.inner")
    outer.inner, inner.scale = inner, 1.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outer", outer)
    monkeypatch.setitem(sys.modules, "outer.inner", inner)
    monkeypatch.setitem(globals(), "outer", outer)
    value, make_it = CHANGES[change]()
    seen = Fingerprint(value)
    assert seen.unchanged() and Fingerprint(value).key == seen.key
    make_it()
    assert not seen.unchanged() and Fingerprint(value).key != seen.key
    if "__call__" in vars(Other):
        del Other.__call__


def test_what_cannot_be_looked_into_is_never_taken_for_another() -> None:
    """Though the memory of one that is no more may be used again."""
    keys = [Fingerprint(iter([])).key for _ in range(100)]
    assert len(set(keys)) == 100


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
        assert repr(other) == repr(driver) == "Compiled(strict=True, capacity=7, check_every=None)"
    for wrong in ({"capacity": 0}, {"check_every": 0}):
        with pytest.raises(ValueError, match="capacity ≥ 1 and check_every ≥ 1 or None, got"):
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


@compiles
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Nesterov(), LBFGS(), Newton(), NewtonCG()], ids=repr)
def test_each_solver_as_eager(solver: Solver) -> None:
    energy, z = LogCosh(), some_context(3)
    x0 = energy.start(z)
    expected = minimize(energy, x0, z, solver=solver, termination=TIGHT)
    got = minimize(energy, x0, z, solver=solver, termination=TIGHT, driver=Compiled(strict=True))
    torch.testing.assert_close(got.value, expected.value, rtol=0, atol=1e-10)
    assert (got.num_steps - expected.num_steps).abs().max() <= 2


@compiles
def test_how_often_a_program_looks_changes_neither_answers_nor_steps() -> None:
    energy, z = LogCosh(), some_context(5)
    found = []
    for every in (1, 3):
        driver = Compiled(strict=True, check_every=every)
        found.append(minimize(energy, energy.start(z), z, step_size=0.2, solver=Picard(), termination=TIGHT, driver=driver))
    torch.testing.assert_close(found[1].value, found[0].value, rtol=0, atol=1e-12)
    assert found[1].num_steps.tolist() == found[0].num_steps.tolist()


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


def test_a_step_is_bound_once_until_something_that_it_reads_changes() -> None:
    energy, driver, shift = Scaled(), Compiled(), torch.zeros(())

    def around(x: Tensor, z: Tensor) -> Tensor:
        value: Tensor = energy(x, z) + shift
        return value

    first = driver.bind(GradientStep(around, 0.1))
    assert driver.bind(GradientStep(around, 0.1)) is first
    assert driver.bind(GradientStep(around, 0.2)) is not first
    energy.factor = 4.0
    assert driver.bind(GradientStep(around, 0.1)).mark != first.mark
    energy.factor = 3.0
    assert driver.bind(GradientStep(around, 0.1)).mark == first.mark
    shift.requires_grad_()
    assert driver.bind(GradientStep(around, 0.1)).mark != first.mark
    shift = torch.ones(())
    assert driver.bind(GradientStep(around, 0.1)).mark != first.mark


def test_what_was_bound_is_forgotten_with_the_energy() -> None:
    driver, energy = Compiled(), Scaled()
    driver.bind(GradientStep(energy, 0.1))
    assert len(driver._bound.values) == 1
    alive = weakref.ref(energy)
    del energy
    gc.collect()
    assert alive() is None and not driver._bound.values


def test_a_bound_method_is_the_same_energy_each_time_it_is_named() -> None:
    model, driver = Pulled(2.0), Compiled()
    first = driver.bind(GradientStep(model.energy, 0.1))
    assert driver.bind(GradientStep(model.energy, 0.1)) is first
    assert driver.bind(GradientStep(model.other, 0.1)).mark != first.mark
    assert driver.bind(GradientStep(Pulled(2.0).energy, 0.1)).mark == first.mark  # it reads the same
    model.pull = 3.0
    assert driver.bind(GradientStep(model.energy, 0.1)).mark != first.mark


def test_a_bound_method_is_forgotten_with_the_module_that_it_belongs_to() -> None:
    driver, module = Compiled(), Scaled()
    driver.bind(GradientStep(module.forward, 0.1))
    assert len(driver._bound.values) == 1
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None and not driver._bound.values


def test_a_lost_gradient_is_told_at_a_later_call_as_well() -> None:
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

    def call(self, function: Pure, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return function(*tensors)


@compiles
def test_a_changed_batch_compiles_once_more_for_every_size() -> None:
    energy, driver = LogCosh(), Compiled(strict=True)
    layer = FPI_GD(energy, energy.step_size, start=energy.start, termination=TIGHT, driver=driver)
    for batch, programs in ((3, 2), (5, 4), (64, 4), (2, 4), (3, 4)):
        z = some_context(batch + 1)[1:].requires_grad_()  # a part of a larger tensor
        found = torch.autograd.grad(layer(z).square().sum(), [z, energy.A])
        eager = FPI_GD(energy, energy.step_size, start=energy.start, termination=TIGHT)
        expected = torch.autograd.grad(eager(z).square().sum(), [z, energy.A])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert driver.compilations == programs


LOOP = """
    AtenTensorHandle buf1_handle;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors_out(arg0_1, &buf1_handle));
    RAIIAtenTensorHandle buf1(buf1_handle);
    while (1) {
        AtenTensorHandle body_arg0_handle;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_assign_tensors_out(buf1, &body_arg0_handle));
        RAIIAtenTensorHandle body_arg0(body_arg0_handle);
        static constexpr int64_t int_array_0[] = {3L, };
        AtenTensorHandle body_buf0_handle;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, int_array_0, int_array_0, f64, cpu, 0, &body_buf0_handle));
        RAIIAtenTensorHandle body_buf0(body_buf0_handle);
        kernel((double*)(body_arg0.data_ptr()), (double*)(body_buf0.data_ptr()));
        body_arg0.reset();
        buf1.reset();
        buf1 = std::move(body_buf0);
    }"""


def test_a_loop_in_place_makes_its_memory_once_and_leaves_the_input_alone() -> None:
    code = in_place(LOOP)
    before, _, turn = code.partition("while (1) {")
    assert before.count("aoti_torch_empty_strided") == 2 and "aoti_torch_copy_(buf1, arg0_1, 0)" in before
    assert "aoti_torch" not in turn and "std::swap(buf1, body_buf0);" in turn and "auto& body_arg0 = buf1;" in turn


@pytest.mark.parametrize(
    "line",
    [
        "auto body_buf1 = wrap_with_raii_handle(reinterpret_tensor_wrapper(body_buf0, 0, i, i, 0L)); body_buf0.reset();",
        "auto body_buf1 = std::move(body_buf0);  // reuse\n        auto body_buf2 = f(reinterpret_tensor_wrapper(body_buf1, 0));",
    ],
)
def test_memory_that_goes_on_as_another_shape_is_made_at_each_turn(line: str) -> None:
    code = in_place(LOOP.replace("        body_arg0.reset();", f"        {line}\n        body_arg0.reset();"))
    before, _, turn = code.partition("while (1) {")
    assert "aoti_torch_empty_strided" not in before and "aoti_torch_empty_strided" in turn and "swap" not in turn


def test_a_loop_asks_for_memory_once_where_it_stays_or_changes_places() -> None:
    before, body = with_pointers([
        "auto& x = a;", "AtenTensorHandle new_handle;", "RAIIAtenTensorHandle made(new_handle);", "auto& y = made;",
        "f(x.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), y.data_ptr(), e.data_ptr());",
        "{", "while (1) {", "g(a.data_ptr());", "std::swap(c, e);", "}", "}",
        "std::swap(x, b);", "std::swap(d, made);", "c.reset();",
    ])  # fmt: skip
    assert before == ["void* a_at = a.data_ptr();", "void* b_at = b.data_ptr();"]
    assert "f(a_at, b_at, c.data_ptr(), d.data_ptr(), y.data_ptr(), e.data_ptr());" in body
    assert "g(a.data_ptr());" in body  # of the loop within
    assert body[body.index("std::swap(x, b);") + 1] == "std::swap(a_at, b_at);"
    assert "std::swap(d_at, made_at);" not in body


def test_code_of_another_form_is_left_alone() -> None:
    unknown = LOOP.replace("aoti_torch_assign_tensors_out(arg0_1, &buf1_handle)", "other(arg0_1, &buf1_handle)")
    assert in_place(unknown) == unknown


def test_doubles_are_summed_in_registers() -> None:
    prefix = "#include <torch/csrc/inductor/cpp_prefix.h>"
    code = folded(
        f"{prefix}\nx = at::vec::vec_reduce_all<double, 2>(op, v);\n{prefix}\nf = at::vec::vec_reduce_all<float, 1>(op, v);"
    )
    assert code.count("static inline T energynet_fold") == 1 and code.index(prefix) == 0
    assert "x = energynet_fold<double, 2>(op, v);" in code and "f = at::vec::vec_reduce_all<float, 1>(op, v);" in code
    assert folded(prefix) == prefix


@compiles
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_and_extremes_of_rows(dtype: torch.dtype) -> None:
    """All elements of a register once each, also of one that is not full."""
    x = torch.linspace(-1, 2, 3 * 45, dtype=dtype).view(3, 45).sin().requires_grad_()

    def energy(y: Tensor, x: Tensor) -> Tensor:
        scale = x.amax(-1) - x.amin(-1) + x[:, :13].sum(-1).square() + x[:, 13:].prod(-1)
        return scale * (y - x).square().sum(-1) + (y - y.amax(-1, keepdim=True)).exp().sum(-1).log()

    found = []
    for driver in (Eager(), Compiled(strict=True)):
        termination = Termination(atol=0, rtol=100 * torch.finfo(dtype).eps)
        y = minimize(energy, x.detach(), x, termination=termination, driver=driver).value
        found.append([y, *torch.autograd.grad(y.square().sum(), x)])
    torch.testing.assert_close(*found, rtol=3000 * torch.finfo(dtype).eps, atol=300 * torch.finfo(dtype).eps)


@compiles
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


@compiles
def test_one_problem_without_a_batch_dimension() -> None:
    """Its products have one row, and are recorded as those of a matrix and a vector."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 4, dtype=torch.float64, generator=generator) / 4
    b = torch.randn(6, dtype=torch.float64, generator=generator, requires_grad=True)
    found = []

    def energy(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (x @ A.T - b).square().sum() + x.cosh().log().sum()

    for driver in (Eager(), Compiled(strict=True)):
        x = minimize(energy, A.new_zeros(4), A, b, termination=TIGHT, driver=driver).value
        found.append([x, torch.autograd.grad(x.square().sum(), b)[0]])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


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


WITHOUT_COMPILER = """
import warnings, torch
from energynet import Compiled, minimize
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    x = minimize(lambda x, z: (x - z).square().sum(-1), torch.zeros(2, 3), torch.ones(2, 3), driver=Compiled()).value
assert torch.allclose(x, torch.ones(2, 3), atol=1e-4), x
print([str(w.message) for w in told if "could not be compiled" in str(w.message)])
"""


@pytest.mark.slow
def test_without_a_compiler_python_runs_the_loop_and_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, check=True)
    assert "no C++ compiler on this machine (install g++)" in done.stdout and "Python runs the loop instead" in done.stdout


def test_only_what_nobody_can_help_is_kept_from_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log, heard = logging.getLogger("torch._inductor.ir"), Heard()
    monkeypatch.setattr(log, "handlers", [heard])
    remark = "%s is missing a c-shim implementation, using proxy executor as fallback"
    with rewriting(1):
        log.warning(remark, "aten.linalg_solve_triangular.default")
        log.warning("something else")
    log.warning(remark, "afterward, another's")
    assert [text.split()[0] for text in heard.texts] == ["something", "afterward,"]


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def body_of(update: Callable[[Tensor], Tensor], every: int = 1) -> list[str]:
    """Names of the operations in the body of a recorded loop."""
    return [str(n.target) for n in recorded(update, every).nodes if n.op == "call_function"]


def recorded(update: Callable[[Tensor], Tensor], every: int = 1) -> torch.fx.Graph:
    """The body of a recorded loop."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with torch.no_grad(), recording_program(), mode:
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


@compiles
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
        x = minimize(energy, torch.zeros(4, 3, dtype=torch.float64), z, weight, termination=TIGHT, driver=driver).value
        found.append([x, *torch.autograd.grad(x.square().sum(), [z, weight])])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@compiles
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_conjugated_and_negated_inputs() -> None:
    """PyTorch leaves these to whoever reads the numbers."""
    z = torch.complex(torch.rand(4, 3), torch.rand(4, 3)).conj()
    driver = Compiled(strict=True)
    for given in (z.resolve_conj(), z):
        x = minimize(lambda x, z: (x - z.imag).square().sum(-1), torch.zeros(4, 3), given, driver=driver).value
        torch.testing.assert_close(x, z.imag.resolve_neg(), rtol=0, atol=1e-5)
    x = minimize(lambda x, z: (x - z).square().sum(-1), torch.zeros(4, 3), z.imag, driver=driver).value
    torch.testing.assert_close(x, z.imag.resolve_neg(), rtol=0, atol=1e-5)
    with pytest.raises(CompilationError, match="resolve_conj"):
        minimize(lambda x: (x - z.imag).square().sum(-1), torch.zeros(4, 3), driver=driver)


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
    assert "aten.rand_like.default" in body_of(lambda x: x + torch.rand_like(A))
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


@compiles
@pytest.mark.parametrize("powers", [[2, 2.0, 2.5], [3, 1, 0]], ids=str)
def test_powers_compiled(powers: list[float]) -> None:
    """Each has its own derivatives, also where it is applied to zero."""
    A = torch.tensor([[1.0, 0.5], [0.0, 2.0], [0.3, 0.3]], dtype=torch.float64)
    z = torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64, requires_grad=True)
    found = []

    def energy(x: Tensor, z: Tensor) -> Tensor:
        terms = [((1 + (A @ x) ** 2) ** power).sum() for power in powers]
        return (A @ x - z).square().sum() + 0.1 * torch.stack(terms).sum() + x.cosh().log().sum()

    for driver in (Eager(), Compiled(strict=True)):
        x = minimize(energy, A.new_zeros(2), z, solver=Newton(), termination=TIGHT, driver=driver).value
        found.append([x, *torch.autograd.grad(x.square().sum(), z)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cosh", "sinh"])
def test_hyperbolic_functions_by_one_exponential(name: str, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype)
    ours, theirs = products()[getattr(torch.ops.aten, name).default], getattr(torch, name)
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
    with recording_program():
        graph = make_fx(lambda x, A: columns(lambda v: product(v, A), x), products())(A[0], A).graph
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
    found = [minimize(energy, A.mT * 0, solver=Newton(), driver=d, termination=TIGHT).value for d in drivers]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


@compiles
def test_where_the_product_with_an_identity_is_not_finite_both_drivers_say_so() -> None:
    A = torch.tensor([[1.0, 2.0], [3.0, torch.inf]])  # of which the first row is finite
    for driver in (Eager(), Compiled(strict=True)):
        energy = lambda x: (x - (torch.eye(2) @ A)[0]).square().sum(-1)  # noqa: E731
        found = minimize(energy, torch.ones(1, 2), driver=driver, on_failure="ignore")
        assert found.status.tolist() == [Status.NONFINITE]


@compiles
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


def test_a_product_with_a_fixed_matrix_has_a_whole_number_of_lanes() -> None:
    """So it is where the last columns would be slow; the columns of zeros are added in front of the loop."""

    def columns(wide: int, dtype: torch.dtype = torch.float32) -> int:
        A = torch.ones(4, wide, dtype=dtype)
        (product,) = recorded(lambda x: (x.to(dtype) @ A)[:, :4].float()).find_nodes(
            op="call_function", target=torch.ops.aten.mm.default
        )
        return int(product.meta["val"].shape[1])

    assert [columns(n) for n in (31, 32, 33, 40, 41, 159)] == [31, 32, 33, 40, 48, 160]
    assert columns(159, torch.float64) == 159
    assert "aten.constant_pad_nd.default" not in body_of(lambda x: (x @ torch.ones(4, 159))[:, :4])


@compiles
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_large_products_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    for module in (energynet.compiled.cpu_loops, energynet.compiled.passes):
        monkeypatch.setattr(module, "mkl_is_slow", lambda: True)
    cpu_loops = energynet.compiled.cpu_loops
    monkeypatch.setattr(cpu_loops, "by_onednn", lambda source: sources.append(by_onednn(source)) or sources[-1])
    torch.manual_seed(0)
    W = torch.randn(300, 400) / 20
    whole, part = W[:, :99].contiguous(), W[:, 5:104]

    def energy(x: Tensor, V: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x @ V.T).square().mean(-1) + 0.5 * (x - 1).square().sum(-1)

    def solved(driver: Driver, V: Tensor) -> list[Tensor]:
        V = V.detach().requires_grad_()
        x = minimize(energy, torch.zeros(80, 99), V, step_size=0.5, solver=Picard(), driver=driver).value
        return [x.detach(), torch.autograd.grad(x.square().sum(), V)[0]]

    for V in (whole, part):
        torch.testing.assert_close(solved(Compiled(strict=True), V), solved(Eager(), V), rtol=1e-3, atol=2e-4)
    assert all("energynet_mm_out(while_loop_body" in source for source in sources)
    assert by_onednn("aoti_torch_cpu_mm_out(") == "aoti_torch_cpu_mm_out("  # of another form than expected


@compiles
def test_labels_of_an_odd_number() -> None:
    torch.manual_seed(0)
    A, b = torch.randn(40, 47) / 8, torch.randn(5, 47, requires_grad=True)
    found = []

    def energy(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return (x @ A - b).square().sum(-1) + (x @ A).cosh().log().sum(-1) + x.square().sum(-1)

    for driver in (Eager(), Compiled(strict=True)):
        x = minimize(energy, A.new_zeros(5, 40), A, b, driver=driver).value
        found.append([x, *torch.autograd.grad(x.square().sum(), b)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_with_one_matrix_is_that_of_as_many(rows: int) -> None:
    torch.manual_seed(0)
    own, shared = torch.randn(6, rows, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64).expand(6, 5, 4)
    product = products()[torch.ops.aten.bmm.default]
    torch.testing.assert_close(product(own, shared), torch.bmm(own, shared), rtol=1e-14, atol=1e-14)
    turned = product(shared.mT, own.mT)
    if rows == 1:
        torch.testing.assert_close(turned, torch.bmm(shared.mT, own.mT), rtol=1e-14, atol=1e-14)
    else:
        assert turned is NotImplemented
    assert product(own, shared.contiguous()) is NotImplemented


@compiles
@pytest.mark.parametrize(
    ("solver", "dtype", "tolerance"),
    [(LBFGS(), torch.float32, 1e-5), (Newton(), torch.float64, 1e-10), (NewtonCG(), torch.float64, 1e-10)],
)
def test_one_problem_whose_matrix_fills_a_cache(solver: Solver, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    A, b = torch.randn(330, 270, dtype=torch.float64) / 16, torch.randn(330, dtype=torch.float64)
    expected = torch.linalg.solve(A.mT @ A + torch.eye(270), A.mT @ b)
    energy = lambda x, A, b: 0.5 * (x @ A.mT - b).square().sum() + 0.5 * x.square().sum()  # noqa: E731
    limit = Termination(atol=0.1 * tolerance, rtol=0.1 * tolerance)
    A, b = A.to(dtype), b.to(dtype)
    solution = minimize(energy, b.new_zeros(270), A, b, solver=solver, termination=limit, driver=Compiled(strict=True))
    assert (solution.value - expected).norm() <= tolerance * expected.norm()

"""The compiled driver among other code: solves within solves, threads, dispatch modes, warnings as errors."""

import threading
import time
import warnings
from typing import Any

import pytest
import torch
from compiling import compiles, records
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from energynet import CompilationError, Compiled, Driver, Eager, Picard, minimize
from energynet.compiled.inductor import rewriting
from energynet.compiled.tracing import _alone


def outer(driver: Driver, inner: Driver, batch: int) -> tuple[Tensor, Tensor]:
    """x* and the gradient of its squares: x* minimizes ½‖x − z‖² + ½‖y*(x)‖², where y* minimizes ½‖y − sin x‖² + ½‖y‖²."""
    z = torch.linspace(-1, 1, 2 * batch, dtype=torch.float64).reshape(batch, 2).requires_grad_()

    def answer(x: Tensor) -> Tensor:
        half = lambda y, x: 0.5 * (y - x.sin()).square().sum(-1) + 0.5 * y.square().sum(-1)  # noqa: E731
        return minimize(half, torch.zeros_like(x), x, step_size=0.45, solver=Picard(), driver=inner).value

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (x - z).square().sum(-1) + 0.5 * answer(x).square().sum(-1)

    x = minimize(energy, torch.zeros_like(z), z, step_size=0.7, solver=Picard(), driver=driver).value
    return x.detach(), *torch.autograd.grad(x.square().sum(), z)


def test_an_energy_that_solves_is_not_compiled_and_says_what_to_do() -> None:
    with pytest.raises(CompilationError, match=r"solves a problem of its own.*leave the outer solve to Eager"):
        outer(Compiled(strict=True), Eager(), 3)
    with pytest.warns(UserWarning, match="solves a problem of its own"):
        found = outer(Compiled(), Eager(), 3)
    torch.testing.assert_close(found, outer(Eager(), Eager(), 3))


@records
def test_an_inner_solve_is_compiled() -> None:
    batch, inner = 2048, Compiled(strict=True)  # the rest of a large one might go on alone, which is looked into without values
    expected = outer(Eager(), Eager(), batch)
    torch.testing.assert_close(outer(Eager(), inner, batch), expected)
    with warnings.catch_warnings():  # the outer one cannot be, and nothing without values may reach the inner one's program
        warnings.simplefilter("ignore", UserWarning)
        torch.testing.assert_close(outer(Compiled(), inner, batch), expected)
    assert inner.compilations > 0


def _answer(b: Tensor, driver: Driver) -> Tensor:
    energy = lambda x, b: (x - b).square().sum(-1) + x.cosh().sum(-1)  # noqa: E731
    value: Tensor = minimize(energy, torch.zeros_like(b), b, step_size=0.3, solver=Picard(), driver=driver).value
    return value


@records
def test_empty_tensors_and_dispatch_modes_run_eagerly() -> None:
    driver, b = Compiled(strict=True), torch.ones(3, 2)
    _answer(b, driver)
    mode = FakeTensorMode()
    fake: Any = mode.from_tensor(b)
    assert isinstance(fake, FakeTensor)
    for entered in (mode, warnings.catch_warnings()):  # within the mode and without, the tensor has none
        with entered, pytest.raises(Exception, match=r"_local_scalar_dense|data-dependent|FakeTensor"):
            _answer(fake, driver)
    from torch.utils.flop_counter import FlopCounterMode

    counts, A = [], torch.eye(2)

    def solve(driver: Driver) -> None:
        minimize(lambda x, b: (x @ A - b).square().sum(-1), torch.zeros(3, 2), b, step_size=0.3, solver=Picard(), driver=driver)

    solve(Eager())  # the second derivatives of an energy are looked at once
    for each in (driver, Eager()):
        with FlopCounterMode(display=False) as counter:
            solve(each)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@compiles
def test_three_drivers_compile_at_once_in_three_threads() -> None:
    contexts = [torch.randn(n, 2, dtype=torch.float64) for n in (2, 3, 4)]
    found: list[Any] = [None] * 3

    def work(k: int) -> None:
        try:
            found[k] = _answer(contexts[k], Compiled(strict=True))
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, [_answer(b, Eager()) for b in contexts])


def test_compilation_takes_the_lock_and_restores_patches() -> None:
    before, filters, entered = GraphLowering._compile_to_module_lines, list(warnings.filters), threading.Event()

    def compile_too() -> None:
        with _alone(), rewriting(1):
            entered.set()

    other = threading.Thread(target=compile_too)
    with _alone(), rewriting(1):
        other.start()
        time.sleep(0.1)
        assert not entered.is_set()
        warnings.warn("PyTorch's own", FutureWarning, stacklevel=1)  # would be an error here
        with pytest.raises(UserWarning):
            warnings.warn("the user's", UserWarning, stacklevel=1)
    other.join()
    assert entered.is_set()
    assert GraphLowering._compile_to_module_lines is before
    assert warnings.filters == filters

"""On a GPU, where there is one: the same answers, derivatives and failures as on the CPU."""

import pytest
import torch
from torch import Tensor

from energynet import (
    LBFGS,
    Anderson,
    Compiled,
    Driver,
    Eager,
    GradientDescent,
    Nesterov,
    NewtonCG,
    Picard,
    Solver,
    Status,
    Termination,
    minimize,
)

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = [
    pytest.mark.skipif(DEVICE is None, reason="no GPU or other accelerator on this machine"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TIGHT = Termination(rtol=1e-11, max_steps=5_000)
SOLVERS = [None, Picard(), LBFGS(), NewtonCG(), GradientDescent(), Nesterov(), Anderson()]


def energy(x: Tensor, z: Tensor, A: Tensor) -> Tensor:  # (B, 4), (B, 6), (6, 4) -> (B,)
    return 0.5 * (x @ A.T - z).square().sum(-1) + torch.cosh(x).log().sum(-1)


def context(batch: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, A = (torch.randn(n, k, generator=generator, dtype=torch.float64) for n, k in ((batch, 6), (6, 4)))
    return z, A


def derivatives(device: "str | torch.device", driver: Driver, solver: Solver | None) -> list[Tensor]:
    """The answer, the gradients of a loss, and the gradient of their size."""
    z, A = (t.to(device).requires_grad_() for t in context())
    x = minimize(energy, z.new_zeros(5, 4), z, A, step_size=0.02 if isinstance(solver, Picard) else None, solver=solver,
                 termination=TIGHT, driver=driver).value  # fmt: skip
    first = torch.autograd.grad(x.pow(3).sum(), (z, A), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (z, A))
    return [t.detach().cpu() for t in (x, *first, *second)]


@pytest.mark.parametrize("driver", [Eager(), Eager(check_every=1), Compiled(strict=True)], ids=repr)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_values_and_derivatives_to_second_order_as_on_the_cpu(solver: Solver | None, driver: Driver) -> None:
    if isinstance(driver, Compiled) and not isinstance(solver, (Picard, LBFGS, type(None))):
        pytest.skip("compiled for two solvers, since each takes a minute")
    assert DEVICE is not None
    for found, expected in zip(derivatives(DEVICE, driver, solver), derivatives("cpu", Eager(), solver), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("driver", [Eager(), Compiled(strict=True)], ids=repr)
def test_a_failed_sample_is_reported_and_does_not_affect_others(driver: Driver) -> None:
    z, A = (t.to(DEVICE) for t in context())
    z[1] = torch.nan
    found = minimize(energy, z.new_zeros(5, 4), z, A, termination=TIGHT, driver=driver, on_failure="ignore")
    assert found.status.tolist() == [Status.CONVERGED, Status.NONFINITE, *[Status.CONVERGED] * 3]
    assert found.value.device.type == DEVICE.type  # type: ignore[union-attr]


def test_programs_are_kept_and_derivatives_by_torch_func_are_right() -> None:
    z, A = (t.to(DEVICE) for t in context(1))
    driver = Compiled(strict=True)

    def solve(z: Tensor) -> Tensor:
        return minimize(energy, z.new_zeros(1, 4), z, A, termination=TIGHT, driver=driver).value

    found = torch.func.jacrev(solve)(z)
    compiled = driver.compilations
    torch.func.jacrev(solve)(z + 1)
    assert driver.compilations == compiled
    expected = torch.func.jacrev(lambda z: minimize(energy, z.new_zeros(1, 4), z, A.cpu(), termination=TIGHT).value)(z.cpu())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-7, atol=1e-9)

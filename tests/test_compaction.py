"""The last samples of a large batch go on alone, with the same results."""

from typing import Any

import pytest
import torch
from torch import Tensor

import energynet.engine.loop
from energynet import (
    LBFGS,
    Anderson,
    BarzilaiBorwein,
    GradientDescent,
    ImplicitAdjoint,
    Newton,
    NewtonCG,
    Picard,
    Solver,
    Status,
    Termination,
    fixed_point,
    minimize,
)
from energynet.engine.tasks import Samples
from energynet.linear import GMRES

SIZE = 1200  # of which every tenth is slow


def context() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(SIZE, 3, dtype=torch.float64, generator=generator)
    stiff = torch.where(torch.arange(SIZE) % 10 == 0, 0.01, 0.8).double().unsqueeze(1) * torch.tensor([1.0, 0.9, 1.1]).double()
    z[7, 1] = torch.nan
    return z, stiff


class Rows:
    """½ a (x − z)² + 0.1 log cosh x, counting the rows that are asked for."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: Tensor, z: Tensor, a: Tensor, shared: Tensor) -> Tensor:
        self.rows += len(x)
        return (0.5 * a * (x - z).square() + 0.001 * torch.log(torch.cosh(x @ shared.T))).sum(-1)


def solved(rows: slice, **options: Any) -> tuple[Any, list[Tensor], Rows]:
    z, a = (t[rows].clone().requires_grad_() for t in context())
    shared = (torch.eye(3, dtype=torch.float64) + 0.1).requires_grad_()
    energy = Rows()
    found = minimize(energy, torch.zeros_like(z), z, a, shared, on_failure="ignore", **options)
    good = found.status == Status.CONVERGED
    gradients = torch.autograd.grad(found.value[good].square().sum(), [z, a, shared])
    return found, list(gradients), energy


@pytest.mark.parametrize("solver", [pytest.param(Picard(), marks=pytest.mark.slow), LBFGS(), Newton(), NewtonCG(),
                                    GradientDescent(BarzilaiBorwein()), Anderson()], ids=repr)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_as_in_two_smaller_batches(solver: Solver, monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[int] = []
    some = Samples.some
    monkeypatch.setattr(Samples, "some", lambda self, rows: alone.append(len(rows)) or some(self, rows))
    monkeypatch.setattr(energynet.engine.loop, "LOOK", 2)
    options: dict[str, Any] = {"solver": solver, "step_size": 1.0 if isinstance(solver, Picard) else None,
                               "termination": Termination(atol=1e-9, rtol=0.0, max_steps=4000),
                               "adjoint": ImplicitAdjoint(termination=Termination(rtol=1e-9))}  # fmt: skip
    whole, gradients, energy = solved(slice(None), **options)
    parts = [solved(half, **options) for half in (slice(0, SIZE // 2), slice(SIZE // 2, None))]
    for name in ("value", "status", "num_steps"):
        expected = torch.cat([getattr(found, name) for found, _, _ in parts])
        torch.testing.assert_close(getattr(whole, name), expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert alone and max(alone) <= SIZE // 2
    assert whole.status[7] == Status.NONFINITE and (whole.status == Status.CONVERGED).sum() == SIZE - 1
    for k in range(2):
        expected = torch.cat([g[k] for _, g, _ in parts])
        torch.testing.assert_close(gradients[k], expected, rtol=1e-8, atol=1e-8, equal_nan=True)
    torch.testing.assert_close(gradients[2], parts[0][1][2] + parts[1][1][2], rtol=1e-8, atol=1e-8)
    if isinstance(solver, Picard):
        assert energy.rows < 0.5 * SIZE * int(whole.num_steps.max())


def test_a_map_and_gmres_and_samples_that_depend_on_one_another() -> None:
    z = torch.linspace(0, 2, 2 * SIZE, dtype=torch.float64).reshape(SIZE, 2)
    rate = torch.where(torch.arange(SIZE) % 10 == 0, 0.98, 0.5).double().unsqueeze(1)
    options: dict[str, Any] = {"adjoint": ImplicitAdjoint(GMRES()), "termination": Termination(rtol=1e-10, max_steps=3000)}
    for centerd in (False, True):
        z = z.detach().requires_grad_()

        def step(x: Tensor, z: Tensor, rate: Tensor, centerd: bool = centerd) -> Tensor:
            return rate * x + (1 - rate) * (z - z.mean(0) + 1 if centerd else z)

        found = fixed_point(step, torch.zeros_like(z), z, rate, **options)
        torch.testing.assert_close(found.value, z - z.mean(0) + 1 if centerd else z, rtol=0, atol=1e-7)
        (gradient,) = torch.autograd.grad(found.value[:, 0].sum(), z)
        expected = torch.zeros_like(z) if centerd else torch.eye(2, dtype=torch.float64)[:1].expand(SIZE, 2)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-7)

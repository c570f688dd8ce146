"""Settings around a call: the default dtype, mixed precision, which kernels are allowed."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from energynet import (
    GMRES,
    LBFGS,
    MINRES,
    Anderson,
    BiCGSTAB,
    Broyden,
    ConjugateGradient,
    Dense,
    GradientDescent,
    ImplicitAdjoint,
    Nesterov,
    Newton,
    NewtonCG,
    Picard,
    fixed_point,
    minimize,
)
from energynet.constraints import L1, Affine, Box, L2Ball, Simplex
from energynet.solvers import Solver
from energynet.step import Prox

MINIMIZERS = [LBFGS(), Newton(), NewtonCG(), GradientDescent(), Nesterov(), Picard(), Anderson(), Broyden()]
LINEAR = [ConjugateGradient(), MINRES(), GMRES(), BiCGSTAB(), Dense(), Picard(), Anderson(), Broyden()]
GENERAL = [GMRES(), BiCGSTAB(), Dense(), Picard(), Anderson(), Broyden()]


@pytest.fixture(params=[(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)], ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A dtype of tensors under another default dtype."""
    default, dtype = request.param
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    yield dtype
    torch.set_default_dtype(before)


def energy(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).cosh().sum(-1) + 0.5 * x.square().sum(-1)


def step(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * x.tanh() + z


def some_context(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2).to(dtype).requires_grad_()


def check_derivatives(x: Tensor, exact: Tensor, z: Tensor, slope: Tensor) -> None:
    """Value, first and second derivatives have the dtype of z; the first two are right to what it can hold."""
    assert x.dtype == z.dtype
    tolerance = 10 * torch.finfo(z.dtype).eps ** 0.5
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=tolerance)
    (first,) = torch.autograd.grad(x.sum(), z, create_graph=True)
    torch.testing.assert_close(first.double(), slope, rtol=0, atol=tolerance)
    (second,) = torch.autograd.grad(first.sum(), z)
    assert first.dtype == second.dtype == z.dtype


@pytest.mark.parametrize("solver", MINIMIZERS, ids=repr)
def test_minimizers_in_another_than_the_default_dtype(solver: Solver, dtype: torch.dtype) -> None:
    z, zero = some_context(dtype), torch.zeros(3, 2, dtype=dtype)
    exact = minimize(energy, zero.double(), z.detach().double(), solver=Newton()).value
    bend = (exact - z.detach().double()).cosh()
    check_derivatives(minimize(energy, zero, z, solver=solver).value, exact, z, bend / (1 + bend))


@pytest.mark.parametrize("linear", LINEAR, ids=repr)
def test_linear_solvers_in_another_than_the_default_dtype(linear: Solver, dtype: torch.dtype) -> None:
    z, zero = some_context(dtype), torch.zeros(3, 2, dtype=dtype)
    exact = minimize(energy, zero.double(), z.detach().double(), solver=Newton()).value
    bend = (exact - z.detach().double()).cosh()
    check_derivatives(minimize(energy, zero, z, adjoint=ImplicitAdjoint(linear)).value, exact, z, bend / (1 + bend))


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_maps_in_another_than_the_default_dtype(solver: Solver, dtype: torch.dtype) -> None:
    zero = torch.zeros(3, 2, dtype=dtype)
    for linear in GENERAL:
        z = some_context(dtype)
        exact = fixed_point(step, zero.double(), z.detach().double()).value
        x = fixed_point(step, zero, z, solver=solver, adjoint=ImplicitAdjoint(linear)).value
        check_derivatives(x, exact, z, 1 / (1 - 0.5 / exact.cosh().square()))


PROXES: dict[str, Callable[[torch.dtype], Prox]] = {
    "box": lambda dtype: Box(0.0, 1.0),
    "simplex": lambda dtype: Simplex(),
    "ball": lambda dtype: L2Ball(1.0),
    "l1": lambda dtype: L1(0.1),
    "affine": lambda dtype: Affine(torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([0.5], dtype=dtype)),
}


@pytest.mark.parametrize("name", PROXES)
def test_constraints_in_another_than_the_default_dtype(name: str, dtype: torch.dtype) -> None:
    z, double, make = some_context(dtype), torch.float64, PROXES[name]
    x = minimize(energy, torch.zeros(3, 2, dtype=dtype), z, prox=make(dtype)).value
    exact = minimize(energy, torch.zeros(3, 2, dtype=double), z.detach().double(), prox=make(double)).value
    assert x.dtype == torch.autograd.grad(x.square().sum(), z)[0].dtype == dtype
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=10 * torch.finfo(dtype).eps ** 0.5)

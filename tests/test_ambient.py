"""Settings around a call: the default dtype, mixed precision, which kernels are allowed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiling import COMPILER
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    FPI_NN,
    GMRES,
    LBFGS,
    MINRES,
    Anderson,
    BiCGSTAB,
    Broyden,
    Compiled,
    ConjugateGradient,
    ConvergenceError,
    Dense,
    GradientDescent,
    ImplicitAdjoint,
    Nesterov,
    NeumannAdjoint,
    Newton,
    NewtonCG,
    OneStepAdjoint,
    Picard,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet.constraints import L1, Affine, Box, L2Ball, Simplex
from energynet.engine.ambient import Ambient
from energynet.engine.root_gradient import Adjoint
from energynet.proximal import Prox
from energynet.solvers import Solver

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


class Softplus(nn.Module):
    """Σ softplus(A x + W z) + ½ ‖x‖², whose products are taken in half precision under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.W = nn.Linear(4, 8), nn.Linear(3, 8)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # (B, 4), (B, 3)
        return nn.functional.softplus(self.A(x) + self.W(z)).sum(-1) + 0.5 * x.square().sum(-1)


class Tanh(nn.Module):
    """tanh(A x + W z), a contraction."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.W = nn.Linear(4, 4), nn.Linear(3, 4)
        self.A.weight.data *= 0.5

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # (B, 4), (B, 3)
        return torch.tanh(self.A(x) + self.W(z))


def layer_gd(network: nn.Module, z: Tensor, **options: Any) -> Tensor:
    unrolled = isinstance(options.get("adjoint"), UnrolledAdjoint)  # which does not differentiate a guess
    return FPI_GD(network, 0.2 if unrolled else None, start=lambda z: z.new_zeros(len(z), 4), **options)(z)


def layer_nn(network: nn.Module, z: Tensor, **options: Any) -> Tensor:
    return FPI_NN(network, start=lambda z: z.new_zeros(len(z), 4), **options)(z)


def call_minimize(network: nn.Module, z: Tensor, **options: Any) -> Tensor:
    value: Tensor = minimize(network, z.new_zeros(len(z), 4), z, **options).value
    return value


def call_fixed_point(network: nn.Module, z: Tensor, **options: Any) -> Tensor:
    value: Tensor = fixed_point(network, z.new_zeros(len(z), 4), z, **options).value
    return value


WAYS: list[tuple[Callable[..., Tensor], type[nn.Module]]] = [
    (layer_gd, Softplus), (call_minimize, Softplus), (layer_nn, Tanh), (call_fixed_point, Tanh)
]  # fmt: skip


def mixed() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def derivatives(solve: Callable[..., Tensor], make: type[nn.Module], inside: bool, order: int, **options: Any) -> list[Tensor]:
    """Of the loss of the usual loop, with the backward inside of autocast or, as usual, outside."""
    torch.manual_seed(0)
    network, z = make(), torch.randn(5, 3, requires_grad=True)
    wrt = [z, *network.parameters()]
    with mixed():
        loss = solve(network, z, **options).square().sum()
    with mixed() if inside else contextlib.nullcontext():
        first = torch.autograd.grad(loss, wrt, create_graph=order > 1)
        if order == 1:
            return list(first)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        return list(torch.autograd.grad(penalty, wrt))


def full_precision(solve: Callable[..., Tensor], make: type[nn.Module]) -> list[Tensor]:
    torch.manual_seed(0)
    network, z = make(), torch.randn(5, 3, requires_grad=True)
    return list(torch.autograd.grad(solve(network, z).square().sum(), [z, *network.parameters()]))


@pytest.mark.parametrize(("solve", "make"), WAYS)
@pytest.mark.parametrize("order", [1, 2])
def test_backward_outside_of_autocast_is_that_inside(solve: Callable[..., Tensor], make: type[nn.Module], order: int) -> None:
    outside = derivatives(solve, make, False, order)
    for mine, theirs in zip(outside, derivatives(solve, make, True, order), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    if order == 1:
        exact = full_precision(solve, make)
        gap = torch.stack([(a - b).norm() for a, b in zip(outside, exact, strict=True)]).norm()
        assert gap < 0.2 * torch.stack([b.norm() for b in exact]).norm()


@pytest.mark.parametrize(
    "adjoint", [OneStepAdjoint(), NeumannAdjoint(terms=3), UnrolledAdjoint(), ImplicitAdjoint(GMRES())], ids=repr
)
def test_every_adjoint_runs_in_the_autocast_of_the_forward(adjoint: Adjoint) -> None:
    for solve, make in WAYS:
        mine, theirs = (derivatives(solve, make, inside, 1, adjoint=adjoint) for inside in (False, True))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@COMPILER
@pytest.mark.parametrize(("solve", "make", "options"), [
    pytest.param(call_minimize, Softplus, {"step_size": 0.5}, marks=pytest.mark.slow),
    pytest.param(layer_nn, Tanh, {}, marks=pytest.mark.thorough),
])  # fmt: skip
def test_compiled_adjoints_run_in_the_autocast_of_the_forward(
    solve: Callable[..., Tensor], make: type[nn.Module], options: dict[str, Any]
) -> None:
    mine, theirs = (derivatives(solve, make, inside, 1, driver=Compiled(strict=True), **options) for inside in (False, True))
    for a, b, eager in zip(mine, theirs, derivatives(solve, make, False, 1, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, eager, rtol=0, atol=0.1 * float(eager.abs().max()))


def test_forward_mode_and_transforms_under_autocast() -> None:
    torch.manual_seed(0)
    network, z = Softplus(), torch.randn(5, 3)
    network.requires_grad_(False)
    with mixed():
        forward = torch.func.jacfwd(lambda z: call_minimize(network, z))(z)
        (backward,) = torch.func.vjp(lambda z: call_minimize(network, z).sum((0, 1)), z)[1](torch.ones(()))
    backward = backward.detach()
    torch.testing.assert_close(forward.sum((0, 1)), backward, rtol=0, atol=0.1 * float(backward.abs().max()))


@pytest.mark.parametrize("solver", [s for s in MINIMIZERS if not isinstance(s, (Anderson, Broyden))], ids=repr)
def test_minimizers_reach_the_accuracy_of_autocast(solver: Solver) -> None:
    """Tolerances and rounding are those of bfloat16, though x and the energy's value are float32."""
    for seed in range(3):
        torch.manual_seed(seed)
        network, z = Softplus(), torch.randn(5, 3)
        exact = minimize(network, torch.zeros(5, 4), z).value
        with mixed():
            solution = minimize(network, torch.zeros(5, 4), z, solver=solver)
        assert solution.value.dtype == solution.error.dtype == torch.float32
        assert bool((solution.num_steps <= 30).all())
        torch.testing.assert_close(solution.value, exact, rtol=0, atol=0.15 * float(exact.detach().norm(dim=-1).max()))


def test_unused_autocast_does_not_loosen_tolerances() -> None:
    """An energy without products is evaluated in float32 there as well, and solved to its rounding."""
    z = torch.linspace(-1, 1, 6).reshape(3, 2)
    with mixed():
        x = minimize(energy, torch.zeros(3, 2), z).value
    torch.testing.assert_close(x, minimize(energy, torch.zeros(3, 2), z).value, rtol=0, atol=1e-6)
    double = minimize(energy, torch.zeros(3, 2, dtype=torch.float64), z.double()).value
    rounded = minimize(lambda x, z: energy(x.float(), z.float()), torch.zeros(3, 2, dtype=torch.float64), z.double()).value
    torch.testing.assert_close(rounded, double, rtol=0, atol=1e-3)  # nothing can be told below the rounding of float32


def test_backward_in_the_default_dtype_of_the_forward() -> None:
    z = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        x = minimize(lambda x, z: (x @ (2 * torch.eye(2)) - z).square().sum(-1), torch.zeros(1, 2), z).value
    finally:
        torch.set_default_dtype(before)
    (gradient,) = torch.autograd.grad(x.sum(), z)  # 2 x = z
    torch.testing.assert_close(gradient, torch.full((1, 2), 0.5, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.get_default_dtype() == before


def test_backward_in_the_deterministic_mode_of_the_forward() -> None:
    seen: list[int] = []

    def watched(x: Tensor, z: Tensor) -> Tensor:
        seen.append(torch.get_deterministic_debug_mode())
        return (x - z).square().sum(-1)

    z = torch.ones(1, 2, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        x = minimize(watched, torch.zeros(1, 2), z).value
    finally:
        torch.use_deterministic_algorithms(False)
    seen.clear()
    torch.autograd.grad(x.sum(), z)
    assert seen and set(seen) == {2} and torch.get_deterministic_debug_mode() == 0


def test_settings_are_restored_after_an_error_in_backward() -> None:
    def energy(x: Tensor, z: Tensor) -> Tensor:
        return (x - z).pow(4).sum(-1)

    z = torch.ones(2, 1, requires_grad=True)
    with mixed():
        x = minimize(energy, torch.ones(2, 1), z).value
    around = Ambient.now("cpu")
    with pytest.raises(ConvergenceError):  # its Hessian is zero
        torch.autograd.grad(x.sum(), z)
    assert Ambient.now("cpu") == around

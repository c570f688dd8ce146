"""Newton steps from the whole Hessian, and the Hessian from products taken at once."""

from collections.abc import Callable

import numpy
import pytest
import torch
from compiling import records
from problems import TIGHT, Contraction, LogCosh, LogEnergy, newton_minimum, some_context
from torch import Tensor, nn

from energynet import (
    LBFGS,
    BarzilaiBorwein,
    Compiled,
    GradientDescent,
    ImplicitAdjoint,
    Newton,
    NewtonCG,
    Solver,
    Status,
    Termination,
    fixed_point,
    minimize,
)
from energynet._torch.autodiff import columns
from energynet.linear import Dense
from energynet.solvers.problem import Minimization

ACCURATE = Termination(atol=0.0, rtol=1e-10)
ACCURATE_AT_ZERO = Termination(atol=1e-10, rtol=0.0)


def valley(n: int, condition: float, dtype: torch.dtype = torch.float64) -> Callable[[Tensor, Tensor], Tensor]:
    """½ ‖A x − b‖² + 0.1 Σ log cosh x, the eigenvalues of AᵀA spread evenly from 1 to the condition number."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(m, n, dtype=torch.float64, generator=generator)).Q for m in (n + 16, n))
    A = (left * torch.logspace(0, 0.5 * numpy.log10(condition), n, dtype=torch.float64) @ right.mT).to(dtype)
    return lambda x, b: 0.5 * (x @ A.mT - b).square().sum(-1) + 0.1 * x.cosh().log().sum(-1)


def target(n: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, n + 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def slope(energy: Callable[..., Tensor], x: Tensor, *context: Tensor) -> Tensor:
    gradient: Tensor = torch.func.grad(lambda x: energy(x, *context).sum())(x)
    return gradient


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_few_steps_at_any_condition_number(condition: float) -> None:
    energy, b = valley(64, condition), target(64)
    solution = minimize(energy, b.new_zeros(3, 64), b, solver=Newton(), termination=ACCURATE)
    assert solution.num_steps.max() <= 5
    assert (slope(energy, solution.value, b).norm(dim=-1) <= 1e-9 * condition**0.5 * b.norm(dim=-1)).all()


def test_it_converges_quadratically() -> None:
    energy, b = valley(64, 1e5), target(64, 1)
    trace = minimize(energy, b.new_zeros(1, 64), b, solver=Newton(), termination=ACCURATE, trace=True).trace
    assert trace is not None
    sizes = [float(slope(energy, x, b).norm()) for x in trace.value]
    assert len(sizes) >= 4
    assert sizes[2] < 1e-2 * sizes[1] and sizes[3] < 1e-5 * sizes[2]


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_multiples_of_an_energy_take_the_same_steps(factor: float) -> None:
    def banana(x: Tensor) -> Tensor:
        return 100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (1 - x[:, 0]) ** 2

    x0 = torch.tensor([[-1.2, 1.0], [3.0, -4.0]], dtype=torch.float64)
    expected = minimize(banana, x0, solver=Newton())
    got = minimize(lambda x: factor * banana(x), x0, solver=Newton())
    assert got.num_steps.tolist() == expected.num_steps.tolist()
    torch.testing.assert_close(got.value, expected.value, rtol=0, atol=1e-9)


def test_newton_escapes_from_saddles_and_maxima() -> None:
    """Near the saddle (0, 0), near the maximum (0, 2) and between: the Hessian is indefinite or negative definite there."""

    def energy(x: Tensor) -> Tensor:
        return (x[:, 0] ** 2 - 1).square() + (x[:, 1] ** 2 - 4).square() / 8

    x0 = torch.tensor([[0.01, 2.0], [1e-3, 1e-3], [-0.4, -0.3]], dtype=torch.float64)
    x = minimize(energy, x0, solver=Newton()).value
    torch.testing.assert_close(x, torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64), rtol=0, atol=1e-6)


def test_derivatives_of_closed_form_and_of_a_dense_reference() -> None:
    z = torch.tensor([[0.5, 3.0, 20.0]], dtype=torch.float64, requires_grad=True)
    energy = LogEnergy().requires_grad_(False)
    x = minimize(energy, None, z, solver=Newton(), termination=TIGHT).value
    (first,) = torch.autograd.grad(x.sum(), z, create_graph=True)
    torch.testing.assert_close(first, 1 / z)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), z)[0], -1 / z.detach() ** 2)
    logcosh, z = LogCosh().requires_grad_(False), some_context()
    solve = lambda z: minimize(logcosh, None, z, solver=Newton(), termination=TIGHT).value  # noqa: E731
    dense = lambda row: newton_minimum(logcosh, z.new_zeros(4), row)  # noqa: E731
    torch.testing.assert_close(solve(z), torch.stack([dense(row) for row in z]), rtol=0, atol=1e-10)
    for transform in (torch.func.jacrev, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        found = torch.func.vmap(transform(lambda row: solve(row[None])[0]))(z)
        torch.testing.assert_close(found, torch.stack([transform(dense)(row) for row in z]), rtol=0, atol=1e-8)


def test_one_bad_sample_does_not_affect_others() -> None:
    energy, z = LogCosh(), some_context(4)
    z[1], z[2] = torch.nan, torch.inf
    solution = minimize(energy, None, z, solver=Newton(), on_failure="ignore")
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.NONFINITE, Status.CONVERGED]
    alone = minimize(energy, None, z[[0, 3]], solver=Newton())
    torch.testing.assert_close(solution.value[[0, 3]], alone.value)
    assert solution.num_steps[[0, 3]].tolist() == alone.num_steps.tolist()


def test_where_the_hessian_is_not_finite_it_goes_downhill() -> None:
    """|x|^1.5 bends infinitely at 0, where two samples begin in one coordinate each."""
    z = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    energy = lambda x, z: x.abs().pow(1.5).sum(-1) + (x - 2 * z).square().sum(-1)  # noqa: E731
    x0 = torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.5, 0.5]], dtype=torch.float64)
    x = minimize(energy, x0, z, solver=Newton(), on_failure="ignore").value
    assert x[2] == pytest.approx(x[2, :1].expand(2).tolist())
    assert float(slope(energy, x[2:], z[2:]).norm()) < 1e-6
    assert (energy(x, z) < energy(x0, z)).all()


def test_escape_from_a_coordinate_with_infinite_curvature() -> None:
    """At 0 the Hessian is infinite, with a Cholesky factor all the same, and the gradient is not zero."""
    z = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    energy = lambda x, z: x.clamp(min=0).pow(1.5).sum(-1) + (x - 2 * z).square().sum(-1)  # noqa: E731
    x0 = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64)
    x = minimize(energy, x0, z, solver=Newton(), termination=ACCURATE).value
    torch.testing.assert_close(slope(energy, x, z), torch.zeros_like(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("factor", [1e-8, 1.0])
@pytest.mark.parametrize("solver", [Newton(), NewtonCG()], ids=str)
def test_no_step_goes_over_a_wall_behind_which_the_slope_is_as_foretold(solver: Solver, factor: float) -> None:
    """On either side of it the energy is nearly the same parabola, but it lies 100 higher behind."""
    wall = lambda x: factor * (0.5 * (x - 3) ** 2 + 100 * torch.sigmoid(50 * (x - 1))).sum(-1)  # noqa: E731
    x0 = torch.linspace(-6, 0.9, 40, dtype=torch.float64).unsqueeze(-1)
    found = minimize(wall, x0, solver=solver)
    assert (wall(found.value) <= wall(x0)).all() and (slope(wall, found.value).abs() <= 1e-6 * factor).all()


@pytest.mark.parametrize("beyond", [torch.inf, torch.nan])
@pytest.mark.parametrize("solver", [Newton(), NewtonCG(), NewtonCG(radius=10.0)], ids=str)
def test_no_step_leaves_the_domain_of_an_energy(solver: Solver, beyond: float) -> None:
    """Its gradient is the same outside of it, where the unconstrained minimum lies."""
    z = torch.tensor([[2.0, 0.3], [0.5, 0.3]], dtype=torch.float64)
    energy = lambda x, z: (x - z).square().sum(-1) + torch.where((x < 1).all(-1), 0.0, beyond)  # noqa: E731
    few = Termination(max_steps=100)
    found = minimize(energy, torch.zeros_like(z), z, solver=solver, termination=few, on_failure="ignore")
    assert (found.value < 1).all() and (energy(found.value, z) <= energy(torch.zeros_like(z), z)).all()
    assert found.converged.tolist() == [False, True]


@pytest.mark.parametrize("solver", [Newton(), Newton(radius=1.0), NewtonCG()], ids=str)
def test_a_newton_step_however_long_is_shortened_at_once(solver: Solver) -> None:
    """Where the curvature of x + exp(−x) vanishes, the step to the minimum of the parabola is of length exp x."""
    x0 = torch.tensor([[20.0], [60.0], [500.0]], dtype=torch.float64)
    found = minimize(lambda x: (x + (-x).exp()).sum(-1), x0, solver=solver, termination=ACCURATE_AT_ZERO)
    torch.testing.assert_close(found.value, torch.zeros_like(x0), rtol=0, atol=1e-9)
    assert found.num_steps.max() <= 30


@pytest.mark.parametrize("solver", [Newton(), NewtonCG()], ids=str)
def test_a_product_that_is_not_finite_leads_downhill(solver: Solver) -> None:
    """|x|^1.5 bends infinitely at 0, where one of two coordinates begins."""
    energy = lambda x: (x.abs().pow(1.5) + (x - 1).square()).sum(-1)  # noqa: E731
    x = minimize(energy, torch.tensor([[0.0, 5.0]], dtype=torch.float64), solver=solver, termination=ACCURATE).value
    torch.testing.assert_close(slope(energy, x), torch.zeros_like(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1.0])
@pytest.mark.parametrize("solver", [LBFGS(), Newton(), NewtonCG(), GradientDescent(BarzilaiBorwein())], ids=str)
def test_infinite_curvature_does_not_make_an_answer_of_a_slope(solver: Solver, factor: float) -> None:
    """A gradient divided by it is 0, however steep: x = 0 is no minimum, and 1 is."""
    energy = lambda x: factor * (x.clamp(min=0).pow(1.5) - 1.5 * x).sum(-1)  # noqa: E731
    found = minimize(energy, torch.zeros(1, 1, dtype=torch.float64), solver=solver, on_failure="ignore")
    if found.status.item() == Status.CONVERGED:
        assert found.value.item() == pytest.approx(1, abs=1e-6)
    else:
        assert not found.error.item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    b = target(5)
    exact = minimize(valley(5, 10.0), b.new_zeros(3, 5), b, solver=Newton(), termination=ACCURATE).value
    limit = Termination(atol=0.0, rtol=4 * torch.finfo(dtype).eps)
    x = minimize(valley(5, 10.0, dtype), torch.zeros(3, 5, dtype=dtype), b.to(dtype), solver=Newton(), termination=limit,
                 on_failure="ignore").value  # fmt: skip
    assert x.dtype == dtype
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=30 * torch.finfo(dtype).eps)


@records
def test_a_program_takes_the_same_steps(interpreted: bool) -> None:
    driver = Compiled(strict=True)
    for batch in (3,) if interpreted else (3, 4):  # the second is compiled for every size, as in `test_batches`
        b = target(12, batch)
        z = b.clone().requires_grad_()
        found = []
        for each in ({}, {"driver": driver}):
            solution = minimize(valley(12, 1e4), b.new_zeros(batch, 12), z, solver=Newton(), termination=ACCURATE, **each)
            found.append((solution, torch.autograd.grad(solution.value.square().sum(), z)[0]))
        (expected, gradient), (got, again) = found
        torch.testing.assert_close(got.value, expected.value, rtol=0, atol=1e-9)
        torch.testing.assert_close(again, gradient, rtol=0, atol=1e-7)
        assert (got.num_steps - expected.num_steps).abs().max() <= 1


@records
def test_a_program_leaves_a_saddle() -> None:
    saddle = lambda x: (x[:, 0] ** 2 - 1) ** 2 + x[:, 1] ** 2  # noqa: E731
    x0 = torch.tensor([[0.01, 1.0], [-0.01, 1.0]], dtype=torch.float64)
    x = minimize(saddle, x0, solver=Newton(), driver=Compiled(strict=True)).value
    torch.testing.assert_close(x, torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 3), (0, 3), (2, 0), (0, 0)], ids=str)
def test_columns_are_the_matrix_of_each_sample(shape: tuple[int, ...]) -> None:
    A = torch.randn(*shape, shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = lambda p: (A @ p.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    x = A.new_zeros(shape)
    problem = Minimization(product, lambda x: product, start=x, value_and_gradient=lambda x: (x.sum(-1), x))
    torch.testing.assert_close(problem.matrix(x), A, rtol=0, atol=0)
    torch.testing.assert_close(columns(product, x).movedim(0, -1), A, rtol=0, atol=0)


class ByNumPy(torch.autograd.Function):
    """x³, whose derivatives leave PyTorch, so that they cannot be mapped."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x**3

    @staticmethod
    def backward(ctx: object, v: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return SlopeByNumPy.apply(x, v)  # type: ignore[no-any-return]


class SlopeByNumPy(torch.autograd.Function):
    """3 x² v."""

    @staticmethod
    def forward(ctx: object, x: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(x, v)  # type: ignore[attr-defined]
        return 3 * x**2 * v

    @staticmethod
    def backward(ctx: object, u: Tensor) -> tuple[Tensor, Tensor]:
        x, v = (t.detach().numpy() for t in ctx.saved_tensors)  # type: ignore[attr-defined]
        return torch.from_numpy(6 * x * v * u.detach().numpy()), torch.from_numpy(3 * x**2 * u.detach().numpy())


def test_products_that_cannot_be_taken_at_once_are_taken_one_by_one() -> None:
    z = torch.tensor([[2.0, 5.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    energy = lambda x, z: (ByNumPy.apply(x) * x.detach().sign() - z * x).sum(-1)  # noqa: E731
    x = minimize(energy, torch.ones(2, 2, dtype=torch.float64), z, solver=Newton(), termination=ACCURATE,
                 adjoint=ImplicitAdjoint(Dense())).value  # fmt: skip
    torch.testing.assert_close(x, (z / 3).sqrt())
    torch.testing.assert_close(torch.autograd.grad(x.sum(), z)[0], 0.5 / (3 * z).sqrt().detach())


class Inner(nn.Module):
    """½ (y − 3)² + ½ x² with y the root of a network at x: a solve inside the energy."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Contraction().requires_grad_(False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = fixed_point(self.network, x.new_zeros(len(x), 4), x, termination=TIGHT, adjoint=ImplicitAdjoint(Dense())).value
        return 0.5 * (y - 3 * z).square().sum(-1) + 0.5 * x.square().sum(-1)


def test_a_solve_inside_the_energy_is_mapped() -> None:
    energy, z = Inner(), torch.tensor([[0.2], [0.5]], dtype=torch.float64)
    x = minimize(energy, z.new_zeros(2, 3), z, solver=Newton(), termination=ACCURATE).value
    assert (slope(energy, x, z).norm(dim=-1) < 1e-8).all()

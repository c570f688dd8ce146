"""When a solve says that it converged: in any units, beyond rounding, at minima only, and of maps as far as they contract."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from energynet import (
    LBFGS,
    Anderson,
    Broyden,
    ConvergenceError,
    ImplicitAdjoint,
    Newton,
    NewtonCG,
    Picard,
    Prox,
    Solver,
    Status,
    Termination,
    fixed_point,
    minimize,
)
from energynet.constraints import L1, Affine, Box, CappedSimplex, L2Ball, NonNegative, Simplex
from energynet.engine.newton_step import Effort, newton_step
from energynet.linear import GMRES, MINRES, BiCGSTAB, ConjugateGradient, Dense
from energynet.solvers import Nesterov
from energynet.solvers.gradient_descent import BarzilaiBorwein, GradientDescent
from energynet.solvers.problem import Minimization
from energynet.termination import l2_norm

MINIMIZERS = [LBFGS(), Newton(), NewtonCG(), GradientDescent(), GradientDescent(BarzilaiBorwein()), Picard(), Nesterov(),
              Anderson(), Broyden()]  # fmt: skip
DESCENDING = [solver for solver in MINIMIZERS if solver.descends]
each = pytest.mark.parametrize("solver", MINIMIZERS, ids=repr)


@each
@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1e-4, 1e4, 1e8])
def test_an_answer_is_as_accurate_in_any_units_of_x(solver: Solver, unit: float) -> None:
    energy = lambda x, z: ((x - z).square() / unit**2 / 2 + (x / unit) ** 4 / 4).sum(-1)  # noqa: E731
    z = torch.full((1, 1), unit, requires_grad=True)
    solution = minimize(energy, torch.zeros(1, 1), z, solver=solver)
    assert solution.value.item() / unit == pytest.approx(0.682327804, rel=1e-3)
    assert torch.autograd.grad(solution.value.sum(), z)[0].item() == pytest.approx(0.417237, rel=1e-3)


@each
@pytest.mark.parametrize("far", [3e12, 1e20])
def test_an_answer_far_from_a_start_at_zero_is_no_divergence(solver: Solver, far: float) -> None:
    solution = minimize(lambda x: ((x - far) / far).square().sum(-1), torch.zeros(1, 1, dtype=torch.float64), solver=solver)
    assert solution.value.item() == pytest.approx(far, rel=3e-8)


def test_a_given_tolerance_is_in_units_of_x() -> None:
    energy = lambda x: (x / 1e-6 - 1).square().sum(-1)  # noqa: E731
    solution = minimize(energy, torch.zeros(1, 1), termination=Termination(atol=1e-3, rtol=0.0))
    assert solution.num_steps.item() == 0 and solution.error.item() == pytest.approx(1e-6)


@pytest.mark.parametrize("atol", [1e-8, 0.0])
def test_a_tolerance_below_rounding_is_raised_to_what_can_be_reached(atol: float) -> None:
    z = torch.linspace(0.5, 2, 6, dtype=torch.float64).reshape(2, 3)
    energy = lambda x, z: (x.exp() - z * x).sum(-1)  # noqa: E731
    solution = minimize(energy, torch.zeros_like(z), z, solver=Newton(), termination=Termination(atol=atol, rtol=0.0))
    torch.testing.assert_close(solution.value, z.log(), rtol=0, atol=max(atol, 1e-15))


def wells(x: Tensor) -> Tensor:
    return (x[:, 0] ** 2 - 1) ** 2 + x[:, 1:].square().sum(-1)


@each
@pytest.mark.parametrize("n", [1, 2, 12])
def test_minimizers_escape_from_saddles_on_the_way_and_at_the_start(solver: Solver, n: int) -> None:
    x0 = torch.zeros(2, n, dtype=torch.float64)
    x0[1, 1:] = 1
    solution = minimize(wells, x0, solver=solver, on_failure="ignore")
    assert solution.converged.all() or isinstance(solver, Anderson | Broyden)  # these may go anywhere
    found = solution.value[solution.converged, 0]
    torch.testing.assert_close(found.abs(), torch.ones_like(found), rtol=0, atol=3e-8)


@pytest.mark.parametrize("prox", [None, Box(-2.0, 2.0)], ids=repr)
@pytest.mark.parametrize("n", [1, 2, 30])
def test_escape_from_a_maximum_without_curvature(n: int, prox: Prox | None) -> None:
    """−x⁴ + x⁶ has neither slope nor curvature at 0; its minima are at x² = 2/3."""
    x0 = torch.zeros(3, n, dtype=torch.float64)
    x0[1] = 0.5
    solution = minimize(lambda x: (-x.pow(4) + x.pow(6)).sum(-1), x0, prox=prox)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value.abs(), torch.full_like(x0, (2 / 3) ** 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("energy", [lambda x: x.pow(4).sum(-1), lambda x: 0 * x.sum(-1) + 1], ids=["x⁴", "constant"])
def test_a_minimum_without_curvature_is_kept(energy: Callable[[Tensor], Tensor]) -> None:
    for n in (2, 30):
        solution = minimize(energy, torch.zeros(2, n, dtype=torch.float64))
        assert solution.converged.all() and not solution.value.any() and not solution.num_steps.any()


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_escape_from_a_saddle_does_not_depend_on_units(unit: float) -> None:
    solution = minimize(lambda x: ((x / unit) ** 2 - 1).square().sum(-1), torch.zeros(1, 1))
    assert abs(solution.value.item()) == pytest.approx(unit, rel=1e-3)


@each
def test_a_maximum_is_no_answer(solver: Solver) -> None:
    x0 = torch.tensor([[0.3], [0.0]], dtype=torch.float64)
    solution = minimize(lambda x: x.cos().sum(-1), x0, solver=solver, on_failure="ignore")
    assert solution.converged.all() or not solver.descends
    least = 1e-12 - 1 if solver.descends else -0.9  # others may go far, where x is known to ε‖x‖
    assert (solution.value[solution.converged].cos() < least).all()


MISRA_Y = [10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78]
MISRA_X = [77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0]


def misra1d(b: Tensor) -> Tensor:
    """NIST, nonlinear least squares: certified 437.36970754, 3.0227324449e-4 and RSS 5.6419295283e-2."""
    x, y = (torch.tensor(t, dtype=b.dtype) for t in (MISRA_X, MISRA_Y))
    return (b[:, :1] * b[:, 1:] * x / (1 + b[:, 1:] * x) - y).square().sum(-1)


@pytest.mark.parametrize("solver", [LBFGS(), Newton()], ids=repr)
def test_variables_of_very_different_scale_do_not_hide_the_distance(solver: Solver) -> None:
    solution = minimize(misra1d, torch.tensor([[500.0, 1e-4]], dtype=torch.float64), solver=solver)
    exact = torch.tensor([[437.36970754, 3.0227324449e-4]], dtype=torch.float64)
    torch.testing.assert_close(solution.value, exact, rtol=1e-9, atol=0)
    off = torch.tensor([[535.0856888083281, 0.00024245115824808827]], dtype=torch.float64)  # along the valley
    far = minimize(misra1d, off, termination=Termination(max_steps=0), on_failure="ignore")
    assert far.error.item() > 1  # 98 from the answer


def rayleigh(x: Tensor, A: Tensor) -> Tensor:
    return (x * (A @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) / x.square().sum(-1)


def symmetric(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(batch, 5, 5, dtype=torch.float64, generator=generator)
    return A + A.mT, torch.randn(batch, 5, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("solver", DESCENDING, ids=repr)
def test_a_gauge_direction_fails_no_solve(solver: Solver) -> None:
    A, x0 = symmetric(200 if isinstance(solver, LBFGS) else 20)
    solution = minimize(rayleigh, x0, A, solver=solver)
    torch.testing.assert_close(rayleigh(solution.value, A), torch.linalg.eigvalsh(A)[:, 0], rtol=0, atol=1e-12)


def lennard_jones(x: Tensor) -> Tensor:  # (B, 3 k)
    p = x.reshape(x.shape[0], -1, 3)
    i, j = torch.triu_indices(p.shape[1], p.shape[1], 1)
    inverse = (p[:, i] - p[:, j]).square().sum(-1) ** -3
    return (4 * (inverse**2 - inverse)).sum(-1)


@pytest.mark.parametrize("atoms, least", [(3, -3.0), (4, -6.0), (5, -9.103852)])
@pytest.mark.parametrize("solver", [LBFGS(), Newton(), NewtonCG()], ids=repr)
def test_rigid_motions_of_a_molecule_fail_no_solve(solver: Solver, atoms: int, least: float) -> None:
    x0 = torch.randn(8, 3 * atoms, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    energies = lennard_jones(minimize(lennard_jones, x0, solver=solver).value)
    assert energies.amin().item() == pytest.approx(least, abs=1e-6)


def squared_distances(x: Tensor) -> Tensor:  # (B, atoms, 3) -> (B, pairs)
    i, j = torch.triu_indices(x.shape[-2], x.shape[-2], 1)
    return (x[:, i] - x[:, j]).square().sum(-1)


def test_rigid_motions_fail_no_adjoint_of_a_point_that_is_not_quite_the_minimum() -> None:
    """There their curvature is as large as the gradient that is left, and may be negative."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 4, 3, dtype=torch.float64, generator=generator)
    x0 = (x + 0.05 * torch.randn(x.shape, dtype=torch.float64, generator=generator))[:20]
    d = squared_distances(x[:20]).requires_grad_()
    answer = minimize(lambda x, d: (squared_distances(x) - d).square().sum(-1), x0, d).value
    weight = torch.arange(6, dtype=torch.float64)
    (found,) = torch.autograd.grad((weight * squared_distances(answer)).sum(), d)
    torch.testing.assert_close(found, weight.expand_as(d), rtol=0, atol=1e-3)


def test_newton_does_not_move_along_a_gauge_direction() -> None:
    p = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    x = minimize(lambda x, p: x.logsumexp(-1) - (p * x).sum(-1), torch.zeros_like(p), p, solver=Newton()).value
    torch.testing.assert_close(x, p.log() - p.log().mean(-1, keepdim=True), rtol=0, atol=1e-7)


SLOW = [("x + 1", lambda x: x + 1), ("x + e⁻ˣ", lambda x: x + (-x).exp())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Nesterov()], ids=repr)
@pytest.mark.parametrize("g", [g for _, g in SLOW], ids=[name for name, _ in SLOW])
def test_a_map_without_a_fixed_point_does_not_converge(g, solver: Solver, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    limit = Termination(max_steps=3000 if isinstance(solver, Picard) and dtype is torch.float32 else 100)
    solution = fixed_point(g, torch.zeros(1, 1, dtype=dtype), solver=solver, termination=limit, on_failure="ignore")
    assert not solution.converged.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.5, 0.99, 0.999])
@pytest.mark.parametrize("steps", [0, 300, 1400])
def test_the_error_of_a_map_is_its_distance(rate: float, dtype: torch.dtype, steps: int) -> None:
    answer = 1 / (1 - rate)
    limit = Termination(max_steps=steps)
    solution = fixed_point(lambda x: rate * x + 1, torch.zeros(2, 1, dtype=dtype), termination=limit, on_failure="ignore")
    distance = (solution.value - answer).abs().amax().item()
    assert 0.95 * distance - 1e-3 * answer <= solution.error.amax().item() <= 1.2 * distance + 1e-3 * answer
    if solution.converged.any():
        assert distance <= 2 * torch.finfo(dtype).eps ** 0.5 * answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [1.0, 4.2736, 6.0])
def test_a_map_that_explodes_is_far_from_a_fixed_point(start: float, dtype: torch.dtype) -> None:
    """x = exp(x) has no solution; at exp(exp(x)) the map is so steep, or infinite, that the distance to one would seem nil."""
    x0 = torch.full((1, 2), start, dtype=dtype)
    for budget in (0, 20):
        solution = fixed_point(torch.exp, x0, solver=Broyden(), termination=Termination(max_steps=budget), on_failure="ignore")
        assert not solution.converged.any() and not (solution.error < 1e-3).any()


def test_a_steep_map_is_solved_as_accurately() -> None:
    """g′ = −1000: far from contracting, which does not matter to Broyden."""
    for dtype, steps in ((torch.float32, 10), (torch.float64, 10)):
        solution = fixed_point(lambda x: 1 - 1000 * x, torch.zeros(2, 1, dtype=dtype), solver=Broyden())
        assert solution.converged.all() and int(solution.num_steps.max()) <= steps
        torch.testing.assert_close(solution.value, torch.full_like(solution.value, 1 / 1001), rtol=3e-4, atol=0)


def test_a_turning_map_is_not_taken_for_a_slow_one() -> None:
    turn = torch.tensor([[0.0, 0.9], [-0.9, 0.0]], dtype=torch.float64)
    solution = fixed_point(lambda x: x @ turn.mT + 1, torch.zeros(1, 2, dtype=torch.float64), on_failure="ignore",
                           termination=Termination(max_steps=20))  # fmt: skip
    exact = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - turn, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(solution.error, (solution.value - exact).norm(dim=-1), rtol=1e-6, atol=0)
    assert (solution.status == Status.MAX_STEPS).all()


def test_a_maximum_within_bounds_is_not_a_solution() -> None:
    z = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    x0 = torch.full((1, 1), 0.5, dtype=torch.float64)
    solution = minimize(lambda x, z: -(x - z).square().sum(-1), x0, z, prox=Box(0.0, 1.0))
    assert solution.value.item() in (0.0, 1.0)
    assert torch.autograd.grad(solution.value.sum(), z)[0].item() == 0


SETS = {
    "simplex": (Simplex(), 0.5, [0.0, 1.0]),
    "capped simplex": (CappedSimplex(0.8), 0.5, [0.2, 0.8]),
    "ball": (L2Ball(1.0), 0.5, [0.5**0.5, 0.5**0.5]),
    "a callable": (lambda x, step_size: x.clamp(0.0, 1.0), 0.5, [0.0, 1.0]),
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("prox, middle, sizes", SETS.values(), ids=SETS)
def test_a_maximum_under_any_prox_is_no_answer(prox: Any, middle: float, sizes: list[float], batched: bool) -> None:
    def solved(x0: Tensor) -> Tensor:
        value: Tensor = minimize(lambda x: -(x - middle).square().sum(-1), x0, prox=prox).value
        return value

    x0 = torch.full((3, 1, 2), middle, dtype=torch.float64)
    x = torch.func.vmap(solved)(x0)[0] if batched else solved(x0[0])
    assert x.abs().sort().values[0].tolist() == pytest.approx(sizes, abs=1e-6)


def test_a_maximum_under_a_prox_that_the_energy_falls_from_for_ever_fails() -> None:
    x0 = torch.full((1, 2), 0.5, dtype=torch.float64)
    line = Affine(torch.ones(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        minimize(lambda x: -(x - 0.5).square().sum(-1), x0, prox=line)


@pytest.mark.parametrize("prox", [NonNegative(), Box(0.0, 3.0)], ids=repr)
def test_an_even_energy_is_left_from_the_bound_at_zero(prox: Prox) -> None:
    x = minimize(lambda x: (x.square() - 1).square().sum(-1), torch.zeros(2, 2, dtype=torch.float64), prox=prox).value
    torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=1e-7)


def test_a_minimum_at_a_kink_of_the_prox_is_kept() -> None:
    double_well = lambda x: 0.1 * (x.square() - 1).square().sum(-1)  # noqa: E731  # a maximum at 0, where L1 has its kink
    solution = minimize(double_well, torch.zeros(2, 3, dtype=torch.float64), prox=L1(0.05))
    assert solution.converged.all() and not solution.value.any()


@pytest.mark.parametrize(
    "linear", [ConjugateGradient(), pytest.param(MINRES(), marks=pytest.mark.slow), GMRES(), Dense()], ids=repr
)
def test_the_energy_at_the_answer_is_differentiable_along_a_gauge_direction(linear: Solver) -> None:
    A, x0 = symmetric(20)
    A.requires_grad_()
    x = minimize(rayleigh, x0, A, solver=Newton(), adjoint=ImplicitAdjoint(linear)).value
    (found,) = torch.autograd.grad(rayleigh(x, A).sum(), A)
    u = torch.linalg.eigh(A.detach())[1][..., 0]
    torch.testing.assert_close(found, u.unsqueeze(-1) * u.unsqueeze(-2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("linear", [ConjugateGradient(), MINRES(), GMRES(), Dense(), BiCGSTAB()], ids=repr)
def test_an_adjoint_is_asked_for_no_more_than_can_be_reached(linear: Solver) -> None:
    z = torch.linspace(0.5, 2, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    energy = lambda x, z: (x.exp() - z * x).sum(-1) + 0.5 * x.sum(-1).square()  # noqa: E731
    limit = Termination(atol=1e-8, rtol=0.0)
    x = minimize(energy, torch.zeros(2, 3, dtype=torch.float64), z, termination=limit, adjoint=ImplicitAdjoint(linear)).value
    hessian = torch.diag_embed(x.detach().exp()) + 1
    exact = torch.linalg.solve(hessian, torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(torch.autograd.grad(x.sum(), z)[0], exact, rtol=0, atol=1e-12)


def diffusion(x: Tensor, z: Tensor) -> Tensor:  # (B, n) or (B, H, W), data in the left eighth, smoothness everywhere
    width = x.shape[-1] // 8
    value = 0.5 * (x - z)[..., :width].square().flatten(1).sum(-1)
    for dim in range(1, x.ndim):
        value = value + 0.5 * x.diff(dim=dim).square().flatten(1).sum(-1)
    return value


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


@pytest.mark.parametrize("solver", [LBFGS(), NewtonCG()], ids=["lbfgs", "newton-cg"])
@pytest.mark.parametrize("shape", [(32,), (64,), (128,), (6, 8), (12, 16), (24, 32)], ids=str)
def test_the_estimate_sees_across_a_region_without_data(shape: tuple[int, ...], solver: Solver) -> None:
    z = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2
    termination = Termination(atol=0.02, rtol=0.0, norm=rms, max_steps=3000)
    found = minimize(diffusion, torch.zeros_like(z), z, solver=solver, termination=termination)
    n = z.numel()
    hessian = torch.func.hessian(lambda x: diffusion(x.view_as(z), z).sum())(z.new_zeros(n))
    slope = torch.func.grad(lambda x: diffusion(x.view_as(z), z).sum())(found.value.flatten())
    distance = float(rms(torch.linalg.solve(hessian, slope)))
    assert distance / 3 <= float(found.error) <= 1.01 * distance
    assert distance <= 0.06


@pytest.mark.parametrize("kappa", [1.0, 3.0, 10.0])
def test_well_conditioned_ones_take_as_few_products_as_ever(kappa: float) -> None:
    curvature = torch.linspace(1, kappa, 500, dtype=torch.float64)
    products: list[Tensor] = []

    def product(p: Tensor) -> Tensor:
        products.append(p)
        return curvature * p

    gradient = torch.randn(1, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = Minimization(lambda x: gradient, lambda x: product, value_and_gradient=lambda x: (x.sum(-1), gradient),
                           start=torch.zeros_like(gradient))  # fmt: skip
    step = newton_step(problem, problem.start, gradient.sum(-1), gradient, Effort(l2_norm))
    assert len(products) <= 11
    assert float(step.length) == pytest.approx(float((gradient / curvature).norm()), rel=0.1)

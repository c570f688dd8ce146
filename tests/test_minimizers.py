"""The minimizers, on the classic test functions and where they could go wrong."""

import math
from typing import Any

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CLASSICS, CONVEX, TIGHT, Classic, LogCosh, newton_minimum, some_context
from torch import Tensor

from energynet import (
    FPI_GD,
    LBFGS,
    Anderson,
    Backtracking,
    BarzilaiBorwein,
    Compiled,
    GradientDescent,
    ImplicitAdjoint,
    MultiStart,
    Nesterov,
    Newton,
    NewtonCG,
    Picard,
    Solver,
    Status,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet.constraints import Box, NonNegative, Simplex
from energynet.solvers import BacktrackingStep, FixedStep

ALL = [LBFGS(), LBFGS(search=Backtracking()), Newton(), NewtonCG(), GradientDescent(),
       GradientDescent(BarzilaiBorwein()), GradientDescent(FixedStep()), Nesterov(), Anderson(), Picard()]  # fmt: skip
ROBUST = [LBFGS(), Newton(), NewtonCG()]


def reaches_a_minimum(problem: Classic, energy: float) -> bool:
    return any(abs(energy - least) <= 1e-6 * abs(least) + 1e-9 for least in problem.minima)


@pytest.mark.parametrize("solver", [LBFGS(), *(pytest.param(s, marks=pytest.mark.slow) for s in ROBUST[1:])], ids=repr)
@pytest.mark.parametrize("problem", CLASSICS, ids=lambda p: p.name)
def test_classic_function_is_solved(problem: Classic, solver: Solver) -> None:
    x0 = torch.tensor([problem.start], dtype=torch.float64)
    limit = Termination(atol=1e-9, rtol=1e-9, max_steps=3000)
    x = minimize(problem.energy, x0, solver=solver, termination=limit, on_failure="ignore").value
    assert reaches_a_minimum(problem, problem.energy(x).item())


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_every_minimizer_agrees_with_newton_to_second_order(solver: Solver) -> None:
    energy, z = LogCosh(), some_context(requires_grad=True)
    x = minimize(energy, None, z, solver=solver, termination=TIGHT).value
    expected = torch.stack([newton_minimum(energy, torch.zeros(4, dtype=torch.float64), row) for row in z])
    for mine, theirs in ((x, expected), *zip(*_derivatives((x, expected), z), strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)


def _derivatives(values: tuple[Tensor, Tensor], z: Tensor) -> list[list[Tensor]]:
    found = []
    for value in values:
        (first,) = torch.autograd.grad(value.sin().sum(), z, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), z, retain_graph=True)])
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3),
       st.sampled_from([None, LBFGS(), GradientDescent(BarzilaiBorwein()), Newton(), NewtonCG()]))  # fmt: skip
def test_unknown_step_size_converges_on_convex_energies_of_any_scale(seed: int, exponent: float, solver: Solver | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(3, 7, 5, dtype=torch.float64, generator=generator)
    target = torch.randn(3, 7, dtype=torch.float64, generator=generator)

    def energy(x: Tensor) -> Tensor:
        fit = 0.5 * ((matrix @ x[..., None])[..., 0] - target).square().sum(-1)
        return 10**exponent * (fit + 0.1 * x.cosh().sum(-1))

    limit = Termination(max_steps=5000)
    solution = minimize(energy, torch.full((3, 5), 2.0, dtype=torch.float64), solver=solver, termination=limit)
    slope = torch.func.grad(lambda x: energy(x).sum())(solution.value)
    assert (slope.norm(dim=-1) <= 1e-5 * 10**exponent).all()


GUARDED = [None, Newton(), NewtonCG(), GradientDescent(BarzilaiBorwein()), Nesterov()]
BOX = Box(-0.5, 0.5)
ZERO = torch.zeros(4, 6, dtype=torch.float64)
MILD = Termination(atol=1e-7, rtol=1e-7, max_steps=10_000)


@pytest.mark.parametrize("exponent", [pytest.param(-8, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("name", CONVEX)
def test_convex_energies_need_no_step_size(name: str, exponent: int) -> None:
    energy = CONVEX[name]
    exact = minimize(energy, ZERO, solver=NewtonCG(), termination=TIGHT, on_failure="ignore").value
    for solver in GUARDED:
        x = minimize(lambda x: 10.0**exponent * energy(x), ZERO, solver=solver, termination=MILD).value
        torch.testing.assert_close(x, exact, rtol=0, atol=1e-4, msg=lambda m, solver=solver: f"{solver}: {m}")


@pytest.mark.parametrize("exponent", [-8, 0, 8])
@pytest.mark.parametrize("name", CONVEX)
def test_constrained_convex_energies_need_no_step_size(name: str, exponent: int) -> None:
    energy = CONVEX[name]
    x = minimize(lambda x: 10.0**exponent * energy(x), ZERO, prox=BOX, termination=MILD).value
    slope = torch.func.grad(lambda x: energy(x).sum())(x)
    scale = torch.linalg.eigvalsh(torch.func.vmap(torch.func.hessian(lambda x: energy(x.expand(4, 6))[0]))(x)).amax()
    assert ((BOX(x - slope / scale, 1.0) - x).abs() <= 1e-5).all()


@pytest.mark.slow
def test_a_guessed_step_size_changes_no_derivative() -> None:
    z = torch.tensor([[0.5, 3.0, 20.0]], dtype=torch.float64, requires_grad=True)  # exp(x) = z, but x ≤ 2
    energy = lambda x, z: (x.exp() - z * x).sum(-1)  # noqa: E731
    limits = {"prox": Box(None, 2.0), "termination": TIGHT}
    for solver in (Nesterov(), Picard()):
        solve = lambda z, solver=solver: minimize(energy, torch.zeros_like(z), z, solver=solver, **limits).value  # noqa: E731
        x = solve(z)
        torch.testing.assert_close(x, z.log().clamp(max=2), rtol=0, atol=1e-9)
        (first,) = torch.autograd.grad(x.sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z)
        inside = z.log() < 2
        torch.testing.assert_close(first, torch.where(inside, 1 / z, 0), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(second, torch.where(inside, -1 / z**2, 0), rtol=1e-7, atol=1e-12)
        steps: dict[str, Any] = {"solver": solver, "step_size": 0.04, "termination": TIGHT}  # a guess has no derivative
        unrolled = minimize(energy, torch.zeros_like(z), z, adjoint=UnrolledAdjoint(), **steps).value
        torch.testing.assert_close(torch.autograd.grad(unrolled.sum(), z)[0], 1 / z, rtol=1e-6, atol=0)
        rows = torch.stack([z.detach(), 2 * z.detach()])
        torch.testing.assert_close(torch.func.vmap(solve)(rows), rows.log().clamp(max=2), rtol=0, atol=1e-9)
        slopes = torch.func.vmap(torch.func.jacrev(lambda z, solve=solve: solve(z).sum()))(rows)
        torch.testing.assert_close(slopes, torch.where(rows.log() < 2, 1 / rows, 0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("solver", [Picard(), Nesterov()], ids=repr)
def test_a_guessed_step_size_costs_no_second_evaluation(solver: Solver) -> None:
    seen: list[Tensor] = []

    def energy(x: Tensor) -> Tensor:
        seen.append(x)
        return (x.square().square() + 0.01 * x.square()).sum(-1)

    def cost(steps: int) -> int:
        seen.clear()
        limit = Termination(atol=1e-30, rtol=0, max_steps=steps)
        minimize(energy, torch.full((1, 2), 5.0), solver=solver, termination=limit, on_failure="ignore")
        return len(seen)

    cost(1)  # the first solve of an energy looks at its second derivatives as well
    assert cost(40) - cost(20) == 20


@pytest.mark.parametrize("solver", [Picard(), Nesterov(), Nesterov(restart=False)], ids=repr)
def test_a_step_out_of_the_domain_is_rejected(solver: Solver) -> None:
    """Momentum may lead out of it where the step itself would not: then a shorter step alone does not help."""
    pull = torch.arange(1.0, 6.0, dtype=torch.float64)
    barrier = lambda x: (pull * x - (1 - x).log() - 0.01 * x.log()).sum(-1)  # noqa: E731
    limit = Termination(atol=0, rtol=1e-6, max_steps=20_000)
    x = minimize(barrier, torch.full((1, 5), 0.5, dtype=torch.float64), solver=solver, termination=limit).value
    half = (pull + 1 + 0.01) / 2  # where the slope, a + 1/(1 − x) − c/x, is zero, a x² − (a + 1 + c) x + c is
    torch.testing.assert_close(x[0], (half - (half.square() - 0.01 * pull).sqrt()) / pull, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prox", [None, Box(-10.0, 10.0)], ids=repr)
@pytest.mark.parametrize("solver", [Picard(), Nesterov()], ids=repr)
def test_no_step_of_estimated_size_crosses_a_wall(solver: Solver, prox: Box | None) -> None:
    """Behind it the slope is nearly that of the same parabola, and the energy lies 100 higher."""
    wall = lambda x: (0.5 * (x - 3) ** 2 + 100 * torch.sigmoid(50 * (x - 1))).sum(-1)  # noqa: E731
    x0 = torch.linspace(-6, 0.9, 40, dtype=torch.float64).unsqueeze(-1)
    assert (wall(minimize(wall, x0, solver=solver, prox=prox).value) <= wall(x0)).all()


@pytest.mark.parametrize("solver", [Picard(), Nesterov()], ids=repr)
def test_a_step_to_an_infinite_slope_is_rejected(solver: Solver) -> None:
    """The entropy is finite at the edge of the simplex, and so is √x at 0: their slopes are not."""
    z = torch.tensor([[3.0, 0.0, -3.0], [1.0, 0.0, 0.5]], dtype=torch.float64)
    entropy = lambda x, z: (torch.xlogy(x, x) - z * x).sum(-1)  # noqa: E731
    x = minimize(entropy, torch.full_like(z, 1 / 3), z, solver=solver, prox=Simplex()).value
    torch.testing.assert_close(x, z.softmax(-1), rtol=0, atol=1e-6)
    root = lambda x: (5 * (x + 5).square() - x.sqrt()).sum(-1)  # noqa: E731
    x = minimize(root, torch.ones(1, 1, dtype=torch.float64), solver=solver, prox=NonNegative()).value
    assert (10 * (x + 5) * x.sqrt()).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("pull", [-0.1, -1.0, -5.0, -20.0])
@pytest.mark.parametrize("solver", [Picard(), Nesterov()], ids=repr)
def test_a_step_next_to_an_infinite_slope_is_rejected(solver: Solver, pull: float) -> None:
    """Rounding makes of a step on to 0 one to 1e-17, where the slope of √x is finite: no step of this size leads back."""
    root = lambda x: (5 * (x - pull).square() - x.sqrt()).sum(-1)  # noqa: E731
    x0 = torch.linspace(0.05, 4, 80, dtype=torch.float64).unsqueeze(-1)
    x = minimize(root, x0, solver=solver, prox=NonNegative()).value
    torch.testing.assert_close(20 * (x - pull) * x.sqrt(), torch.ones_like(x), rtol=1e-4, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("solver", [GradientDescent(), LBFGS(), Newton(), NewtonCG(), Picard(), Nesterov()], ids=repr)
def test_an_offset_that_hides_the_descent_costs_no_steps(solver: Solver, offset: float) -> None:
    energy = lambda x: torch.logsumexp(torch.cat([x, -x, 0.3 * x + 1], -1), -1) + offset  # noqa: E731
    x0 = torch.tensor([[0.3, 0.8], [2.0, -0.2]], dtype=torch.float64)
    found = minimize(energy, x0, solver=solver, termination=Termination(atol=1e-12, rtol=1e-11))
    assert found.num_steps.max() <= 40
    assert (torch.func.grad(lambda x: (energy(x) - offset).sum())(found.value).abs() <= 1e-11).all()


@pytest.mark.slow
def test_a_guessed_step_size_in_a_program() -> None:
    z = torch.tensor([[0.5, 3.0, 20.0]], dtype=torch.float64)
    x = minimize(lambda x, z: (x.exp() - z * x).sum(-1), torch.zeros_like(z), z, prox=Box(None, 2.0), termination=TIGHT,
                 driver=Compiled(strict=True)).value  # fmt: skip
    torch.testing.assert_close(x, z.log().clamp(max=2), rtol=0, atol=1e-9)


def test_a_layer_needs_no_step_size() -> None:
    layer = FPI_GD(lambda x, z: (x - z).exp().sum(-1) + 50 * (x - z).square().sum(-1), start=torch.zeros_like)
    z = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(3, 2)
    alone = torch.cat([layer(row[None]) for row in z])
    torch.testing.assert_close(layer(z), alone, rtol=0, atol=1e-9)
    assert repr(FPI_GD(torch.cosh)) == "FPI_GD(cosh, solver=Picard())"


def test_gamma_is_estimated_per_sample_for_the_backward_iteration() -> None:
    scale = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    z = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    x = minimize(lambda x, z: scale * (x - z).square().sum(-1), torch.zeros(3, 2, dtype=torch.float64), z, solver=Picard(),
                 adjoint=ImplicitAdjoint(Picard())).value  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(x.sum(), z)[0], torch.ones_like(z), rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", [*ROBUST, GradientDescent(), GradientDescent(BarzilaiBorwein())], ids=repr)
@pytest.mark.parametrize("energy", [lambda x: -x.square().sum(-1), lambda x: x.sum(-1)], ids=["concave", "linear"])
def test_unbounded_energies_are_never_converged(solver: Solver, energy: object) -> None:
    solution = minimize(energy, torch.ones(2, 2, dtype=torch.float64), solver=solver, on_failure="ignore")  # type: ignore[arg-type]
    assert ((solution.status == Status.DIVERGED) | (solution.status == Status.NONFINITE)).all()


def test_samples_search_independently() -> None:
    rosenbrock = next(p for p in CLASSICS if p.name == "Rosenbrock")
    starts = torch.tensor([[-1.2, 1.0], [0.9, 0.9], [3.0, -4.0]], dtype=torch.float64)
    for solver in ROBUST:
        together = minimize(rosenbrock.energy, starts, solver=solver)
        for k, start in enumerate(starts):
            alone = minimize(rosenbrock.energy, start[None], solver=solver)
            torch.testing.assert_close(together.value[k], alone.value[0], rtol=0, atol=1e-6)


def test_out_of_steps_returns_the_best_iterate() -> None:
    """The steps shrink until the map jumps; the point before that is the best one."""
    few = Termination(max_steps=7)
    jumps = lambda x: torch.where(x < 3, 0.9 * x + 1, -50.0)  # noqa: E731
    solution = fixed_point(jumps, torch.zeros(1, 1), termination=few, on_failure="ignore", trace=True)
    assert solution.status.item() == Status.MAX_STEPS and solution.trace is not None
    residual = (solution.trace.value - jumps(solution.trace.value)).abs()
    torch.testing.assert_close(solution.value, solution.trace.value[residual.argmin()])
    torch.testing.assert_close(solution.value, torch.full((1, 1), 2.71))


def test_trace_tells_the_path() -> None:
    energy, z = LogCosh(), some_context()
    for solver in (Picard(), LBFGS()):
        solution = minimize(energy, None, z, solver=solver, trace=True)
        trace = solution.trace
        assert trace is not None and trace.energy is not None
        assert trace.error.shape == trace.energy.shape == (int(solution.num_steps.max()) + 1, 2)
        torch.testing.assert_close(trace.value[-1], solution.value)
        torch.testing.assert_close(trace.energy[3], energy(trace.value[3], z))
        assert minimize(energy, None, z).trace is None


def test_multi_start_keeps_the_best_of_each_sample() -> None:
    c = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64, requires_grad=True)
    starts = MultiStart(torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(2, 1, 1).expand(2, 3, 1))
    energy = lambda x, c: (x**2 - 1).square().sum(-1) + 0.1 * c * x.sum(-1)  # noqa: E731
    solution = minimize(energy, starts, c)
    assert (solution.value.flatten().sign() == -c.sign()).all()
    exact = -0.1 / (12 * solution.value.flatten() ** 2 - 4)  # of E'(x) = 4x³ − 4x + 0.1 c = 0
    torch.testing.assert_close(torch.autograd.grad(solution.value.sum(), c)[0], exact.detach(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="MultiStart"):
        minimize(energy, starts, c, prox=lambda x, step_size: x)


def test_classic_functions_are_those_of_scipy_and_few_evaluations_solve_them() -> None:
    beale = next(p for p in CLASSICS if p.name == "Beale")
    theirs = scipy.optimize.rosen
    x = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    rosenbrock = next(p for p in CLASSICS if p.name == "Rosenbrock")
    assert rosenbrock.energy(x).item() == pytest.approx(theirs(x[0].numpy()))
    assert minimize(beale.energy, torch.tensor([beale.start], dtype=torch.float64)).num_steps.item() < 30


def test_wrong_options_are_refused() -> None:
    for wrong in (lambda: LBFGS(memory=0), lambda: NewtonCG(inner=0), lambda: Newton(radius=0.0), lambda: BarzilaiBorwein(0),
                  lambda: BacktrackingStep(0.5), lambda: Backtracking(0.7)):  # fmt: skip
        with pytest.raises(ValueError, match="got"):
            wrong()
    with pytest.raises(TypeError, match="BacktrackingStep"):
        GradientDescent(Backtracking())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Backtracking\(\)"):
        LBFGS(search=BacktrackingStep())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LBFGS cannot solve a fixed point"):
        fixed_point(torch.cos, torch.zeros(1, 1), solver=LBFGS())


@pytest.mark.parametrize("solver", [*ROBUST, GradientDescent(BarzilaiBorwein()), Nesterov()], ids=repr)
def test_a_constant_that_cancels_the_energy_hides_no_descent(solver: Solver) -> None:
    """Near the least value, 0 here, differences of energies are the rounding of their terms, of size 100."""
    z = torch.tensor([[0.3, -0.2, 0.7]], dtype=torch.float64)

    def energy(x: Tensor) -> Tensor:  # 100 cosh of what is nearly nothing, less its least value
        return (100 * (x - z).cosh() + 30 * (x - z).square() - 100).sum(-1)

    tight = Termination(atol=1e-11, rtol=0.0, max_steps=2000)
    x = minimize(energy, torch.zeros_like(z), solver=solver, termination=tight).value
    torch.testing.assert_close(x, z, rtol=0, atol=1e-10)


@pytest.mark.parametrize("condition", [1e1, pytest.param(1e3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_is_not_stopped_by_the_rounding_of_energies(condition: float, seed: int) -> None:
    """½ xᵀHx − zᵀx: large terms cancel in it, so that it is known far worse than to its rounding unit."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64, generator=generator))[0]
    hessian = basis * torch.logspace(0, math.log10(condition), 50, dtype=torch.float64) @ basis.mT
    z = torch.randn(3, 50, dtype=torch.float64, generator=generator)
    for termination in (Termination(), Termination(atol=0.0, rtol=1e-11)):
        found = minimize(lambda x, z: 0.5 * (x @ hessian * x).sum(-1) - (z * x).sum(-1), torch.zeros_like(z), z,
                         termination=termination)  # fmt: skip
        exact = torch.linalg.solve(hessian, z.mT).mT
        assert ((found.value - exact).norm(dim=-1) <= 100 * termination.tolerance(exact)).all()


def test_the_default_finds_the_nearby_minimum() -> None:
    """A logit energy that is nearly flat at the start: the parabola there points far out on to a plateau."""
    routes = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 1, 1]], dtype=torch.float64)
    toll, load = torch.tensor([[0.0, 1, 1, 0, 0], [1, 0, 0, 1, 0]], dtype=torch.float64)

    def energy(x: Tensor, demand: Tensor) -> Tensor:
        share = torch.softmax(torch.cat([torch.zeros_like(x[:, :1]), x], -1), -1)
        flow = demand[:, None] * share
        return (toll * (flow @ routes) + 0.5 * load * (flow @ routes).square()).sum(-1) + 0.15 * (flow * share.log()).sum(-1)

    demand = torch.linspace(0.4, 1.8, 15, dtype=torch.float64)
    assert minimize(energy, demand.new_zeros(15, 2), demand).converged.all()


@pytest.mark.parametrize("solver", [LBFGS(), LBFGS(search=Backtracking()), GradientDescent(), GradientDescent(BarzilaiBorwein()),
                                    Newton(), NewtonCG()], ids=repr)  # fmt: skip
def test_a_wall_far_from_the_start_is_no_failure(solver: Solver) -> None:
    x0 = torch.tensor([[1e4]], dtype=torch.float64)
    x = minimize(lambda x: (x - 10 * x.log()).sum(-1), x0, solver=solver).value
    torch.testing.assert_close(x, torch.full_like(x, 10), rtol=1e-7, atol=0)
    x = minimize(lambda x: (x - 1e-6 * x.log()).sum(-1), torch.ones_like(x0), solver=solver).value
    torch.testing.assert_close(x, torch.full_like(x, 1e-6), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight", [pytest.param(0.1, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("solver", [LBFGS(), LBFGS(search=Backtracking()), Newton(), NewtonCG()], ids=repr)
def test_the_walls_of_an_entropy_are_no_failure(solver: Solver, weight: float) -> None:
    c = 3 * torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = torch.full((4, 8), 0.5, dtype=torch.float64)
    limit = Termination(max_steps=250 if isinstance(solver, Newton | NewtonCG) else 5000)
    x = minimize(lambda x: (c * x + weight * x * x.log()).sum(-1), x0, solver=solver, termination=limit).value
    torch.testing.assert_close(x, (-1 - c / weight).exp(), rtol=0, atol=1e-7)

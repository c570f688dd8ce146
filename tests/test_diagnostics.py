"""Contraction, curvature and error estimates against dense eigenvalues, closed forms and exact answers; a solve in words."""

import pytest
import torch
from conftest import relative_error
from problems import Contraction, LogCosh, LogEnergy, newton_fixed_point, newton_minimum, some_context
from torch import Tensor

from energynet import (
    ConjugateGradient,
    ConvergenceError,
    DampedStep,
    GradientStep,
    ImplicitAdjoint,
    MapStep,
    OneStepAdjoint,
    Picard,
    Solution,
    Status,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet.diagnostics import contraction_factor, curvature, explain, gradient_error, laplace, solution_error
from energynet.energies import Quadratic
from energynet.solvers.spectrum import arnoldi, some_direction

EXACT = Termination(atol=0.0, rtol=1e-13, max_steps=100_000)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def matrix_of_condition(condition: float, n: int = 6, batch: int = 2) -> Tensor:  # -> (B, n, n), smallest eigenvalue 1
    basis = torch.linalg.qr(randn(batch, n, n))[0]
    return basis @ torch.diag(torch.logspace(0, torch.tensor(condition).log10().item(), n, dtype=torch.float64)) @ basis.mT


# ------------------------------------------------------------------------------------------------- eigenvalues


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_arnoldi_finds_every_eigenvalue_also_of_defective_and_multiple_ones(n: int) -> None:
    A = randn(4, n, n)
    A[1] = 0.7 * torch.eye(n)
    A[2] = torch.diag(torch.ones(n - 1), 1)  # one Jordan block
    A[3] = A[3] - A[3].mT  # imaginary
    values = arnoldi(lambda p: (A @ p[..., None])[..., 0], some_direction(torch.zeros(4, n, dtype=torch.float64)), n)
    for got, expected in zip(values, torch.linalg.eigvals(A)):
        distance = (got[:, None] - expected).abs()
        close = 1e-10 if expected.abs().amax() > 0 else 1e-1  # that of a Jordan block is known to ε^(1/n) only
        assert distance.amin(0).amax() < close and distance.amin(1).amax() < close


def test_arnoldi_keeps_a_bad_sample_to_itself() -> None:
    scale = torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])
    values = arnoldi(lambda p: scale * p, torch.ones(2, 2), 2)
    assert values[0].isfinite().all() and values[1].isnan().all()


def test_contraction_factor_of_a_map_is_the_dense_spectral_radius() -> None:
    network, z = Contraction(), some_context(3)
    x = fixed_point(network, torch.zeros(3, 4, dtype=torch.float64), z)
    J = torch.func.vmap(torch.func.jacrev(lambda x, z: network(x[None], z[None])[0]))(x.value, z)
    radius = torch.linalg.eigvals(J).abs().amax(-1)
    torch.testing.assert_close(contraction_factor(network, x, z), radius)
    damped = torch.linalg.eigvals(0.5 * torch.eye(4) + 0.5 * J).abs().amax(-1)
    torch.testing.assert_close(contraction_factor(DampedStep(MapStep(network), 0.5), x, z), damped)


@pytest.mark.parametrize("per_sample", [False, True])
def test_contraction_factor_of_an_energy_is_the_dense_spectral_radius(per_sample: bool) -> None:
    energy, z = LogCosh(), some_context(3)
    gamma = torch.tensor([0.1, 0.2, 0.9], dtype=torch.float64) if per_sample else 0.3
    x = minimize(energy, None, z).value
    H = torch.func.vmap(torch.func.hessian(lambda x, z: energy(x[None], z[None])[0]))(x, z)
    J = torch.eye(4) - (gamma[:, None, None] if isinstance(gamma, Tensor) else gamma) * H
    found = contraction_factor(GradientStep(energy, gamma), x, z)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(J).abs().amax(-1))


def test_contraction_factor_predicts_how_fast_the_iteration_goes() -> None:
    network, z = Contraction(rate=0.9), 0.1 * some_context(1)
    step = DampedStep(MapStep(network), 0.1)
    x = newton_fixed_point(network, torch.zeros(4, dtype=torch.float64), z[0])[None].detach()
    start, errors = x + 1e-3 * randn(1, 4), []
    with torch.no_grad():
        for _ in range(150):
            start = step(start, z)
            errors.append((start - x).norm())
    assert relative_error((errors[-1] / errors[-31]) ** (1 / 30), contraction_factor(step, x, z)[0]) < 0.01


def test_one_problem_without_batch_dimension_and_pytrees() -> None:
    H = torch.diag(torch.tensor([1.0, 3.0]))
    seen = curvature(lambda x: 0.5 * x @ H @ x, torch.ones(2))
    assert seen.smallest.shape == () and seen.largest.round(decimals=4) == 3
    assert contraction_factor(lambda x: 0.5 * x, torch.ones(2), batch_dims=0) == pytest.approx(0.5)

    def energy(x: dict[str, Tensor]) -> Tensor:
        return x["a"].square().sum(-1) + 4 * x["b"].square().flatten(1).sum(-1)

    seen = curvature(energy, {"a": torch.ones(3, 2), "b": torch.ones(3, 2, 2)})
    torch.testing.assert_close((seen.smallest, seen.largest), (torch.full((3,), 2.0), torch.full((3,), 8.0)))


def test_curvature_and_its_step_sizes() -> None:
    Q, b = matrix_of_condition(50.0), randn(2, 6)
    seen = curvature(Quadratic(), randn(2, 6), Q, b)
    values = torch.linalg.eigvalsh(Q)
    torch.testing.assert_close((seen.smallest, seen.largest), (values[:, 0], values[:, -1]))
    torch.testing.assert_close(seen.condition, torch.full((2,), 50.0, dtype=torch.float64))
    for step_size, factor in (
        (seen.best_step_size, seen.best_contraction),
        (seen.safe_step_size, 1 - 1 / seen.condition),
        (seen.step_size_limit, torch.ones_like(seen.condition)),
    ):
        torch.testing.assert_close(contraction_factor(GradientStep(Quadratic(), step_size), b, Q, b), factor)


def test_curvature_of_a_large_problem_from_few_products() -> None:
    scale = torch.logspace(-2, 0, 2000, dtype=torch.float64)
    seen = curvature(lambda x: 0.5 * (scale * x.square()).sum(-1), torch.ones(1, 2000, dtype=torch.float64))
    assert 0.99 < float(seen.largest) <= 1 + 1e-12 and 0.01 - 1e-12 <= float(seen.smallest) < 0.013


def test_without_strong_convexity_no_constant_step_contracts() -> None:
    seen = curvature(lambda x: x[:, 0].square() - x[:, 1].square(), torch.ones(1, 2))
    assert seen.smallest < 0 and seen.best_contraction.isinf() and seen.condition.isinf()
    assert seen.best_step_size == seen.safe_step_size
    flat = curvature(lambda x: x.sum(-1), torch.ones(1, 2))
    assert flat.safe_step_size.isinf() and flat.best_contraction.isinf()


def test_parametrized_modules_and_inference_mode() -> None:
    linear = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 3))
    with torch.inference_mode():
        found = contraction_factor(linear, torch.zeros(2, 3))
    expected = torch.linalg.eigvals(linear.eval().weight.detach()).abs().amax()
    torch.testing.assert_close(found, expected.expand(2), rtol=1e-3, atol=1e-3)


def test_wrong_input_raises_a_clear_error() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="step_size"):
        contraction_factor(GradientStep(lambda x: x.square().sum(-1)), x)
    with pytest.raises(ValueError, match="shapes of x"):
        contraction_factor(lambda x: x.square().sum(-1), x)
    with pytest.raises(TypeError, match="x0 must be"):
        curvature(lambda x: x.square().sum(-1), 3)
    with pytest.raises(TypeError, match="general matrix"):
        solution_error(lambda x: 0.5 * x, x, solver=ConjugateGradient())


# ------------------------------------------------------------------------------------------------- errors


def brackets(bound: Tensor, truth: Tensor) -> bool:
    """A bound from above, and within a factor of 10."""
    return bool(((truth <= bound) & (bound <= 10 * truth)).all())


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_solution_error_brackets_the_true_error_of_quadratics(condition: float, steps: int) -> None:
    Q, b = matrix_of_condition(condition), randn(2, 6)
    truth = torch.linalg.solve(Q, b)
    step_size = 1.0 / condition if condition > 1 else 0.5
    x = minimize(Quadratic(), randn(2, 6), Q, b, step_size=step_size, solver=Picard(),
                 termination=Termination(0.0, 1e-300, steps), on_failure="ignore").value  # fmt: skip
    error = (x - truth).norm(dim=-1)
    if error.amin() > 1e-13:
        assert brackets(solution_error(Quadratic(), x, Q, b), error)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-4, 1e-8])
def test_solution_error_brackets_the_true_error_of_log_cosh_and_of_a_network(tolerance: float) -> None:
    z, x0, loose = some_context(3), torch.zeros(3, 4, dtype=torch.float64), Termination(0.0, tolerance)
    energy, network = LogCosh(), Contraction(rate=0.9)
    solution = minimize(energy, x0, z, step_size=energy.step_size, solver=Picard(), termination=loose)
    truth = torch.stack([newton_minimum(energy, x0[0], row) for row in z])
    assert brackets(solution_error(energy, solution, z), (solution.value - truth).norm(dim=-1))
    solution = fixed_point(network, x0, z, termination=loose)
    truth = torch.stack([newton_fixed_point(network, x0[0], row) for row in z])
    assert brackets(solution_error(network, solution, z), (solution.value - truth).norm(dim=-1))


def test_solution_error_is_infinite_where_there_is_no_bound() -> None:
    x = torch.tensor([[0.1, 5.0], [0.1, 0.2]], dtype=torch.float64)
    saddle = GradientStep(lambda x: x[:, 0].square() - x[:, 1].square())
    assert solution_error(saddle, x).isinf().all()
    far = GradientStep(lambda x: x.square().add(1).sqrt().sum(-1))  # Newton's method diverges from |x| > 1
    found = solution_error(far, x)
    assert found[0].isinf() and found[1].isfinite()
    tight = minimize(LogEnergy(), None, 1 + torch.rand(2, 3, dtype=torch.float64), termination=Termination(0.0, 1e-15))
    assert solution_error(LogEnergy(), tight, 1 + torch.rand(2, 3, dtype=torch.float64)).shape == (2,)


MISRA = torch.tensor([[437.369707848, 3.0227324409e-4]], dtype=torch.float64)


def misra(b: Tensor) -> Tensor:
    """The sum of squares of NIST's Misra1d, whose two parameters differ by six orders of magnitude."""
    y = [10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78]
    x = [77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0]
    y, x = (b.new_tensor(t) for t in (y, x))
    return ((b[:, :1] * b[:, 1:] * x / (1 + b[:, 1:] * x) - y) ** 2).sum(-1)


def test_solution_error_is_not_deceived_by_badly_scaled_variables() -> None:
    """Conjugate gradients call the error of the third point 4e-6."""
    points = torch.tensor([[437.0, 3.0260e-4], [420.0, 3.0e-4], [440.0, 3.0227e-4], [339.3, 4.085e-4]], dtype=torch.float64)
    found, truth = solution_error(GradientStep(misra), points), (points - MISRA).norm(dim=-1)
    assert ((found[:2] / truth[:2] < 3) & (found[:2] / truth[:2] > 1)).all()
    assert found[2:].isinf().all()  # outside of Newton's reach, where nothing can be said


@pytest.mark.parametrize("point", [[0.0, 0.0, 0.0, 0.0], [1.001, 1.001, 1.001, 1.001], [3.0, 1.0, 1e5, 1.0]])
def test_solution_error_of_a_badly_scaled_quadratic(point: list[float]) -> None:
    curvature, x = torch.tensor([1.0, 1e8, 1e-8, 1e16], dtype=torch.float64), torch.tensor([point], dtype=torch.float64)
    step = GradientStep(lambda x: (curvature * (x - 1).square()).sum(-1) + 1e3 * (x[:, 0] - 1) * (x[:, 1] - 1))
    assert torch.allclose(solution_error(step, x), 2 * (x - 1).norm(dim=-1), rtol=1e-6)


def test_solution_error_of_an_answer_to_rounding_is_finite() -> None:
    z = 1 + torch.rand(5, 3, dtype=torch.float64)
    found = solution_error(LogEnergy(), (z / 0.7).log(), z)
    assert found.amax() < 1e-14


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("adjoint", [1e-9, 1e-1], ids=["tight", "loose"])
def test_gradient_error_brackets_the_true_error_of_quadratics(condition: float, adjoint: float) -> None:
    Q, b = matrix_of_condition(condition), randn(2, 6).requires_grad_()
    Q.requires_grad_()
    target, answer = randn(2, 6), torch.linalg.solve(Q, b)

    def loss(x: Tensor) -> Tensor:
        return (x - target).pow(4).sum()

    judged = ImplicitAdjoint(termination=Termination(rtol=adjoint))
    x = (answer + 1e-3 * randn(2, 6)).detach()
    exact = torch.autograd.grad(loss(answer), (Q, b))
    found = gradient_error(loss, Quadratic(), x, Q, b, wrt=(Q, b), adjoint=judged)
    truth = [g - e for g, e in zip(found.gradient, ((exact[0] + exact[0].mT) / 2, exact[1]))]
    assert brackets(found.bound, torch.stack([t.norm() for t in truth]).norm())
    for estimate, t in zip(zip(found.forward, found.adjoint), truth):
        assert relative_error(sum(estimate), t) < 0.3  # the excess itself is known, not its size only


@pytest.mark.parametrize("tolerances", [(1e-2, 1e-10), (1e-9, 1e-1), (1e-2, 1e-1), (1e-4, 1e-3)])
@pytest.mark.parametrize("problem", ["energy", "network"])
def test_gradient_error_brackets_the_true_error_and_names_its_source(tolerances: tuple[float, float], problem: str) -> None:
    z, x0 = some_context(3, requires_grad=True), torch.zeros(3, 4, dtype=torch.float64)
    step = GradientStep(LogCosh(), LogCosh().step_size) if problem == "energy" else MapStep(Contraction(rate=0.8))
    weights = list((step.energy if isinstance(step, GradientStep) else step.network).parameters())
    forward, adjoint = (Termination(0.0, rtol) for rtol in tolerances)

    def loss(x: Tensor) -> Tensor:
        return x.sin().sum() + x.square().sum()

    def gradient(forward: Termination, adjoint: Termination) -> tuple[Solution, tuple[Tensor, ...]]:
        solution = fixed_point(step, x0, z, termination=forward, adjoint=ImplicitAdjoint(Picard(), adjoint))
        return solution, torch.autograd.grad(loss(solution.value), [z, *weights])

    (solution, given), (_, exact) = gradient(forward, adjoint), gradient(EXACT, EXACT)
    judged = ImplicitAdjoint(Picard(), adjoint)
    found = gradient_error(loss, step, solution, z, wrt=[z, *weights], adjoint=judged)
    for ours, theirs in zip(found.gradient, given):
        torch.testing.assert_close(ours, theirs)  # it is the gradient of the solve that is judged
    assert brackets(found.bound, torch.stack([(g - e).norm() for g, e in zip(given, exact)]).norm())
    larger = max(found.forward[0].norm(), found.adjoint[0].norm())
    if tolerances[1] < 1e-8:
        assert larger == found.forward[0].norm()
    if tolerances[0] < 1e-8:
        assert larger == found.adjoint[0].norm()


def test_gradient_error_judges_inexact_adjoints_too() -> None:
    z = some_context(2, requires_grad=True)
    network = Contraction()
    x = fixed_point(network, torch.zeros(2, 4, dtype=torch.float64), z)
    found = gradient_error(lambda x: x.sum(), network, x, z, wrt=[z], adjoint=OneStepAdjoint())
    (exact,) = torch.autograd.grad(x.value.sum(), z)
    torch.testing.assert_close(found.gradient[0] - found.adjoint[0], exact)
    assert found.relative > 0.1
    default = gradient_error(lambda x: x.sum(), network, x, z, wrt=[z])
    assert default.relative < 1e-6
    with pytest.raises(TypeError, match="differentiates the iterations"):
        gradient_error(lambda x: x.sum(), network, x, z, wrt=[z], adjoint=UnrolledAdjoint())


def test_gradient_error_at_no_minimum_raises() -> None:
    saddle = GradientStep(lambda x, z: (x[:, 0] - z[:, 0]).square() - x[:, 1].square())
    z = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"those of shapes \[\(1,\)\] do not require grad"):
        gradient_error(lambda x: x.sum(), saddle, torch.ones(2, 2), z, wrt=[z, torch.ones(1)])
    with pytest.raises(ConvergenceError, match="not a strict minimum"):
        gradient_error(lambda x: x.sum(), saddle, torch.full((2, 2), 0.5), z, wrt=[z])


# ------------------------------------------------------------------------------------------------- in words


def test_explain_counts_and_names_the_slowest() -> None:
    scale = torch.tensor([[1.0], [0.9], [0.1]])
    told = explain(minimize(lambda x, s: s.squeeze(-1) * (x - 3).square().sum(-1), torch.zeros(3, 1), scale, step_size=0.5,
                            solver=Picard()))  # fmt: skip
    assert told.startswith("3 of 3 samples converged. The slowest, sample 2, took ")


def test_explain_describes_each_failure() -> None:
    def energy(x: Tensor, scale: Tensor) -> Tensor:
        return scale.squeeze(-1) * (x - 3).square().sum(-1)

    scale = torch.tensor([[1.0], [0.001], [10.0], [torch.nan]])
    told = explain(minimize(energy, torch.zeros(4, 1), scale, step_size=0.5, solver=Picard(), on_failure="ignore"))
    assert told.startswith("1 of 4 samples converged.")
    for status, number in ((Status.MAX_STEPS, 1), (Status.DIVERGED, 2), (Status.NONFINITE, 3)):
        assert f"{status.name}: 1 of 4 samples (number {number}) {status.sentence}" in told
    assert "nan" not in told.split("The solve failed")[0]


def test_explain_of_one_problem_of_none_and_under_vmap() -> None:
    def energy(x: Tensor) -> Tensor:
        return (x - 3).square().sum()

    assert explain(minimize(energy, torch.zeros(1))).startswith("The problem converged. It took ")
    empty = torch.zeros(0, dtype=torch.int8)
    assert explain(Solution(torch.zeros(0, 1), empty, empty.float(), empty)) == "There are no samples."
    with pytest.raises(ValueError, match="vmap"):
        torch.func.vmap(lambda x: (explain(minimize(energy, x)), x)[1])(torch.zeros(2, 1))


def test_laplace_of_few_unknowns_is_the_inverse_hessian() -> None:
    torch.manual_seed(0)
    root = torch.randn(2, 6, 6, dtype=torch.float64)
    Q = root @ root.mT + 0.1 * torch.eye(6, dtype=torch.float64)
    energy = Quadratic()
    b = torch.randn(2, 6, dtype=torch.float64)
    solution = minimize(energy, None, Q, b)
    noise = torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = noise[:, None] * torch.linalg.inv(Q).diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(laplace(energy, solution, Q, b, noise=noise), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape, spacing, tolerance", [((60,), 12, 2e-2), ((60,), 24, 1e-3), ((2, 6, 8), 8, 0.05)])
def test_laplace_by_probes_on_a_grid(shape: tuple[int, ...], spacing: int, tolerance: float) -> None:
    """Diffusion along the last dimension, whose correlations reach about two places."""

    def energy(x: torch.Tensor) -> torch.Tensor:
        return (0.5 * x.square()).flatten(1).sum(1) + (2 * x.diff(dim=-1).square()).flatten(1).sum(1)

    x = torch.zeros(2, *shape, dtype=torch.float64)
    n = x[0].numel()
    H = torch.func.hessian(lambda v: energy(v.reshape(1, *shape))[0])(torch.zeros(n, dtype=torch.float64))
    expected = torch.linalg.inv(H).diagonal().sqrt().reshape(shape).expand_as(x)
    got = laplace(energy, x, spacing=spacing)
    assert (got / expected - 1).abs().max() < tolerance


def test_laplace_where_it_cannot_be() -> None:
    saddle = lambda x: (x[:, 0].square() - x[:, 1].square())  # noqa: E731
    assert laplace(saddle, torch.zeros(1, 2)).isnan().any()
    with pytest.raises(ValueError, match="at least 1"):
        laplace(saddle, torch.zeros(1, 2), spacing=0)
    with pytest.raises(TypeError, match="one tensor"):
        laplace(lambda x: x["a"].square().sum(-1), {"a": torch.zeros(1, 2)})

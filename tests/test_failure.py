"""Failure is seen, forward and backward, and stays with the sample that failed."""

import warnings

import pytest
import torch
from problems import TIGHT, LogCosh, LogEnergy, some_context
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    FPI_NN,
    LBFGS,
    AdjointReport,
    Anderson,
    BarzilaiBorwein,
    Broyden,
    ConjugateGradient,
    ConvergenceError,
    ConvergenceWarning,
    Energy,
    GradientDescent,
    ImplicitAdjoint,
    Nesterov,
    Newton,
    NewtonCG,
    OneStepAdjoint,
    Picard,
    Solver,
    Status,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    gradient,
    minimize,
)

X0 = torch.zeros(2, 1, dtype=torch.float64)


def test_doubling_map_diverges() -> None:
    with pytest.raises(ConvergenceError, match=r"DIVERGED: 2 of 2 samples \(number 0, 1\).*contraction factor is 2,"):
        fixed_point(lambda z: 2 * z + 1, X0)


def test_unbounded_and_linear_energies() -> None:
    for energy in (lambda x: -x.square().sum(-1), lambda x: x.sum(-1)):
        solution = minimize(energy, torch.ones(2, 1), step_size=0.5, on_failure="ignore")
        assert not solution.converged.any()
    assert minimize(
        lambda x: x.sum(-1), X0, step_size=0.5, termination=Termination(rtol=0.1), on_failure="ignore"
    ).status.tolist() == [3, 3]


def test_step_ten_times_too_large() -> None:
    energy = LogCosh()
    with pytest.raises(ConvergenceError, match="step size"):
        FPI_GD(energy, 10 * energy.step_size)(some_context())


@pytest.mark.slow
def test_a_start_on_a_part_without_curvature_is_no_failure() -> None:
    huber = lambda x, z: torch.nn.functional.huber_loss(x, z.expand_as(x), reduction="none").sum(-1)  # noqa: E731
    x0 = torch.tensor([[3e3], [-40.0]])
    solution = minimize(huber, x0, torch.ones(2, 1), step_size=0.9, termination=Termination(rtol=1e-3, max_steps=5000))
    torch.testing.assert_close(solution.value, torch.ones(2, 1), rtol=1e-3, atol=0)
    far = minimize(
        lambda x: (x - 1e9).square().sum(-1), torch.zeros(1, 1, dtype=torch.float64), step_size=1e-9, solver=Picard(),
        on_failure="ignore",
    )
    assert far.status.item() == Status.MAX_STEPS  # slow, not diverging


@pytest.mark.parametrize("gamma", [1e-4, 1e-9, 1e-13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_step_is_not_convergence(gamma: float, dtype: torch.dtype) -> None:
    solution = minimize(lambda x: (x - 3).square().sum(-1), torch.zeros(2, 4, dtype=dtype), step_size=gamma, solver=Picard(),
                        on_failure="ignore", termination=Termination(max_steps=50))  # fmt: skip
    assert (solution.status == Status.MAX_STEPS).all()
    assert (solution.error > 1).all()


def test_residual_is_the_distance_for_an_isotropic_energy_whatever_its_factor_and_start() -> None:
    loose = Termination(atol=0.0, rtol=1e-3)
    for factor in (1e-6, 1.0, 1e6):
        for start in (0.0, 2.9, 100.0):
            solution = minimize(lambda x, c: c * (x - 3).square().sum(-1), torch.full((1, 4), start, dtype=torch.float64),
                                factor, step_size=0.2 / factor, termination=loose)  # fmt: skip
            error = (solution.value - 3).norm(dim=-1)
            torch.testing.assert_close(solution.error, error, rtol=1e-9, atol=1e-14)


def test_a_step_that_rounds_to_no_change_is_not_convergence() -> None:
    tight = Termination(atol=0.0, rtol=1e-3, max_steps=100)
    step = lambda x: 0.999 * x + 0.001 * 3  # noqa: E731
    solution = fixed_point(step, torch.ones(1, 1, dtype=torch.bfloat16), termination=tight, on_failure="ignore")
    assert not solution.converged.any()


def bad_sample(kind: str) -> Tensor:
    z = some_context(64)
    z[5] = {"nan": torch.nan, "inf": torch.inf, "negative": -1.0}[kind]
    return z


class Domain(Energy):
    """Valid only for z > 0: sqrt(z) ½ x² w − x z."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def start(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:
        return (0.5 * self.w * z.sqrt() * x.square() - x * z).sum(-1) + 0.5 * x.square().sum(-1)


@pytest.mark.parametrize("policy", ["warn", "ignore"])
@pytest.mark.parametrize("kind", ["nan", "inf", "negative"])
@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), ImplicitAdjoint(Picard()), OneStepAdjoint()], ids=str)
def test_one_bad_sample_of_64_changes_nothing_else(kind: str, policy: str, adjoint: ImplicitAdjoint) -> None:
    energy = Domain()
    z = bad_sample(kind).abs() + 0.1 if kind != "negative" else some_context(64).abs() + 0.1
    if kind == "negative":
        z[5] = -1.0
    z.requires_grad_()
    good = [i for i in range(64) if i != 5]
    layer = FPI_GD(energy, 0.3, termination=TIGHT, adjoint=adjoint, on_failure=policy)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        solution = layer.solve(z)
    assert [str(w.message) for w in seen if "number 5" in str(w.message)] or policy == "ignore"
    assert solution.status[5] != Status.CONVERGED
    assert (solution.status[good] == Status.CONVERGED).all()
    expected = FPI_GD(energy, 0.3, termination=TIGHT, adjoint=adjoint)(z[good])
    torch.testing.assert_close(solution.value[good], expected, rtol=1e-13, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.autograd.grad(solution.value.square().sum(), (energy.w, z))
    want = torch.autograd.grad(expected.square().sum(), (energy.w, z))
    torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(got[1][good], want[1][good], rtol=1e-10, atol=0)
    assert got[1][5].isnan().all()


def test_a_bad_sample_and_second_derivatives() -> None:
    energy, z = Domain(), some_context(6).abs() + 0.1
    z[2] = -1.0
    z.requires_grad_()
    good = [0, 1, 3, 4, 5]

    def penalty(x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(x.square().sum(), energy.w, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), energy.w)[0]

    got = penalty(FPI_GD(energy, 0.3, termination=TIGHT, on_failure="ignore")(z))
    torch.testing.assert_close(got, penalty(FPI_GD(energy, 0.3, termination=TIGHT)(z[good])), rtol=1e-10, atol=0)


class Encoded(Energy):
    """A shared encoder in front: its weights must not see the failed sample, its context must."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, dtype=torch.float64)

    def start(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(z), z[:, :1]

    def evaluate(self, x: Tensor, target: Tensor, sign: Tensor) -> Tensor:
        return 0.5 * (x - target).square().sum(-1) * sign.squeeze(-1).sign()  # a negative sign: unbounded below


def test_shared_encoder_is_untouched_by_a_failed_sample() -> None:
    energy, z = Encoded(), some_context(6).abs() + 0.1
    z[2, 0] = -1.0
    z.requires_grad_()
    good = [0, 1, 3, 4, 5]
    layer = FPI_GD(energy, 0.5, termination=TIGHT, on_failure="ignore")
    got = torch.autograd.grad(layer(z).square().sum(), (energy.encoder.weight, z))
    want = torch.autograd.grad(layer(z[good]).square().sum(), (energy.encoder.weight, z))
    torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(got[1][good], want[1][good])
    assert got[1][2].isnan().all()


def test_shared_encoder_is_untouched_by_a_context_that_is_not_finite() -> None:
    energy, z = Encoded(), some_context(6).abs() + 0.1
    z[2, 1] = torch.nan
    z.requires_grad_()
    good = [0, 1, 3, 4, 5]
    layer = FPI_GD(energy, 0.5, termination=TIGHT, on_failure="ignore")
    solution = layer.solve(z)
    assert solution.status.tolist() == [0, 0, Status.NONFINITE, 0, 0, 0]
    got = torch.autograd.grad(solution.value[good].square().sum(), (energy.encoder.weight, z))
    want = torch.autograd.grad(layer(z[good]).square().sum(), (energy.encoder.weight, z))
    torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(got[1][good], want[1][good])
    assert got[1][2].isnan().all()


def test_a_shared_matrix_with_as_many_rows_as_samples_is_not_taken_for_samples() -> None:
    A = (torch.eye(4, dtype=torch.float64) * 0.2 + 0.1).requires_grad_()
    z = torch.ones(4, 4, dtype=torch.float64)
    z[1] = torch.nan

    def energy(x: Tensor, z: Tensor, A: Tensor) -> Tensor:
        return 0.5 * x.square().sum(-1) + 0.5 * (x @ A).square().sum(-1) - (x * z).sum(-1)

    def gradient(z: Tensor) -> Tensor:
        x = minimize(energy, torch.zeros_like(z), z, A, step_size=0.5, termination=TIGHT, on_failure="ignore").value
        return torch.autograd.grad(x[~z.isnan().any(-1)].sum(), A)[0]

    torch.testing.assert_close(gradient(z), gradient(z[[0, 2, 3]]), rtol=1e-10, atol=0)


def test_failure_under_vmap_raises_and_stays_with_its_lane() -> None:
    energy = lambda x, z: (z.sqrt() * x.square() / 2 - x).sum()  # noqa: E731
    solve = lambda z, policy: minimize(energy, torch.zeros((), dtype=z.dtype), z, step_size=0.3, on_failure=policy).value  # noqa: E731
    z = torch.tensor([1.0, -1.0, 4.0], dtype=torch.float64)
    with pytest.raises(ConvergenceError, match="1 of 3 samples \\(number 1\\)"):
        torch.func.vmap(lambda z: solve(z, "raise"))(z)
    got = torch.func.vmap(torch.func.grad(lambda z: solve(z, "ignore")))(z)
    assert got[1].isnan()
    torch.testing.assert_close(got[[0, 2]], -0.5 * z[[0, 2]] ** -1.5)


def test_nan_at_the_start_and_later() -> None:
    x0 = torch.tensor([[0.0], [torch.nan]], dtype=torch.float64)
    solution = fixed_point(lambda x: 0.5 * x, x0, on_failure="ignore")
    assert solution.status.tolist() == [0, 2]
    assert solution.num_steps.tolist()[1] == 0
    later = fixed_point(lambda x: torch.where(x > 5, torch.nan, x + 1), X0, on_failure="ignore")
    assert later.status.tolist() == [2, 2]
    assert later.num_steps.tolist() == [6, 6]  # F(6) is NaN


def test_truncated_adjoint_is_as_visible_as_a_truncated_solve() -> None:
    energy, z = LogCosh(), some_context(requires_grad=True)
    seen = AdjointReport()
    short = ImplicitAdjoint(Picard(), Termination(rtol=1e-10, max_steps=3), seen)
    x = FPI_GD(energy, energy.step_size, adjoint=short)(z)
    with pytest.raises(ConvergenceError, match=r"adjoint solve.*MAX_STEPS.*truncated"):
        x.sum().backward()
    assert seen.records[0].num_steps.tolist() == [3, 3]
    assert (seen.records[0].residual > 1e-10).all()
    x = FPI_GD(energy, energy.step_size, adjoint=short, on_failure="warn")(z)
    with pytest.warns(ConvergenceWarning, match="adjoint"):
        (gradient,) = torch.autograd.grad(x.sum(), z)
    assert gradient.isnan().all()


def test_singular_and_indefinite_hessians_are_reported() -> None:
    singular = lambda x, z: 0.5 * (x.sum(-1) - z.sum(-1)).square()  # noqa: E731
    z = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    x = minimize(singular, torch.zeros(1, 2, dtype=torch.float64), z, step_size=0.4).value
    with pytest.raises(ConvergenceError, match="singular or indefinite"):
        x[0, 0].backward()
    saddle = lambda x, z: 0.5 * x[:, 0] ** 2 - 0.5 * x[:, 1] ** 2 + (x * z).sum(-1)  # noqa: E731
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    with pytest.raises(ConvergenceError, match="DIVERGED"):  # the saddle is left, and the energy has no minimum
        minimize(saddle, torch.zeros(1, 2, dtype=torch.float64), z, step_size=0.4)


def test_report_refers_to_no_graph() -> None:
    seen = AdjointReport()
    layer = FPI_GD(LogEnergy(), 0.4, adjoint=ImplicitAdjoint(report=seen))
    layer(torch.ones(3, 1, dtype=torch.float64)).sum().backward()
    assert len(seen.records) == 1
    assert all(not t.requires_grad for t in seen.records[0])
    seen.clear()
    assert not seen.records


def test_one_step_adjoint_raises_at_second_order() -> None:
    layer = FPI_GD(LogEnergy(), 0.4, termination=TIGHT, adjoint=OneStepAdjoint())
    z = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(z).sum(), z, create_graph=True)
    torch.testing.assert_close(gradient.detach(), torch.full((1, 1), 0.4, dtype=torch.float64))  # γ: of one step
    with pytest.raises(RuntimeError, match="first-order"):
        gradient.sum().backward()
    from torch.func import hessian, jacfwd, jacrev

    both = [lambda f, a=a, b=b: a(b(f)) for a in (jacfwd, jacrev) for b in (jacfwd, jacrev)]
    for twice in (hessian, *both):
        with pytest.raises(RuntimeError, match="first-order"):
            twice(lambda z: layer(z).sum())(z.detach())


def test_batch_mates_do_not_change_an_answer() -> None:
    energy, z = LogCosh(), some_context(8)
    z[3] *= 100
    for solver in (Picard(), Anderson(3)):
        layer = FPI_GD(energy, energy.step_size, solver=solver, termination=Termination(rtol=1e-6))
        whole = layer.solve(z)
        for i in range(8):
            alone = layer.solve(z[i : i + 1])
            torch.testing.assert_close(alone.value[0], whole.value[i], rtol=1e-9, atol=1e-12)
            assert abs(int(alone.num_steps[0]) - int(whole.num_steps[i])) <= 1


def test_a_batch_mate_that_never_converges_leaves_the_others_their_steps() -> None:
    energy = lambda x, z: 0.5 * (z * x.square()).sum(-1) - x.sum(-1)  # noqa: E731
    z = torch.tensor([[1.0, 0.05], [-1.0, 1.0]], dtype=torch.float64)
    limit = Termination(atol=0.0, rtol=1e-9, max_steps=1500)
    solution = minimize(energy, torch.zeros(2, 2, dtype=torch.float64), z, step_size=0.5, termination=limit, on_failure="ignore")
    alone = minimize(energy, torch.zeros(1, 2, dtype=torch.float64), z[:1], step_size=0.5, termination=limit)
    assert solution.status[0] == Status.CONVERGED
    assert solution.num_steps[0] == alone.num_steps[0]


def test_solvers_that_do_not_fit_are_refused_before_the_first_step() -> None:
    with pytest.raises(TypeError, match="ConjugateGradient cannot solve a linear equation with a general matrix"):
        fixed_point(lambda x: 0.5 * x, X0, adjoint=ImplicitAdjoint(ConjugateGradient()))
    with pytest.raises(TypeError, match="ConjugateGradient cannot solve a fixed point"):
        fixed_point(lambda x: 0.5 * x, X0, solver=ConjugateGradient())
    with pytest.raises(TypeError, match=r"Did you mean an instance, Picard\(\)\?"):
        fixed_point(lambda x: 0.5 * x, X0, solver=Picard)
    with pytest.raises(ValueError, match="on_failure"):
        fixed_point(lambda x: 0.5 * x, X0, on_failure="explode")


def test_unrolled_tells_too() -> None:
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        fixed_point(lambda z: 2 * z + 1, X0, adjoint=UnrolledAdjoint())
    three = Termination(max_steps=3)

    def slow(x: Tensor) -> Tensor:
        return fixed_point(lambda x: 0.99 * x + 1, x, batch_dims=0, termination=three, adjoint=UnrolledAdjoint()).value

    with pytest.raises(ConvergenceError, match="MAX_STEPS"):
        torch.func.vmap(slow)(X0)


def test_edge_sizes() -> None:
    energy = LogCosh()
    for batch in (0, 1):
        z = some_context(batch, requires_grad=True)
        x = FPI_GD(energy, energy.step_size, termination=TIGHT)(z)
        assert x.shape == (batch, 4)
        x.sum().backward()
        assert z.grad is not None and z.grad.shape == z.shape
    empty = fixed_point(lambda x: 0.5 * x, torch.zeros(3, 0))
    assert empty.value.shape == (3, 0) and bool(empty.converged.all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    for solver in (Picard(), Anderson(3)):
        x0 = torch.zeros(2, 3, dtype=dtype)
        z = torch.ones(2, 3, dtype=dtype, requires_grad=True)
        solution = fixed_point(lambda x, z: 0.5 * x + z, x0, z, solver=solver)
        assert solution.value.dtype == dtype and solution.error.dtype == torch.float32
        torch.testing.assert_close(solution.value, torch.full_like(x0, 2.0), rtol=0.15, atol=0)
        solution.value.sum().backward()
        assert z.grad is not None
        torch.testing.assert_close(z.grad, torch.full_like(z, 2.0), rtol=0.15, atol=0)


def test_no_graph_is_kept_and_inference_mode_works() -> None:
    energy, z = LogCosh(), some_context()
    layer = FPI_GD(energy, energy.step_size)
    with torch.no_grad():
        assert not layer(z).requires_grad
    expected = layer(z).detach()
    with torch.inference_mode():
        assert torch.equal(layer(z), expected)
        born_inside = 2 * (0.5 * z)
        assert torch.equal(layer(born_inside), expected)
        slope = gradient(energy, expected, born_inside)
    assert torch.equal(slope, gradient(energy, expected, z).detach())
    network = FPI_NN(lambda x, z: 0.5 * x + z, start=torch.zeros_like)
    assert not network(z).requires_grad


def test_an_iterate_that_overflowed_reaches_no_shared_gradient() -> None:
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    energy = lambda x, w: (0.25 * w * x**4 + 0.5 * x.square()).sum(-1)  # noqa: E731
    x0 = torch.tensor([[0.1, 0.2], [1e80, 0.1], [0.3, 0.1]], dtype=torch.float64)
    shifted = lambda x, w, z: energy(x, w) - (x * z).sum(-1)  # noqa: E731
    z = torch.ones(3, 2, dtype=torch.float64)

    def gradient(rows: list[int]) -> Tensor:
        solution = minimize(shifted, x0[rows], w, z[rows], step_size=0.2, termination=TIGHT, on_failure="ignore")
        assert solution.converged.tolist() == [row != 1 for row in rows]
        return torch.autograd.grad(solution.value[solution.converged].square().sum(), w)[0]

    torch.testing.assert_close(gradient([0, 1, 2]), gradient([0, 2]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_losses_have_gradients_too(scale: float) -> None:
    z = torch.ones(2, 3, requires_grad=True)
    energy = lambda x, z: torch.cosh(x - z).sum(-1) + x.square().sum(-1)  # noqa: E731
    for adjoint in (ImplicitAdjoint(), ImplicitAdjoint(Picard()), ImplicitAdjoint(Anderson(2))):
        x = minimize(energy, torch.zeros(2, 3), z, step_size=0.3, adjoint=adjoint).value
        (expected,) = torch.autograd.grad(x.sum(), z, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(scale * x.sum(), z)[0] / scale, expected, rtol=1e-4, atol=0)


MINIMIZERS = [LBFGS(), Newton(), NewtonCG(), GradientDescent(), GradientDescent(BarzilaiBorwein()), Picard(), Nesterov(),
              Anderson(), Broyden()]  # fmt: skip


@pytest.mark.parametrize("factor", [1e-30, 1e25, *(pytest.param(f, marks=pytest.mark.slow) for f in (1e-25, 1e-20, 1e20))])
@pytest.mark.parametrize("solver", MINIMIZERS, ids=repr)
def test_a_gradient_whose_square_underflows_or_overflows_makes_no_answer(solver: Solver, factor: float) -> None:
    curvature = torch.tensor([1.0, 5.0])
    energy = lambda x: (curvature * (x - 1).square() + x.cosh() - 1).sum(-1)  # noqa: E731
    limit = Termination(max_steps=100)
    exact = minimize(energy, torch.zeros(1, 2)).value
    scaled = lambda x: factor * energy(x)  # noqa: E731
    found = minimize(scaled, torch.stack([torch.zeros(2), exact[0]]), solver=solver, termination=limit, on_failure="ignore")
    wrong = (found.value - exact).norm(dim=-1) > 1e-2
    assert not (wrong & (found.converged | (found.error < 1e-2))).any()
    if factor < 1 and not isinstance(solver, LBFGS | NewtonCG):
        assert found.converged.all()


@pytest.mark.parametrize("factor", [1e-25, 1.0, 1e25])
def test_the_residual_does_not_change_with_the_factor_of_an_energy_in_single_precision(factor: float) -> None:
    weights = torch.tensor([1.0, 5.0, 0.2])
    none = Termination(max_steps=0)
    energy = lambda x: (weights * (x - 1).square()).sum(-1) + x.prod(-1)  # noqa: E731
    expected = minimize(energy, torch.zeros(1, 3), termination=none, on_failure="ignore").error
    found = minimize(lambda x: factor * energy(x), torch.zeros(1, 3), termination=none, on_failure="ignore").error
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def mapped(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return (x - z @ w).cosh().sum(-1) + (0.2 * x.square()).sum(-1)


GOOD = [0, 2, 3]


def test_a_failed_sample_of_a_context_that_vmap_does_not_map_spoils_nothing_shared() -> None:
    z = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[1] = torch.nan
    W = torch.stack([0.7 * torch.eye(2, dtype=torch.float64), 1.4 * torch.eye(2, dtype=torch.float64)])

    def loss(w: Tensor, z: Tensor) -> Tensor:
        x = minimize(mapped, torch.zeros_like(z), z, w, on_failure="ignore", termination=TIGHT).value
        return x[GOOD].square().sum()

    grad, vmap = torch.func.grad, torch.func.vmap
    each = [grad(loss, argnums=(0, 1))(w, z) for w in W]
    for context in (z, z.expand(2, 4, 2)):
        found = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None if context is z else 0))(W, context)
        for got, expected in zip(found, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-9, equal_nan=True)
    w, context = W.clone().requires_grad_(), z.clone().requires_grad_()
    found = torch.autograd.grad(vmap(loss, in_dims=(0, None))(w, context).sum(), (w, context))
    torch.testing.assert_close(found[0], torch.stack([g for g, _ in each]), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1], each[0][1] + each[1][1], rtol=0, atol=1e-9, equal_nan=True)
    assert found[1][1].isnan().all() and not found[1][GOOD].isnan().any()


def test_a_sample_that_fails_under_one_index_of_a_vmap_has_its_derivatives_under_the_others() -> None:
    c = torch.tensor([[1.0], [-0.5], [1.0], [2.0]], dtype=torch.float64)  # the curvature is c + s
    shifts = torch.tensor([0.0, 1.0], dtype=torch.float64)
    energy = lambda x, c, s: (0.5 * (c + s) * x.square() - c * x).sum(-1)  # noqa: E731

    def solve(s: Tensor, c: Tensor) -> Tensor:
        return minimize(energy, torch.ones(4, 1, dtype=torch.float64), c, s, on_failure="ignore", termination=TIGHT).value

    s, context = shifts.clone().requires_grad_(), c.clone().requires_grad_()
    x = torch.func.vmap(solve, in_dims=(0, None))(s, context)
    found = torch.autograd.grad(x[0, GOOD].sum() + x[1].sum(), (s, context))
    total = c + shifts  # (4, 2)
    torch.testing.assert_close(found[0], torch.stack([(-c / total.square())[GOOD, :1].sum(), (-c / total.square())[:, 1].sum()]))
    torch.testing.assert_close(found[1][GOOD], (shifts / total.square()).sum(-1, keepdim=True)[GOOD])


def test_a_shared_matrix_with_as_many_rows_as_samples_is_no_context_under_vmap() -> None:
    z = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[0, 1] = torch.nan
    w = torch.eye(3, dtype=torch.float64, requires_grad=True)

    def solve(z: Tensor, w: Tensor) -> Tensor:
        return minimize(mapped, torch.zeros_like(z), z, w, on_failure="ignore", termination=TIGHT).value

    x = torch.func.vmap(solve, in_dims=(0, None))(z, w)
    (got,) = torch.autograd.grad(x[0, [0, 2]].square().sum() + x[1].square().sum(), w)
    rows = torch.cat([z[0, [0, 2]], z[1]])
    (expected,) = torch.autograd.grad(solve(rows, w).square().sum(), w)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)

"""Minimizers within bounds: answers, active sets and evaluations beside SciPy's L-BFGS-B, derivatives, and odd bounds."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounded import PROBLEMS, Bounded, active, by_scipy, evaluations, hessian, polished, problem
from compiling import records
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from energynet import (
    FPI_GD,
    LBFGS,
    Anderson,
    Broyden,
    Compiled,
    Eager,
    ImplicitAdjoint,
    Nesterov,
    Picard,
    ProjectedLBFGS,
    Prox,
    ProximalStep,
    Status,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet.constraints import Box, NonNegative, Simplex

TIGHT = Termination(atol=1e-13, rtol=1e-12, max_steps=3000)
EXACT = ImplicitAdjoint(termination=Termination(rtol=1e-10))


SLOW = {"quadratic", "nonnegative least squares"}
EACH = pytest.mark.parametrize("name", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PROBLEMS])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def solve(p: Bounded, z: Tensor | None = None, **options: Any) -> Any:
    return minimize(p.energy, p.start, p.context if z is None else z, prox=Box(p.lower, p.upper), **options)


# ------------------------------------------------------------------------------------------------- beside SciPy


@EACH
def test_answers_active_sets_and_evaluations_of_scipy(name: str) -> None:
    """Where both find the same of several minima, as they do in all samples but one of Rosenbrock's."""
    p = problem(name)
    theirs = by_scipy(p)
    ours = solve(p, termination=Termination(rtol=1e-9, max_steps=2000), trace=True)
    x = ours.value
    assert (x >= p.lower).all() and (x <= p.upper).all()
    same = (active(p, x) == active(p, theirs.x)).all(-1)
    assert (~same).sum() <= (name == "Rosenbrock")
    exact = polished(p, theirs.x)
    close(x[same], exact[same], 1e-8)
    close(active(p, x)[same], active(p, exact)[same], 0)
    alike = same.nonzero().flatten().tolist()
    mine = sum(evaluations(ours.trace.value[:, i], exact[i]) for i in alike)
    assert mine <= 1.5 * sum(evaluations(theirs.points[i], exact[i]) for i in alike)


# ------------------------------------------------------------------------------------------------- derivatives


@EACH
def test_derivatives_are_those_of_the_free_coordinates(name: str) -> None:
    """dx/dz = −H⁻¹ ∂²E/∂x∂z in the free coordinates, and 0 in the others."""
    p = problem(name)
    z = p.context.requires_grad_()
    x = solve(p, z, termination=TIGHT, adjoint=EXACT).value
    weight = randn(*x.shape)
    (got,) = grad((weight * x).sum(), z)
    x = x.detach()
    free = active(p, x) == 0
    mixed = torch.func.jacrev(lambda z: torch.func.grad(lambda x: p.energy(x, z).sum())(x))(z.detach())
    mixed = mixed.diagonal(dim1=0, dim2=2).movedim(-1, 0).squeeze(-1)  # (B, n)
    rates = -torch.linalg.solve(hessian(p, x, free), torch.where(free, mixed, 0))
    expected = (weight * rates).sum(-1, keepdim=True)
    close(got / expected.abs(), expected.sign(), 1e-7)


def test_derivatives_are_difference_quotients() -> None:
    p, h = problem("logistic regression"), 1e-5
    z = p.context.requires_grad_()
    (got,) = grad(solve(p, z, termination=TIGHT, adjoint=EXACT).value.sin().sum(), z)
    up, down = (solve(p, p.context + s, termination=TIGHT).value.sin().sum(-1) for s in (h, -h))
    close(got.squeeze(-1) / got.abs().max(), (up - down) / (2 * h) / got.abs().max(), 1e-6)


def energy(x: Tensor, z: Tensor) -> Tensor:  # coupled, not quadratic, convex
    return 0.5 * (x - z).square().sum(-1) + 0.1 * x.sum(-1).square() + 0.05 * x.pow(4).sum(-1)


LOW = torch.tensor([-0.4, -0.1, 0.2, -1.0], dtype=torch.float64)
HIGH = torch.tensor([0.5, 0.3, 0.8, 2.0], dtype=torch.float64)


def bounded(z: Tensor, low: Tensor = LOW, high: Tensor = HIGH, **options: Any) -> Tensor:
    value: Tensor = minimize(energy, torch.zeros_like(z), z, prox=Box(low, high), termination=TIGHT, **options).value
    return value


def test_second_derivatives_in_the_context_and_the_bounds() -> None:
    z = 2 * randn(3, 4, seed=3)
    assert all((bounded(z) == bound).any() for bound in (LOW, HIGH)) and ((bounded(z) > LOW) & (bounded(z) < HIGH)).any()
    inputs = tuple(t.clone().requires_grad_() for t in (z, LOW, HIGH))
    assert gradcheck(bounded, inputs, fast_mode=True)
    assert gradgradcheck(bounded, inputs, fast_mode=True)


def test_the_transforms_of_torch_func() -> None:
    z = 2 * randn(2, 4, seed=3)
    both = torch.func.vmap(bounded)(torch.stack((z, -z)))
    close(both[0], bounded(z), 1e-11)
    close(both[1], bounded(-z), 1e-11)
    each = torch.func.vmap(lambda z, high: bounded(z[None], high=high)[0])(z, torch.stack((HIGH, HIGH + 1)))
    close(each[1], bounded(z, high=HIGH + 1)[1], 1e-11)
    reverse = torch.func.jacrev(bounded)(z)
    close(torch.func.jacfwd(bounded)(z), reverse, 1e-9)
    hessian = torch.func.hessian(lambda z: bounded(z).sin().sum())(z)
    close(hessian, torch.func.jacrev(torch.func.jacrev(lambda z: bounded(z).sin().sum()))(z), 1e-8)
    assert reverse[0, bounded(z)[0] == HIGH].abs().max() == 0


# ------------------------------------------------------------------------------------------------- bounds of all kinds


class AtMost(Prox):
    """Upper bounds that come with the context, one per sample and number."""

    is_box = True

    def encode(self, z: Tensor, upper: Tensor) -> tuple[Tensor]:
        return (upper,)

    def __call__(self, x: Tensor, step_size: Any, upper: Any) -> Tensor:
        return torch.where(x > upper, upper, x)


def test_bounds_of_each_sample_from_the_context() -> None:
    z, upper = 2 * randn(3, 4, seed=3), (0.5 * randn(3, 4, seed=5)).requires_grad_()
    x = minimize(lambda x, z, upper: energy(x, z), torch.zeros(3, 4), z.float(), upper.float(), prox=AtMost()).value
    assert x.dtype == torch.float32
    x = minimize(lambda x, z, upper: energy(x, z), torch.zeros_like(z), z, upper, prox=AtMost(), termination=TIGHT).value
    close(x, bounded(z, torch.tensor(-math.inf), upper), 1e-11)
    (rate,) = grad(x.sum(), upper)
    assert (rate[x < upper] == 0).all() and (rate[x == upper] > 0.5).all() and (x == upper).any()


def test_samples_alone_and_together_are_the_same() -> None:
    p = problem("Rosenbrock")
    together = solve(p)
    for i in range(len(p.start)):
        rows = slice(i, i + 1)
        alone = minimize(p.energy, p.start[rows], p.context[rows], prox=Box(p.lower[rows], p.upper[rows]))
        close(alone.value[0], together.value[i], 1e-7)
        assert abs(int(alone.num_steps[0]) - int(together.num_steps[i])) <= 3


def test_infinite_equal_and_missing_bounds() -> None:
    z = 2 * randn(3, 4, seed=3)
    free = minimize(energy, torch.zeros_like(z), z, termination=TIGHT).value
    for prox in (Box(), Box(-math.inf, math.inf), Box(upper=1e300)):
        close(minimize(energy, torch.zeros_like(z), z, prox=prox, termination=TIGHT).value, free, 1e-11)
    point = minimize(energy, torch.zeros_like(z), z, prox=Box(LOW, LOW))
    assert torch.equal(point.value, LOW.expand(3, 4)) and not point.num_steps.any()
    partly = torch.tensor([0.1, -math.inf, 0.7, -math.inf], dtype=torch.float64)
    x = bounded(z, partly, torch.where(partly.isinf(), math.inf, partly))
    assert torch.equal(x[:, ::2], partly[::2].expand(3, 2))
    slope = torch.func.grad(lambda x: energy(x, z).sum())(x)
    close(slope[:, 1::2], torch.zeros(3, 2, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("solver", [None, Nesterov()], ids=repr)
def test_a_nan_bound_fails_only_its_own_sample(solver: Any) -> None:
    z, upper = 2 * randn(3, 4, seed=3), HIGH.repeat(3, 1)
    upper[1, 2] = math.nan
    solution = minimize(energy, torch.zeros_like(z), z, prox=Box(upper=upper), solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    close(solution.value[::2], bounded(z, torch.tensor(-math.inf))[::2], 1e-6)


def test_a_start_outside_of_the_bounds_where_the_energy_has_no_value() -> None:
    c = torch.tensor([[3.0, -1.0, 0.5]], dtype=torch.float64)
    start = torch.tensor([[-5.0, -1.0, 9.0]], dtype=torch.float64)
    log = lambda x, c: (c * x - x.log()).sum(-1)  # noqa: E731
    for solver in (None, Nesterov()):
        x = minimize(log, start, c, prox=Box(0.1, 2.0), solver=solver).value
        close(x, torch.tensor([[1 / 3, 2.0, 2.0]], dtype=torch.float64), 1e-7)


def test_walls_at_the_bounds() -> None:
    """x log x has no value at 0, where the path of steepest descent ends, and its answers lie near by."""
    c = 3 * torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    entropy = lambda x, c: (c * x + 0.3 * x * x.log()).sum(-1)  # noqa: E731
    x = minimize(entropy, torch.full_like(c, 0.5), c, prox=Box(0.0, 0.3)).value
    close(x, (-c / 0.3 - 1).exp().clamp(max=0.3), 1e-7)


def test_flat_directions_and_linear_energies() -> None:
    z = randn(3, 4, seed=3)
    linear = minimize(lambda x, z: (z * x).sum(-1), torch.zeros_like(z), z, prox=Box(-1.0, 2.0))
    assert torch.equal(linear.value, torch.where(z > 0, -1.0, 2.0).double())
    assert linear.num_steps.amax() <= 10
    flat = minimize(lambda x, z: (x.sum(-1) - z[:, 0]).square(), torch.zeros_like(z), z, prox=Box(-1.0, 2.0))
    close(flat.value.sum(-1), z[:, 0], 1e-7)
    falling = minimize(lambda x: (-x).exp().sum(-1) - x.sum(-1), torch.zeros(1, 2), prox=NonNegative(), on_failure="ignore")
    assert (falling.status == Status.DIVERGED).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    z = 2 * randn(3, 4, seed=3)
    x = minimize(energy, torch.zeros_like(z, dtype=dtype), z.to(dtype), prox=Box(LOW, HIGH)).value
    assert x.dtype == dtype
    torch.testing.assert_close(x.double(), bounded(z), rtol=0, atol=2 * torch.finfo(dtype).eps ** 0.5)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_units_of_the_energy_do_not_matter(scale: float) -> None:
    z = 2 * randn(3, 4, seed=3)
    usual = minimize(energy, torch.zeros_like(z), z, prox=Box(LOW, HIGH))
    scaled = minimize(lambda x, z: scale * energy(x, z), torch.zeros_like(z), z, prox=Box(LOW, HIGH))
    close(scaled.value, usual.value, 1e-7)
    assert (scaled.num_steps - usual.num_steps).abs().amax() <= 1


def test_pytrees_one_problem_without_a_batch_and_the_trace() -> None:
    def joint(x: dict[str, Tensor], z: Tensor) -> Tensor:
        return energy(torch.cat([x["a"], x["b"].flatten(1)], -1), z)

    z = 2 * randn(3, 4, seed=3)
    start = {"a": torch.zeros(3, 2).double(), "b": torch.zeros(3, 1, 2).double()}
    prox = Box({"a": LOW[:2], "b": LOW[2:]}, {"a": HIGH[:2], "b": HIGH[2:]})
    solution = minimize(joint, start, z, prox=prox, termination=TIGHT, trace=True)
    close(torch.cat([solution.value["a"], solution.value["b"].squeeze(1)], -1), bounded(z), 1e-11)
    assert (solution.trace.energy.diff(dim=0) <= 1e-14).all()
    single = minimize(lambda x: energy(x, z[0]).sum(), torch.zeros(4).double(), prox=Box(LOW, HIGH), termination=TIGHT).value
    close(single, bounded(z)[0], 1e-11)


# ------------------------------------------------------------------------------------------------- what is chosen, and refused


def test_what_is_the_default() -> None:
    z = 2 * randn(3, 4, seed=3)
    minimizers = []

    def seen(solver: Any) -> Callable[..., Any]:
        original = type(solver).init
        return lambda self, problem, x0: minimizers.append(type(self)) or original(self, problem, x0)

    with pytest.MonkeyPatch.context() as patch:
        for solver in (ProjectedLBFGS(), Nesterov(), Picard()):
            patch.setattr(type(solver), "init", seen(solver))
        start = torch.zeros_like(z)
        for prox in (Box(LOW, HIGH), NonNegative(), Simplex(), lambda x, step_size: x.relu()):
            minimize(energy, start, z, prox=prox)
        minimize(energy, start, z, prox=Box(LOW, HIGH), step_size=0.3)
        FPI_GD(energy, prox=Box(LOW, HIGH))(z, x0=start)
        FPI_GD(energy, prox=Box(LOW, HIGH), solver=ProjectedLBFGS())(z, x0=start)
        fixed_point(ProximalStep(energy, 0.3, Box(LOW, HIGH)), start, z)
    P, N, G = ProjectedLBFGS, Nesterov, Picard
    assert minimizers == [P, P, N, N, G, G, P, G]


@pytest.mark.parametrize("solver", [Nesterov(), Anderson(), Broyden(), Picard()], ids=repr)
def test_other_solvers_take_bounds_too(solver: Any) -> None:
    z = 2 * randn(3, 4, seed=3)
    close(bounded(z, solver=solver), bounded(z), 1e-10)


def test_what_is_refused() -> None:
    z = randn(3, 4)
    with pytest.raises(TypeError, match=r"LBFGS cannot solve .* energy within bounds\. Use ProjectedLBFGS, "):
        bounded(z, solver=LBFGS())
    with pytest.raises(TypeError, match=r"ProjectedLBFGS cannot solve .* energy\. Use LBFGS, "):
        minimize(energy, torch.zeros_like(z), z, solver=ProjectedLBFGS())
    with pytest.raises(TypeError, match="ProjectedLBFGS cannot solve a fixed point"):
        minimize(energy, torch.zeros_like(z), z, prox=Simplex(), solver=ProjectedLBFGS())
    with pytest.raises(ValueError, match="memory ≥ 1, got 0"):
        ProjectedLBFGS(0)
    with pytest.raises(TypeError, match=r"UnrolledAdjoint cannot differentiate the updates of ProjectedLBFGS.* step_size="):
        bounded(z, adjoint=UnrolledAdjoint())
    close(bounded(z, adjoint=UnrolledAdjoint(), step_size=0.3, solver=Picard()), bounded(z), 1e-10)


@records
def test_the_compiled_driver_agrees() -> None:
    p = problem("Rosenbrock")
    results = []
    for driver in (Eager(), Compiled(strict=True)):
        z = p.context.requires_grad_()
        solution = solve(p, z, driver=driver)
        results.append((solution.value.detach(), *grad(solution.value.sin().sum(), z), solution.num_steps))
    close(results[1][0], results[0][0], 1e-7)
    close(results[1][1], results[0][1], 1e-5)
    assert (results[1][2] - results[0][2]).abs().amax() <= 3

"""Stated budgets: so many steps are what was asked for, and what they give is an answer with derivatives."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import records
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    FPI_NN,
    LBFGS,
    AdjointReport,
    Anderson,
    Compiled,
    ConjugateGradient,
    ConvergenceError,
    Energy,
    ImplicitAdjoint,
    NeumannAdjoint,
    OneStepAdjoint,
    Picard,
    Solution,
    Status,
    Termination,
    UnrolledAdjoint,
    WarmStart,
    diagnostics,
    fixed_point,
    implicit,
    minimize,
)
from energynet.engine import root_gradient

W = torch.tensor([1.0, 4.0], dtype=torch.float64)
THREE = Termination(budget=3)
POLICIES: list[Any] = ["raise", "warn", "ignore"]


def quadratic(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return 0.5 * (w * (x - z).square()).sum(-1)


def context() -> tuple[Tensor, Tensor]:
    z = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 0.0]], dtype=torch.float64)  # the last is there at once
    return z.requires_grad_(), W.clone().requires_grad_()


def after(k: int, z: Tensor, w: Tensor, gamma: float = 0.1) -> Tensor:
    """k gradient steps from zero."""
    return z * (1 - (1 - gamma * w) ** k)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_iterate_and_the_gradient_of_an_answer(policy: Any) -> None:
    z, w = context()
    found = minimize(quadratic, torch.zeros_like(z), z, w, step_size=0.1, termination=THREE, on_failure=policy)
    assert found.status.tolist() == [Status.BUDGET, Status.BUDGET, Status.CONVERGED]
    assert found.num_steps.tolist() == [3, 3, 0]
    assert found.failed.tolist() == [False] * 3 and found.converged.tolist() == [False, False, True]
    torch.testing.assert_close(found.value, after(3, z, w))
    torch.testing.assert_close(found.error[:2], (found.value - z).norm(dim=-1)[:2].detach(), rtol=0.2, atol=0)
    found.raise_for_status()
    dz, dw = torch.autograd.grad(found.value[:, 0].sum(), (z, w), create_graph=True)
    torch.testing.assert_close(dz, torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2))  # of x* = z, exactly
    # −H⁻¹ ∂²E/∂x∂w at the iterate: (z − x) / w
    torch.testing.assert_close(dw, torch.stack([((z - after(3, z, w)) / w)[:, 0].sum(), w.sum() * 0]))
    assert "BUDGET: 2 of 3 samples" in diagnostics.explain(found) and "failed" not in diagnostics.explain(found)


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_unrolling_differentiates_the_truncated_iterate(k: int) -> None:
    z, w = context()[0].detach()[:2].requires_grad_(), context()[1]
    options: dict[str, Any] = {"termination": Termination(budget=k), "adjoint": UnrolledAdjoint(), "step_size": 0.1}
    x = minimize(quadratic, torch.zeros_like(z), z, w, **options).value
    expected = after(k, z, w)
    torch.testing.assert_close(x, expected)
    if k:
        for got, want in zip(torch.autograd.grad(x.sin().sum(), (z, w)), torch.autograd.grad(expected.sin().sum(), (z, w))):
            torch.testing.assert_close(got, want)


def test_the_last_iterate_is_returned_and_not_the_best() -> None:
    swing = lambda x: -1.05 * x  # noqa: E731  # |x| grows
    x0 = torch.ones(1, 1, dtype=torch.float64)
    assert fixed_point(swing, x0, termination=THREE).value.item() == pytest.approx(-(1.05**3))
    assert fixed_point(swing, x0, termination=Termination(max_steps=3), on_failure="ignore").value.item() == 1


def test_a_truncated_adjoint_is_taken_as_it_is() -> None:
    A = torch.tensor([[0.5, 0.3], [-0.2, 0.4]], dtype=torch.float64)
    z = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    seen = AdjointReport()
    adjoint = ImplicitAdjoint(Picard(), Termination(budget=3), seen)
    x = fixed_point(lambda x, z: x @ A.T + z, torch.zeros_like(z), z, adjoint=adjoint).value
    v = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(x, z, v)
    torch.testing.assert_close(gradient, v @ (torch.eye(2).double() + A + A @ A))  # three steps of c = Aᵀ c + v
    assert seen.records[0].status.tolist() == [Status.BUDGET] and seen.records[0].num_steps.tolist() == [3]
    assert seen.records[0].residual.item() == pytest.approx((v @ A @ A @ A).norm().item())
    short = ImplicitAdjoint(ConjugateGradient(), Termination(budget=1))
    z, w = context()
    x = minimize(quadratic, torch.zeros_like(z), z, w, adjoint=short).value
    (dz,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(dz[:2], (W * 2 / 5).expand(2, 2))  # one step of conjugate gradients on W u = 1


def test_the_forward_budget_does_not_apply_to_the_adjoint() -> None:
    n = 30
    curvature = torch.linspace(1, 100, n, dtype=torch.float64)
    z = torch.ones(1, n, dtype=torch.float64, requires_grad=True)
    seen = AdjointReport()
    energy = lambda x, z: (0.5 * curvature * x.square() - x * z).sum(-1)  # noqa: E731
    options: dict[str, Any] = {"termination": Termination(budget=2, rtol=1e-10), "adjoint": ImplicitAdjoint(report=seen)}
    x = minimize(energy, torch.zeros_like(z), z, **options).value
    torch.testing.assert_close(torch.autograd.grad(x.sum(), z)[0], (1 / curvature)[None], rtol=1e-8, atol=0)
    assert seen.records[0].num_steps.item() > 2 and seen.records[0].status.tolist() == [Status.CONVERGED]


@pytest.mark.parametrize(("adjoint", "terms"), [(OneStepAdjoint(), 1), (NeumannAdjoint(2), 2)], ids=repr)
def test_phantom_gradients_of_a_truncated_iterate(adjoint: Any, terms: int) -> None:
    z = torch.full((2, 1), 2.0, dtype=torch.float64, requires_grad=True)
    x = fixed_point(lambda x, z: 0.5 * x + z.square(), torch.zeros_like(z), z, termination=THREE, adjoint=adjoint).value
    torch.testing.assert_close(x.detach(), torch.full_like(z, 7).detach())  # 4 + 2 + 1
    (gradient,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(gradient, 2 * z.detach() * sum(0.5**k for k in range(terms)))


def test_what_is_not_finite_or_diverges_is_still_a_failure() -> None:
    z, w = context()
    bad = torch.where(torch.arange(3).unsqueeze(1) == 0, math.nan, z)
    with pytest.raises(ConvergenceError, match="NONFINITE: 1 of 3 samples"):
        minimize(quadratic, torch.zeros_like(z), bad, w, step_size=0.1, termination=THREE)
    with pytest.raises(ConvergenceError, match="DIVERGED"):
        fixed_point(lambda x: 100 * x + 1, torch.zeros(1, 1), termination=Termination(budget=50))
    with pytest.raises(ValueError, match="whole number budget"):
        Termination(budget=-1)
    with pytest.raises(ConvergenceError, match=r"MAX_STEPS.*Termination\(budget="):
        minimize(quadratic, torch.zeros_like(z), z, w, step_size=0.1, termination=Termination(max_steps=3))


def test_networks_in_front_and_inside_learn() -> None:
    class Inside(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2, dtype=torch.float64)

        def encode(self, z: Tensor) -> Tensor:
            return self.net(z)

        def evaluate(self, x: Tensor, c: Tensor) -> Tensor:
            return quadratic(x, c, W)

    energy, z = Inside(), context()[0].detach()[:2]
    for layer in (FPI_GD(energy, 0.1, start=torch.zeros_like, termination=THREE),
                  FPI_GD(energy, start=torch.zeros_like, termination=THREE)):  # fmt: skip
        assert layer.solve(z).status.tolist() == [Status.BUDGET] * 2
        (bias,) = torch.autograd.grad(layer(z).sum(), energy.net.bias)
        torch.testing.assert_close(bias, torch.full((2,), 2.0, dtype=torch.float64))
    deq = FPI_NN(lambda x, z: 0.5 * x + z, start=torch.zeros_like, termination=Termination(budget=2))
    (bias,) = torch.autograd.grad(deq(energy.net(z)).sum(), energy.net.bias)
    torch.testing.assert_close(bias, torch.full((2,), 4.0, dtype=torch.float64))  # of x* = 2 z, whatever the iterate


def test_under_transforms() -> None:
    z, w = (t.detach() for t in context())

    def solve(z: Tensor, w: Tensor, **options: Any) -> Tensor:
        options = {"step_size": 0.1, "termination": THREE, **options}
        return minimize(lambda x, z, w: quadratic(x, z, w), torch.zeros_like(z), z, w, **options).value

    torch.testing.assert_close(torch.func.vmap(solve, in_dims=(0, None))(z, w), after(3, z, w))
    implicit_sum = lambda w, z: solve(z, w).sum()  # noqa: E731
    expected = ((z - after(3, z, w)) / w).sum(0)
    torch.testing.assert_close(torch.func.grad(implicit_sum)(w, z), expected)
    each = torch.func.vmap(torch.func.grad(implicit_sum), in_dims=(None, 0))(w, z)
    torch.testing.assert_close(each.sum(0), expected)
    torch.testing.assert_close(torch.func.jacfwd(implicit_sum)(w, z), expected)
    unrolled = lambda w, z: solve(z, w, adjoint=UnrolledAdjoint()).sum()  # noqa: E731
    each = torch.func.vmap(torch.func.grad(unrolled), in_dims=(None, 0))(w, z)
    torch.testing.assert_close(each.sum(0), torch.func.grad(lambda w: after(3, z, w).sum())(w))


def test_black_boxes_need_not_meet_their_condition() -> None:
    rough = implicit(lambda z: z + 0.3, lambda x, z: x**3 - z, symmetric=True, termination=Termination(budget=0))
    z = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(rough(z).sum(), z)[0].item(), 1 / (3 * 1.3**2))


def test_a_budget_solve_can_continue_from_the_previous_one() -> None:
    z, w = context()
    warm = WarmStart()
    found = minimize(quadratic, torch.zeros_like(z), z, w, step_size=0.1, termination=THREE)
    warm.store([0, 1, 2], found)
    torch.testing.assert_close(warm.start([0, 1, 2], torch.zeros_like(z)), found.value.detach())


@records
def test_both_drivers_agree() -> None:
    z, w = context()
    energy: Callable[..., Tensor] = quadratic
    for options in ({"step_size": 0.1}, {"solver": LBFGS()}, {"solver": Anderson()}):
        results = []
        for driver in (None, Compiled(strict=True)):
            found = minimize(energy, torch.zeros_like(z), z, w, termination=THREE, driver=driver, **options)
            results.append((found.status, found.num_steps, found.value, *torch.autograd.grad(found.value.sum(), (z, w))))
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager)


def ill_conditioned(termination: Termination, **options: Any) -> Solution:
    """A solve of 200 unknowns of condition 1000, with x* = 1."""
    scale = torch.logspace(0, 3, 200, dtype=torch.float64)
    z = torch.ones(2, 200, dtype=torch.float64, requires_grad=True)
    energy = lambda x, z: 0.5 * (scale * (x - z).square()).sum(-1)  # noqa: E731
    return minimize(energy, torch.zeros_like(z), z, termination=termination, **options)


@pytest.mark.parametrize("products", [0, 1, 10])
def test_few_products_make_the_estimate_no_larger_and_leave_value_and_gradient_alone(products: int) -> None:
    full = ill_conditioned(Termination(budget=6))
    cheap = ill_conditioned(Termination(budget=6, products=products))
    torch.testing.assert_close(cheap.value, full.value, rtol=0, atol=0)
    assert (cheap.error <= 1.01 * full.error).all() and (cheap.error > 0).all()
    assert (full.error <= 1.01 * (cheap.value - 1).norm(dim=-1)).all()
    assert cheap.status.tolist() == full.status.tolist() == [Status.BUDGET] * 2


def test_products_are_a_whole_number() -> None:
    with pytest.raises(ValueError, match="products"):
        Termination(products=-1)
    with pytest.raises(ValueError, match="products"):
        Termination(products=1.5)  # type: ignore[arg-type]


def test_without_gradients_nothing_is_tried_for_failed_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    known = root_gradient.input_kinds
    monkeypatch.setattr(root_gradient, "input_kinds", lambda *args: asked.append(args) or known(*args))
    short = Termination(max_steps=2)
    with torch.no_grad():
        ill_conditioned(short, on_failure="ignore")
    assert not asked
    ill_conditioned(short, on_failure="ignore")
    assert len(asked) == 1


def test_the_loop_does_not_know_of_gradients() -> None:
    """No evaluation records what a gradient of the inputs would need."""
    seen = []

    def energy(x: Tensor, z: Tensor) -> Tensor:
        seen.append(z.requires_grad)
        return (x - z).square().sum(-1) + x.cosh().log().sum(-1)

    z = torch.ones(2, 20, dtype=torch.float64, requires_grad=True)
    minimize(energy, torch.zeros_like(z), z)
    assert len(seen) > 8 and sum(seen) <= 1  # one look before the solve

"""The energy at the answer: values and derivatives of the first two orders against closed forms and finite differences."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import records
from problems import TIGHT, EncodedLogCosh, LogCosh, LogEnergy, some_context
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    FPI_NN,
    AdjointReport,
    ChangedFunctionError,
    Compiled,
    Energy,
    GradientStep,
    ImplicitAdjoint,
    MultiStart,
    Newton,
    Picard,
    Solution,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet._torch import tree
from energynet.constraints import Box

THETA = 0.7


def answer_of(z: Tensor, **options: Any) -> Solution:
    return minimize(LogEnergy(THETA), None, z, termination=TIGHT, solver=Newton(), **options)


def closed_form(z: Tensor) -> Tensor:  # θ exp(x) − z x at x* = log(z/θ)
    return (z - z * (z / THETA).log()).sum(-1)


@pytest.fixture
def z() -> Tensor:
    return torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=torch.float64, requires_grad=True)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------- derivatives


def test_value_and_gradients_have_closed_forms_and_the_first_needs_no_adjoint_solve(z: Tensor) -> None:
    seen = AdjointReport()
    energy = LogEnergy(THETA)
    solution = minimize(energy, None, z, termination=TIGHT, solver=Newton(), adjoint=ImplicitAdjoint(report=seen))
    assert close(solution.energy, closed_form(z))
    first = torch.autograd.grad(solution.energy.sum(), (z, energy.theta), create_graph=True)
    assert close(first[0], -(z / THETA).log()) and close(first[1], z.sum() / THETA)  # −x*, Σ exp(x*)
    assert seen.num_solves == 0
    assert close(torch.autograd.grad(first[0].sum(), z, retain_graph=True)[0], -1 / z)
    assert seen.num_solves == 1
    assert close(torch.autograd.grad(first[1], energy.theta)[0], -z.sum() / THETA**2)


def test_first_and_second_derivatives_agree_with_finite_differences(z: Tensor) -> None:
    weight = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def energy(z: Tensor, weight: Tensor) -> Tensor:
        mixed = lambda x, z, w: (x - z).square().sum(-1) + w * x.square().sum(-1) + x.pow(4).sum(-1)  # noqa: E731
        tight = Termination(1e-13, 1e-13)
        return minimize(mixed, torch.zeros_like(z), z, weight, termination=tight, solver=Newton()).energy

    z = z.detach()[:1].requires_grad_()
    assert torch.autograd.gradcheck(energy, (z, weight), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(energy, (z, weight))


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_hessians_of_torch_func(inner: Callable[..., Any], outer: Callable[..., Any], z: Tensor) -> None:
    found = outer(inner(lambda z: answer_of(z).energy.sum()))(z.detach())
    assert close(found, torch.diag((-1 / z.detach()).flatten()).reshape(2, 2, 2, 2))


def test_third_order(z: Tensor) -> None:
    found = torch.func.jacrev(torch.func.hessian(lambda z: answer_of(z[None]).energy.sum()))(z.detach()[0])
    assert close(torch.stack([found[k, k, k] for k in range(2)]), 1 / z.detach()[0].square(), 1e-7)


def test_a_mixed_loss_of_energy_and_value(z: Tensor) -> None:
    solution = answer_of(z)
    loss = (solution.energy + solution.value.sum(-1)).square().sum()
    expected = (closed_form(z) + (z / THETA).log().sum(-1)).square().sum()
    assert close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0])


def test_vmap_with_and_without_gradients(z: Tensor) -> None:
    scales = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    found = torch.func.vmap(lambda s: answer_of(s * z).energy)(scales)
    expected = torch.stack([closed_form(s * z) for s in scales])
    assert close(found, expected)
    assert close(*(torch.autograd.grad(e.square().sum(), z, retain_graph=True)[0] for e in (found, expected)))
    gradients = torch.func.vmap(torch.func.grad(lambda s: answer_of(s * z.detach()).energy.sum()))(scales)
    assert close(gradients, torch.stack([-(z.detach() * (s * z.detach() / THETA).log()).sum() for s in scales]))


def test_a_solution_that_leaves_vmap_has_its_energy(z: Tensor) -> None:
    solution = torch.func.vmap(lambda s: answer_of(s * z))(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert close(solution.energy, torch.stack([closed_form(z), closed_form(2 * z)]))
    assert close(torch.autograd.grad(solution.energy[0].sum(), z)[0], -(z / THETA).log())


def test_rayleigh_quotient_needs_no_linear_solve() -> None:
    """Its Hessian is singular along the gauge direction; the derivative of the least eigenvalue is v vᵀ."""
    A = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = (A + A.mT).requires_grad_()
    quotient = lambda x, A: (x * (x @ A)).sum(-1) / x.square().sum(-1)  # noqa: E731
    seen = AdjointReport()
    energy = minimize(quotient, torch.ones(1, 4, dtype=torch.float64), A, termination=Termination(1e-10, 1e-10),
                      adjoint=ImplicitAdjoint(report=seen)).energy  # fmt: skip
    values, vectors = torch.linalg.eigh(A.detach())
    assert close(energy, values[:1])
    assert close(torch.autograd.grad(energy.sum(), A)[0], torch.outer(vectors[:, 0], vectors[:, 0]))
    assert seen.num_solves == 0


# ------------------------------------------------------------------------------------------------- every kind of solve


def test_parameters_and_code_of_layers() -> None:
    context, found = some_context(3), []
    for energy in (LogCosh(), EncodedLogCosh()):
        solution = FPI_GD(energy, solver=Newton(), termination=TIGHT).solve(context)
        assert close(solution.energy, energy(solution.value, context))
        first = torch.autograd.grad(solution.energy.sum(), list(energy.parameters()), create_graph=True)
        assert close(first[0], torch.autograd.grad(energy(solution.value.detach(), context).sum(), energy.A)[0])
        found.append([*first, *torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), list(energy.parameters()))])
    assert all(close(a, b, 1e-7) for a, b in zip(*found, strict=True))


def test_pytrees_and_one_problem_without_a_batch() -> None:
    z = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    energy = lambda x, z: (x["a"] - z).square() + (x["b"] - z).square().sum() + x["b"].square().sum()  # noqa: E731
    x0 = {"a": torch.zeros((), dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    solution = minimize(energy, x0, z, termination=TIGHT)
    assert solution.energy.shape == () and close(solution.energy, z.square())  # b = z / 2
    assert close(torch.autograd.grad(solution.energy, z)[0], 2 * z)


def test_multistart_has_the_lowest_energy() -> None:
    tilt = torch.tensor([[0.1]], dtype=torch.float64, requires_grad=True)
    well = lambda x, tilt: (x**2 - 1).square().sum(-1) + (tilt * x).sum(-1)  # noqa: E731
    solution = minimize(well, MultiStart(torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64)), tilt, termination=TIGHT)
    assert float(solution.energy.detach()) < 0
    assert close(torch.autograd.grad(solution.energy.sum(), tilt)[0], solution.value)


def test_a_constant_box_adds_nothing_and_a_learned_bound_its_multiplier() -> None:
    z = torch.tensor([[0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    upper = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def energy(z: Tensor, upper: Tensor) -> Tensor:
        far = lambda x, z: (x - z).square().sum(-1)  # noqa: E731
        return minimize(far, torch.zeros_like(z), z, prox=Box(0.0, upper), termination=TIGHT).energy

    found = energy(z, upper)
    dz, du = torch.autograd.grad(found.sum(), (z, upper), create_graph=True)
    assert close(found, torch.tensor([4.0], dtype=torch.float64))  # (1 − 3)²
    assert close(dz, torch.tensor([[0.0, 4.0]], dtype=torch.float64)) and close(du, torch.tensor(-4.0, dtype=torch.float64))
    assert close(torch.autograd.grad(du, upper)[0], torch.tensor(2.0, dtype=torch.float64))
    assert close(torch.func.jacfwd(energy, argnums=1)(z.detach(), upper.detach()), torch.tensor([-4.0], dtype=torch.float64))


def test_a_budget_differentiates_as_if_converged_and_an_unrolled_solve_its_iterate() -> None:
    z, budget = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True), Termination(budget=3)
    half = lambda x, z: 0.5 * (x - z).square().sum(-1)  # noqa: E731
    for adjoint, power in ((ImplicitAdjoint(), 3), (UnrolledAdjoint(), 6)):
        energy = minimize(half, torch.zeros_like(z), z, step_size=0.25, termination=budget, adjoint=adjoint).energy
        assert close(energy, 0.5 * 0.75**6 * z.square().flatten())
        assert close(torch.autograd.grad(energy.sum(), z)[0], 0.75**power * z)


@pytest.mark.parametrize("prox", [None, Box(-5.0, 5.0)], ids=["free", "box"])
def test_a_failed_sample_does_not_affect_others(prox: Box | None) -> None:
    z = torch.tensor([[float("nan")], [2.0], [3.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    both = lambda x, z, w: (x - z).square().sum(-1) + w * x.square().sum(-1)  # noqa: E731
    energy = minimize(both, torch.zeros(3, 1, dtype=torch.float64), z, weight, prox=prox, termination=TIGHT,
                      on_failure="ignore").energy  # fmt: skip
    assert energy[0].isnan() and close(energy[1:], 0.5 * z[1:].flatten().square())
    dz, dw = torch.autograd.grad(energy.nansum(), (z, weight), create_graph=True)
    assert dz[0].isnan() and close(dz[1:], z[1:]) and close(dw, z[1:].square().sum() / 4)
    second = torch.autograd.grad(dw, weight)[0]  # w/(1 + w) z² twice differentiated
    assert close(second, -z[1:].square().sum() / 4)


@pytest.mark.parametrize("energy", [LogCosh(), EncodedLogCosh()], ids=["plain", "encoded"])
def test_a_failed_sample_adds_nothing_to_weights(energy: LogCosh) -> None:
    found, (weight, *_) = [], energy.parameters()
    good = some_context(3)
    for context in (good.index_put((torch.tensor(1),), torch.tensor(float("nan"), dtype=torch.float64)), good[[0, 2]]):
        solution = FPI_GD(energy, solver=Newton(), termination=TIGHT, on_failure="ignore").solve(context)
        (first,) = torch.autograd.grad(solution.energy.nansum(), weight, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), weight)))
    assert all(close(a, b) for a, b in zip(*found, strict=True))


def test_failed_samples_under_vmap() -> None:
    z = torch.tensor([[[1.0], [float("nan")]], [[2.0], [3.0]]], dtype=torch.float64)

    def energy(z: Tensor) -> Tensor:
        far = lambda x, z: (x - z).square().sum(-1) + x.square().sum(-1)  # noqa: E731
        return minimize(far, torch.zeros_like(z), z, on_failure="ignore").energy.nansum()

    assert torch.allclose(torch.func.vmap(torch.func.grad(energy))(z), z, rtol=1e-4, equal_nan=True)


def test_no_sample_left() -> None:
    z = torch.full((2, 1), float("nan"), dtype=torch.float64, requires_grad=True)
    energy = minimize(lambda x, z: (x - z).square().sum(-1), torch.zeros_like(z), z, on_failure="ignore").energy
    assert torch.autograd.grad(energy.sum(), z)[0].isnan().all()


def test_an_energy_made_of_the_answers_energy() -> None:
    z = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)

    def partly(y: Tensor, z: Tensor) -> Tensor:  # ½ (y − z)²
        both = lambda x, y, z: (x - y).square().sum(-1) + (x - z).square().sum(-1)  # noqa: E731
        return minimize(both, torch.zeros_like(y), y, z, termination=TIGHT).energy

    outer = lambda y, z: partly(y, z) + y.square().sum(-1)  # noqa: E731
    solution = minimize(outer, torch.zeros(1, 1, dtype=torch.float64), z, solver=Newton(), termination=TIGHT)
    assert close(solution.value, z / 3) and close(solution.energy, z[0].square() / 3)
    assert close(torch.autograd.grad(solution.value.sum(), z, retain_graph=True)[0], torch.full_like(z, 1 / 3))
    assert close(torch.autograd.grad(solution.energy.sum(), z)[0], 2 * z / 3)


@pytest.mark.parametrize("options", [{}, {"vectorize": True}, {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}])
def test_hessians_of_autograd_functional(options: dict[str, Any], z: Tensor) -> None:
    found = torch.autograd.functional.hessian(lambda z: answer_of(z).energy.sum(), z.detach(), **options)
    assert close(found, torch.diag((-1 / z.detach()).flatten()).reshape(2, 2, 2, 2))


@records
def test_the_compiled_driver_has_the_same_energy(z: Tensor) -> None:
    found = answer_of(z, driver=Compiled(strict=True)).energy
    assert close(found, closed_form(z)) and close(torch.autograd.grad(found.sum(), z)[0], -(z / THETA).log())


# ------------------------------------------------------------------------------------------------- what a Solution holds


class Counted(Energy):
    calls = 0

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:
        Counted.calls += 1
        return (x - z).square().sum(-1)


def test_reading_the_energy_costs_one_evaluation(z: Tensor) -> None:
    solution = minimize(Counted(), torch.zeros_like(z), z)
    before = Counted.calls
    repr(solution), dataclasses.replace(solution, num_steps=solution.num_steps), tree.map_structure(torch.clone, solution)
    assert Counted.calls == before
    assert solution.energy is solution.energy
    assert Counted.calls == before + 1


def test_the_energy_has_gradients_if_the_solve_had(z: Tensor) -> None:
    solution = answer_of(z)
    with torch.no_grad():
        assert solution.energy.requires_grad
    with torch.no_grad():
        solution = answer_of(z)
    assert not solution.energy.requires_grad
    layer = FPI_GD(LogEnergy(THETA), solver=Newton(), termination=TIGHT)
    with torch.inference_mode():
        solution = layer.solve(z)
        assert close(solution.energy, closed_form(z.detach()))


def test_copies_and_pickles(z: Tensor) -> None:
    with torch.no_grad():
        solution = answer_of(z)
    unread = pickle.loads(pickle.dumps(solution))
    assert close(unread.value, solution.value)
    with pytest.raises(AttributeError, match="Read it from the original"):
        _ = unread.energy
    with pytest.raises(AttributeError, match="Read it from the original"):
        _ = tree.map_structure(torch.clone, solution).energy
    for again in (copy.copy(solution), copy.deepcopy(solution), dataclasses.replace(solution, trace=None)):
        assert close(again.energy, closed_form(z.detach()))
    _ = solution.energy
    assert close(pickle.loads(pickle.dumps(solution)).energy, solution.energy)
    assert close(tree.map_structure(lambda t: 2 * t, solution).energy, 2 * solution.energy)
    assert repr(solution) == repr(unread)
    dataclasses.asdict(solution)


def test_a_gradient_step_has_an_energy_and_a_map_has_none() -> None:
    solution = fixed_point(lambda x: 0.5 * x + 1, torch.zeros(1, 1))
    with pytest.raises(AttributeError, match="has no energy"):
        _ = solution.energy
    assert not hasattr(FPI_NN(lambda x: 0.5 * x, start=torch.zeros(1, 1)).solve(), "energy")
    assert not hasattr(
        torch.func.vmap(lambda z: fixed_point(lambda x, z: 0.5 * x + z, torch.zeros(1, 1), z))(torch.ones(2)), "energy"
    )
    step = GradientStep(lambda x: (x - 3).square().sum(-1) + 1, 0.25)
    assert close(fixed_point(step, torch.zeros(1, 1)).energy, torch.ones(1), 1e-4)


def test_the_energy_is_that_of_the_solved_problem() -> None:
    factor = 2.0
    energy = lambda x: factor * (x - 1).square().sum(-1) + factor  # noqa: E731
    solution = minimize(energy, torch.zeros(1, 1))
    factor = 5.0
    assert close(solution.energy, torch.full((1,), 2.0), 1e-4)
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    solution = minimize(lambda x, w: (x - w).square().sum(-1) + w, torch.zeros(1, 1, dtype=torch.float64), weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(ChangedFunctionError, match="Read the energy before"):
        _ = solution.energy


def test_autocast_is_that_of_the_solve() -> None:
    A, z = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4, requires_grad=True)
    energy = lambda x, z: (x @ A - z).float().square().sum(-1) + x.square().sum(-1)  # noqa: E731
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = minimize(energy, torch.zeros(2, 4), z, solver=Picard(), on_failure="ignore")
        expected = energy(solution.value.detach(), z)
    assert torch.equal(solution.energy, expected)
    assert torch.equal(*(torch.autograd.grad(e.sum(), z)[0] for e in (solution.energy, expected)))

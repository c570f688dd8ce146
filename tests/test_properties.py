"""Properties over random energies, networks, shapes, batch sizes, conditioning, step sizes and pytrees, in float64."""

import copy
import dataclasses
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from energynet import (
    FPI_GD,
    FPI_NN,
    AdjointReport,
    Anderson,
    ConjugateGradient,
    ConvergenceError,
    ConvergenceWarning,
    DampedStep,
    Energy,
    GradientStep,
    ImplicitAdjoint,
    MapStep,
    OneStepAdjoint,
    Picard,
    Status,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet._torch.tree import Layout
from energynet.termination import max_norm
from energynet.testing import check_energy, check_layer, check_step
from energynet.testing.strategies import EnergyCase, Quadratic, contractions, energies, points

TIGHT = Termination(atol=1e-12, rtol=1e-12, max_steps=20_000)
CASES = st.one_of(energies(), contractions())


def forall(examples=20, cases=CASES):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    drawn = settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)
    return lambda test: drawn(given(case=cases)(test))


def layer_of(case, **options):
    options = {"termination": TIGHT, **options}
    if isinstance(case, EnergyCase):
        return FPI_GD(case.energy, case.step_size, **options)
    return FPI_NN(case.network, **options)


def answer(layer, case, values=None):
    """x* as (B, n); ``values``: the context, then the parameters."""
    context, parameters = case.context, dict(layer.named_parameters())
    if values is not None:
        context, parameters = values[: len(context)], dict(zip(parameters, values[len(context) :]))
    x = torch.func.functional_call(layer, parameters, tuple(context), {"x0": case.x0})
    return Layout.of(x, 1).ravel(x)


def inputs(layer, case):
    return [t.detach().clone().requires_grad_() for t in (*case.context, *layer.parameters())]


def weights(like, shift=0.0):
    return torch.linspace(-1 + shift, 2, like.numel(), dtype=like.dtype).reshape(like.shape)


def loss(x):
    return (weights(x) * x).sum() + 0.5 * x.square().sum()


def gradients(layer, case, values=None, create_graph=False):
    values = inputs(layer, case) if values is None else values
    found = torch.autograd.grad(loss(answer(layer, case, values)), values, create_graph=create_graph, materialize_grads=True)
    return list(found)


def error(a, b):
    """Largest relative error between lists of tensors, each against its own size."""
    pairs = list(zip(a, b, strict=True)) if isinstance(a, list | tuple) else [(a, b)]
    size = max(float(t.detach().norm()) for _, t in pairs)
    return max(float((s - t).detach().norm()) / max(float(t.detach().norm()), 1e-3 * size, 1e-300) for s, t in pairs)


def slope(function, values, direction, h=2e-3):
    """Central difference of fourth order."""
    at = lambda k: function([(t + k * h * d).detach().requires_grad_() for t, d in zip(values, direction)]).detach()  # noqa: E731
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)


# ------------------------------------------------------------------------------------------------- gradients


@forall(10)
def test_first_derivatives_equal_finite_differences(case):
    layer = layer_of(case)
    values = inputs(layer, case)
    direction = [weights(t, 0.3).cos() for t in values]
    exact = sum((g * d).sum() for g, d in zip(gradients(layer, case, values), direction))
    difference = slope(lambda v: loss(answer(layer, case, v)), values, direction)
    assert abs(exact - difference) <= 3e-8 * (1 + abs(exact))


@forall(6)
def test_second_derivatives_equal_finite_differences_of_first(case):
    layer = layer_of(case)
    values = inputs(layer, case)
    direction = [weights(t, 0.3).cos() for t in values]

    def first(v):
        return sum((g * weights(g, 0.7).sin()).sum() for g in gradients(layer, case, v, create_graph=True))

    found = torch.autograd.grad(first(values), values, materialize_grads=True)
    exact = sum((g * d).sum() for g, d in zip(found, direction))
    difference = slope(first, values, direction)
    assert abs(exact - difference) <= 1e-7 * (1 + abs(exact))


@pytest.mark.slow
@forall(6)
def test_gradcheck_and_gradgradcheck(case):
    layer = layer_of(case)
    values = inputs(layer, case)
    function = lambda *v: answer(layer, case, v).sin()  # noqa: E731
    torch.autograd.gradcheck(function, values, fast_mode=True, eps=1e-5, atol=1e-6)
    torch.autograd.gradgradcheck(function, values, fast_mode=True, eps=1e-5, atol=1e-5)


def residual(case, x, values):
    """F(x) of the core on (B, n), by plain autograd."""
    module = case.core
    parameters = dict(zip(dict(module.named_parameters()), values[len(case.context) :]))
    output = torch.func.functional_call(module, parameters, (x, *values[: len(case.context)]))
    if not isinstance(case, EnergyCase):
        return x - output
    return torch.autograd.grad(output.sum(), x, create_graph=True)[0]


def dense_reference(case, values, x):
    """x* by Newton's method and the loss's gradients by the implicit function theorem, with dense matrices."""
    for _ in range(3):
        x = x.detach().requires_grad_()
        jacobian = torch.autograd.functional.jacobian(lambda x: residual(case, x, values), x, create_graph=False)
        matrix = jacobian.reshape(x.numel(), x.numel())
        x = (x - torch.linalg.solve(matrix, residual(case, x, values).flatten()).reshape(x.shape)).detach()
    x = x.requires_grad_()
    (v,) = torch.autograd.grad(loss(x), x)
    u = torch.linalg.solve(matrix.T, v.flatten()).reshape(x.shape)
    found = torch.autograd.grad(-(residual(case, x, values) * u).sum(), values, materialize_grads=True)
    return x.detach(), list(found)


@forall(30)
def test_answers_and_gradients_equal_the_implicit_function_theorem(case):
    layer = layer_of(case)
    values = inputs(layer, case)
    found = answer(layer, case, values)
    x, expected = dense_reference(case, values, found)
    assert error(found, x) <= 1e-10
    assert error(gradients(layer, case, values), expected) <= 1e-8


# ------------------------------------------------------------------------------------------------- invariants


def with_rows(case, rows):
    take = lambda tree: torch.utils._pytree.tree_map(lambda t: t[rows], tree)  # noqa: E731
    changed = {"x0": take(case.x0), "context": take(case.context)}
    step_size = getattr(case, "step_size", None)
    if isinstance(step_size, torch.Tensor) and step_size.ndim:
        changed["step_size"] = step_size[rows]
    return dataclasses.replace(case, **changed)


@pytest.mark.slow
@forall(10)
def test_a_sample_depends_on_no_batch_mate_nor_on_their_order(case):
    def solved(case):
        z = case.context[0].clone().requires_grad_()
        x = answer(layer_of(case), case, [z, *layer_of(case).parameters()])
        return x.detach(), torch.autograd.grad(x.sin().sum(), z)[0]

    batch = case.context[0].shape[0]
    x, gradient = solved(case)
    for rows in (torch.arange(batch).flip(0), torch.zeros(3, dtype=torch.long), torch.arange(batch)[-1:]):
        mapped, mapped_gradient = solved(with_rows(case, rows))
        assert error(mapped, x[rows]) <= 1e-11 and error(mapped_gradient, gradient[rows]) <= 1e-10


@forall(20, st.tuples(CASES, st.integers(0, 99)))
def test_answer_and_gradient_do_not_depend_on_the_start_and_step_size(case):
    case, seed = case
    x, gradient = answer(layer_of(case), case), gradients(layer_of(case), case)
    random = torch.Generator().manual_seed(seed)
    start = Layout.of(case.x0, 1).unravel(2 * torch.rand(x.shape, generator=random, dtype=x.dtype) - 1)
    other = dataclasses.replace(case, x0=start)
    if isinstance(case, EnergyCase):
        other = dataclasses.replace(other, step_size=torch.as_tensor(case.step_size) * 0.6)
    assert error(answer(layer_of(other), other), x) <= 3e-11
    assert error(gradients(layer_of(other), other), gradient) <= 1e-10


@forall(20)
def test_a_budget_beyond_convergence_changes_no_bit(case):
    solution = layer_of(case).solve(*case.context, x0=case.x0)
    exact = dataclasses.replace(TIGHT, max_steps=max(1, int(solution.num_steps.max())))
    again = layer_of(case, termination=exact).solve(*case.context, x0=case.x0)
    assert all(torch.equal(a, b) for a, b in zip(*map(torch.utils._pytree.tree_leaves, (solution.value, again.value))))
    assert torch.equal(solution.num_steps, again.num_steps) and torch.equal(solution.error, again.error)


class Scaled(Energy):
    def __init__(self, energy, factor):
        super().__init__()
        self.energy, self.factor = energy, factor

    def evaluate(self, x, *context):
        return self.factor * self.energy(x, *context)


def scaled(case, factor, step_size):
    return dataclasses.replace(case, energy=Scaled(case.energy, factor), step_size=step_size)


@pytest.mark.slow
@forall(4, energies())
def test_scaling_the_energy_and_the_step_size_changes_no_bit_of_the_answer(case):
    """For a power of two every product is exact; the reported residual is the same too.

    The energy itself is multiplied by one: PyTorch has other kernels, which round otherwise, for the cotangent of a bare sum.
    """
    case = scaled(case, 1.0, case.step_size)
    for factor in (2.0**-10, 2.0**7):
        other = scaled(case, factor, case.step_size / factor)
        before, after = (layer_of(c).solve(*c.context, x0=c.x0) for c in (case, other))
        assert torch.equal(before.num_steps, after.num_steps) and torch.equal(before.error, after.error)
        assert torch.equal(answer(layer_of(case), case), answer(layer_of(other), other))
        assert error(gradients(layer_of(other), other), gradients(layer_of(case), case)) <= 1e-12


@pytest.mark.slow
@forall(5, st.tuples(energies(), st.floats(0.3, 1.0)))
def test_scaling_the_energy_alone_leaves_answer_gradient_and_residual(case):
    case, factor = case
    other = scaled(case, factor, case.step_size)
    assert error(answer(layer_of(other), other), answer(layer_of(case), case)) <= 3e-11
    assert error(gradients(layer_of(other), other), gradients(layer_of(case), case)) <= 1e-10
    # The residual is a property of the point: judged where it stands, with any factor and step size.
    loose = Termination(atol=1e6, rtol=0.0, max_steps=5)
    residuals = [layer_of(c, termination=loose).solve(*c.context, x0=c.x0).error for c in (case, other)]
    assert error(residuals[1], residuals[0]) <= 1e-12


@forall(15, energies())
def test_a_failed_solve_reports_a_residual_free_of_step_size_too(case):
    """F(x0) in units of x: step size and scale are divided out, whether or not the sample converged."""
    none = dict(termination=Termination(atol=0.0, rtol=0.0, max_steps=0), on_failure="ignore")
    other = scaled(case, 4.0, case.step_size / 3)
    first, second = (layer_of(c, **none).solve(*c.context, x0=c.x0).error for c in (case, other))
    assert error(second, first) <= 1e-12


@pytest.mark.slow
@forall(10)
def test_backward_modes_agree(case):
    expected = gradients(layer_of(case), case)
    modes = [ImplicitAdjoint(Picard()), ImplicitAdjoint(Anderson(4)), UnrolledAdjoint()]
    modes += [ImplicitAdjoint(ConjugateGradient())] if isinstance(case, EnergyCase) else []
    for mode in modes:
        assert error(gradients(layer_of(case, adjoint=mode), case), expected) <= 3e-9, mode
    assert error(gradients(layer_of(case, solver=Anderson(4)), case), expected) <= 1e-10


@pytest.mark.slow
@forall(20)
def test_splitting_a_tensor_into_a_pytree_changes_nothing(case):
    core = dataclasses.replace(case, x0=case.flat, **{_field(case): case.core})
    assert error(answer(layer_of(core), core), answer(layer_of(case), case)) <= 1e-14
    assert error(gradients(layer_of(core), core), gradients(layer_of(case), case)) <= 1e-13


def _field(case):
    return "energy" if isinstance(case, EnergyCase) else "network"


@pytest.mark.slow
@forall(20)
def test_float32_is_within_sqrt_eps_of_float64(case):
    single = lambda t: t.float() if isinstance(t, torch.Tensor) else t  # noqa: E731
    fields = {k: torch.utils._pytree.tree_map(single, getattr(case, k)) for k in ("x0", "context")}
    module = copy.deepcopy(getattr(case, _field(case))).float()
    other = dataclasses.replace(case, **fields, **{_field(case): module})
    if isinstance(case, EnergyCase):
        other = dataclasses.replace(other, step_size=single(case.step_size))
    rounded = layer_of(other, termination=Termination(atol=1e-6, rtol=1e-6))
    limit = torch.finfo(torch.float32).eps ** 0.5
    x = answer(rounded, other)
    assert x.dtype == torch.float32 and error(x.double(), answer(layer_of(case), case)) <= limit
    found = [g.double() for g in gradients(rounded, other)]
    assert error(found, gradients(layer_of(case), case)) <= 3 * limit


@forall(20)
def test_a_loose_answer_and_its_steps_depend_on_no_batch_mate_either(case):
    """A finished sample is frozen: it stops where it would alone, however long the others take."""
    loose = Termination(atol=1e-3, rtol=1e-3)

    def solved(case):
        solution = layer_of(case, termination=loose).solve(*case.context, x0=case.x0)
        return Layout.of(solution.value, 1).ravel(solution.value).detach(), solution.num_steps

    (x, count), rows = solved(case), torch.arange(case.context[0].shape[0])
    for k in rows:
        alone, alone_count = solved(with_rows(case, rows[k : k + 1]))
        assert error(alone, x[k : k + 1]) <= 1e-12 and torch.equal(alone_count, count[k : k + 1])


# ------------------------------------------------------------------------------------------------- strategies and checks


@pytest.mark.slow
@forall(6)
def test_drawn_cases_pass_every_check_and_have_the_constants_they_state(case):
    if isinstance(case, EnergyCase):
        low, high = check_energy(case.energy, case.x0, *case.context).curvature
        assert case.mu * (1 - 1e-9) <= low <= high <= case.L * (1 + 1e-9)
        check_layer(FPI_GD(case.energy, case.step_size), *case.context, x0=case.x0)
    else:
        assert check_step(case.network, case.x0, *case.context).norm <= case.rate * (1 + 1e-9)
        check_layer(FPI_NN(case.network), *case.context, x0=case.x0)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(x=points(3))
def test_points_are_small_pytrees_of_the_batch(x):
    leaves = torch.utils._pytree.tree_leaves(x)
    assert all(t.shape[0] == 3 and t.dtype == torch.float64 for t in leaves) and 1 <= sum(t[0].numel() for t in leaves) <= 5


# ------------------------------------------------------------------------------------------------- options

Q = Quadratic(4, 2, 1.0, 8.0, torch.Generator().manual_seed(0)).requires_grad_(False)
X0 = torch.zeros(3, 4, dtype=torch.float64)
CONTEXT = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(3, 2)


def steps(step=None, **options):
    settings = {"termination": Termination(atol=0.0, rtol=1e-6), "on_failure": "ignore", **options}
    return fixed_point(step or GradientStep(Q, 0.2), X0, CONTEXT, **settings).num_steps.tolist()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"termination": Termination(atol=0.0, rtol=1e-3)}, {"termination": Termination(atol=0.0, rtol=1e-9)}),
        ({"termination": Termination(atol=1e-2, rtol=0.0)}, {"termination": Termination(atol=1e-8, rtol=0.0)}),
        ({"termination": Termination(rtol=0.0, max_steps=3)}, {"termination": Termination(rtol=0.0, max_steps=9)}),
        (
            {"termination": Termination(atol=1e-6, rtol=0.0)},
            {"termination": Termination(atol=1e-6, rtol=0.0, norm=lambda x: 100 * max_norm(x))},
        ),
        ({"solver": Picard()}, {"solver": Anderson()}),
        ({"solver": Anderson(memory=1)}, {"solver": Anderson(memory=4)}),
        ({"solver": Anderson(1, mixing=1.0)}, {"solver": Anderson(1, mixing=0.3)}),
        ({"solver": Anderson()}, {"solver": Anderson(regularization=1e-1)}),
        ({"step": GradientStep(Q, 0.2)}, {"step": GradientStep(Q, 0.1)}),
        ({"step": GradientStep(Q, 0.2)}, {"step": DampedStep(GradientStep(Q, 0.2), 0.5)}),
        ({"step": MapStep(lambda x, z: 0.9 * x + 1)}, {"step": DampedStep(MapStep(lambda x, z: 0.9 * x + 1), 0.5)}),
    ],
    ids=[
        "rtol",
        "atol",
        "max_steps",
        "norm",
        "solver",
        "memory",
        "mixing",
        "regularization",
        "step_size",
        "damping",
        "damped map",
    ],
)
def test_every_option_of_the_forward_solve_changes_the_steps(first, second):
    assert steps(**first) != steps(**second)


def adjoint_record(adjoint_options, **options):
    report = AdjointReport()
    z = CONTEXT.clone().requires_grad_()
    adjoint = ImplicitAdjoint(report=report, **adjoint_options)
    x = minimize(Q, X0, z, step_size=0.2, termination=TIGHT, adjoint=adjoint, **options).value
    torch.autograd.grad(x.sum(), z)
    return report.records[0]


def test_every_option_of_the_adjoint_shows():
    plain = adjoint_record({})
    assert plain.num_steps.max() <= 4 + 1, "conjugate gradients need n steps"
    assert (adjoint_record({"solver": Picard()}).num_steps > 50).all()
    assert (adjoint_record({"solver": Anderson()}).num_steps < 50).all()
    loose = adjoint_record({"solver": Picard(), "termination": Termination(rtol=1e-2)})
    assert (loose.num_steps < 40).all() and (loose.residual > 1e-4).all() and (loose.residual < 1e-2).all()
    short = {"solver": Picard(), "termination": Termination(max_steps=3)}
    assert (adjoint_record(short, on_failure="ignore").status == Status.MAX_STEPS).all()
    z = CONTEXT.clone().requires_grad_()
    exact, one = (
        torch.autograd.grad(minimize(Q, X0, z, step_size=0.2, termination=TIGHT, adjoint=a).value.sum(), z)[0]
        for a in (ImplicitAdjoint(), OneStepAdjoint())
    )
    expected = 0.2 * torch.ones_like(X0) @ Q.W
    assert error(one, expected) <= 1e-12 and error(one, exact) > 0.05


def test_on_failure_raises_warns_or_is_silent():
    short = {"termination": Termination(max_steps=2), "step_size": 0.2}
    with pytest.raises(ConvergenceError, match="MAX_STEPS: 3 of 3 samples"):
        minimize(Q, X0, CONTEXT, **short)
    with pytest.warns(ConvergenceWarning, match="MAX_STEPS: 3 of 3 samples"):
        minimize(Q, X0, CONTEXT, on_failure="warn", **short)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = minimize(Q, X0, CONTEXT, on_failure="ignore", **short)
    assert (solution.status == Status.MAX_STEPS).all()


def test_start_and_batch_dims_show():
    layer = FPI_GD(Q, 0.2, start=X0, termination=TIGHT)
    warm = FPI_GD(Q, 0.2, start=lambda z: layer(z), termination=TIGHT)
    assert (warm.solve(CONTEXT).num_steps <= 1).all() and (layer.solve(CONTEXT).num_steps > 50).all()
    cell = nn.Linear(4, 4).double().requires_grad_(False)
    nn.init.orthogonal_(cell.weight, gain=0.5)
    assert fixed_point(cell, X0, batch_dims=0).status.shape == () and fixed_point(cell, X0).status.shape == (3,)

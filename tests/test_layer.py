"""Layers are ordinary modules; solvers move as their theory says; values validate themselves."""

import copy
import io
import pickle

import pytest
import torch
from problems import TIGHT, Contraction, LogCosh, some_context
from scipy.optimize import minimize as scipy_minimize
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    FPI_NN,
    Anderson,
    ConjugateGradient,
    DampedStep,
    GradientStep,
    ImplicitAdjoint,
    MapStep,
    Picard,
    Solution,
    Termination,
    fixed_point,
    gradient,
    minimize,
)
from energynet.termination import max_norm


class Zeros(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.new_zeros(z.shape[0], 4)


def layers() -> list[nn.Module]:
    return [
        FPI_GD(LogCosh(), 0.2, termination=TIGHT, adjoint=ImplicitAdjoint(Anderson(2))),
        FPI_NN(Contraction(), start=Zeros(), solver=Anderson(4), termination=TIGHT),
        FPI_GD(LogCosh(), torch.tensor([0.2, 0.1], dtype=torch.float64), start=torch.zeros(2, 4, dtype=torch.float64)),
        FPI_GD(LogCosh(), nn.Parameter(torch.tensor(0.2, dtype=torch.float64))),
    ]


@pytest.mark.parametrize("k", range(4))
def test_copies_pickles_and_state(k: int) -> None:
    layer, z = layers()[k], some_context()
    expected = layer(z)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)  # our own bytes
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(z), expected)
        assert repr(twin) == repr(layer)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in layer.parameters()}
    fresh = layers()[k]
    for p in fresh.parameters():
        p.data.mul_(2)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(z), expected)
    keys = set(vars(layer))
    layer(z).sum().backward()
    assert set(vars(layer)) == keys  # no result of a call is kept


def test_to_moves_step_sizes_and_starts() -> None:
    layer = layers()[2].float()
    assert layer.step_size.dtype == torch.float32
    assert layer(some_context().float()).dtype == torch.float32
    held = FPI_GD(lambda x: (x["a"] - 1).square().sum(-1), 0.4, start={"a": torch.zeros(2, 3)}).double()
    assert held()["a"].dtype == torch.float64


def test_repr_prints_what_was_typed() -> None:
    assert repr(FPI_GD(torch.sum, 0.5)) == "FPI_GD(sum, step_size=0.5, solver=Picard())"
    layer = FPI_NN(torch.cos, start=torch.zeros_like, solver=Anderson(memory=3), on_failure="warn", batch_dims=0)
    assert repr(layer) == (
        "FPI_NN(cos, batch_dims=0, start=zeros_like, solver=Anderson(memory=3, mixing=1.0, regularization=None), "
        "on_failure='warn')"
    )
    assert "LogCosh()" in repr(FPI_GD(LogCosh(), 0.5)) and "start=Tensor(2, 3)" in repr(
        FPI_GD(torch.sum, 1.0, start=torch.zeros(2, 3))
    )


def test_modules_inside_steps_and_methods_belong_to_the_layer() -> None:
    network, energy = Contraction(), LogCosh()
    damped = FPI_NN(DampedStep(MapStep(network), 0.5), start=Zeros(), termination=TIGHT)
    method = FPI_GD(energy.forward, 0.2, start=energy.start, termination=TIGHT)
    for layer, module in ((damped, network), (method, energy)):
        assert {id(p) for p in layer.parameters()} == {id(p) for p in module.parameters()}
        twin = copy.deepcopy(layer)
        for p in twin.parameters():
            p.data.mul_(0.5)
        assert not torch.equal(twin(some_context()), layer(some_context()))
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(some_context()), layer(some_context()))
    damped.termination = None
    assert damped.float()(some_context().float()).dtype == torch.float32
    assert not list(FPI_GD(torch.sum, 1.0).parameters())


def test_layers_in_a_model_and_a_learned_start() -> None:
    predictor = nn.Linear(3, 4, dtype=torch.float64)
    model = nn.Sequential(FPI_GD(LogCosh(), 0.2, start=predictor, termination=TIGHT), nn.Linear(4, 1, dtype=torch.float64))
    assert {name.split(".")[1] for name, _ in model[0].named_parameters(prefix="0")} == {"energy", "start"}
    model(some_context()).sum().backward()
    assert predictor.weight.grad is None  # the answer does not depend on where the solve began
    torch.testing.assert_close(model[0](some_context()), FPI_GD(model[0].energy, 0.2, termination=TIGHT)(some_context()))


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_anderson_beats_picard_and_needs_n_plus_one_steps_on_a_linear_map(memory: int) -> None:
    generator = torch.Generator().manual_seed(4)
    M = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    M = 0.95 * M / torch.linalg.matrix_norm(M, 2)
    b = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    step = lambda x, b: x @ M + b  # noqa: E731
    limit = Termination(atol=0.0, rtol=1e-10)
    plain = fixed_point(step, torch.zeros_like(b), b, termination=limit)
    fast = fixed_point(step, torch.zeros_like(b), b, solver=Anderson(memory), termination=limit)
    exact = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - M.T, b.T).T
    torch.testing.assert_close(fast.value, exact, rtol=1e-8, atol=0)
    if memory == 5:
        assert int(fast.num_steps.amax()) <= 8
    assert int(fast.num_steps.amax()) <= int(plain.num_steps.amax())


def test_anderson_survives_singular_histories() -> None:
    for x0 in (torch.zeros(2, 3), torch.ones(2, 3)):
        constant = fixed_point(lambda x: torch.ones_like(x), x0, solver=Anderson(5))  # every difference is parallel or zero
        assert torch.equal(constant.value, torch.ones(2, 3)) and bool(constant.converged.all())
    parallel = Anderson(memory=3, regularization=0.0)  # two columns of one direction: no Cholesky factor
    line = fixed_point(lambda x: 0.5 * x + 0.1 * x.square() + 0.1, torch.zeros(2, 1), solver=parallel)
    torch.testing.assert_close(line.value, torch.full((2, 1), 2.5 - 5.25**0.5), rtol=1e-3, atol=0)
    one = fixed_point(lambda x: 0.5 * x + 1, torch.zeros(1, 1, dtype=torch.float64), solver=Anderson(5), termination=TIGHT)
    torch.testing.assert_close(one.value, torch.full((1, 1), 2.0, dtype=torch.float64))


def test_conjugate_gradients_end_after_as_many_steps_as_there_are_eigenvalues() -> None:
    from energynet import AdjointReport

    seen = AdjointReport()
    curvature = torch.tensor([1.0, 1.0, 4.0, 9.0], dtype=torch.float64)
    z = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    adjoint = ImplicitAdjoint(ConjugateGradient(), report=seen)
    energy = lambda x, z, c: (0.5 * c * x.square() - x * z).sum(-1)  # noqa: E731
    minimize(energy, torch.zeros_like(z), z, curvature, step_size=0.2, termination=TIGHT, adjoint=adjoint).value.sum().backward()
    torch.testing.assert_close(z.grad, 1 / curvature[None])
    assert int(seen.records[0].num_steps) == 3


def test_minimum_agrees_with_scipy() -> None:
    energy, z = LogCosh(), some_context(1)

    def value_and_slope(x):  # type: ignore[no-untyped-def]
        x = torch.as_tensor(x, dtype=torch.float64)[None]
        return float(energy(x, z).detach()), gradient(energy, x, z)[0].detach().numpy()

    found = scipy_minimize(
        value_and_slope, torch.zeros(4, dtype=torch.float64).numpy(), jac=True, method="BFGS", options={"gtol": 1e-10}
    )
    ours = minimize(energy, None, z, step_size=energy.step_size, termination=TIGHT).value
    torch.testing.assert_close(ours[0].detach(), torch.as_tensor(found.x), rtol=1e-8, atol=1e-10)


def test_steps_have_the_form_x_minus_gamma_f() -> None:
    x, z, energy = torch.randn(2, 4, dtype=torch.float64), some_context(), LogCosh()
    per_sample = torch.tensor([0.1, 0.2], dtype=torch.float64)
    steps = [GradientStep(energy, 0.2), GradientStep(energy, per_sample), MapStep(Contraction())]
    for step in (*steps, DampedStep(steps[0], 0.5), DampedStep(steps[1], 0.5), DampedStep(steps[2], 0.3)):
        size = step.step_size
        size = size[:, None] if isinstance(size, Tensor) else size
        torch.testing.assert_close(step(x, z), x - size * step.optimality(x, z))
    calm = fixed_point(DampedStep(MapStep(lambda x: 1 - x), 0.5), torch.zeros(1, 1))
    assert calm.value.item() == 0.5
    with pytest.raises(ValueError, match="damping"):
        DampedStep(MapStep(torch.cos), 0.0)


def test_every_option_of_termination_is_obeyed() -> None:
    def run(termination: Termination) -> Solution:
        x0 = torch.zeros(1, 4, dtype=torch.float64)
        energy = lambda x: (x - 3).square().sum(-1)  # noqa: E731
        return minimize(energy, x0, step_size=0.1, solver=Picard(), termination=termination, on_failure="ignore")

    assert run(Termination(max_steps=5)).num_steps.item() == 5
    assert run(Termination(atol=1e-2, rtol=0.0)).error.item() <= 1e-2
    assert run(Termination(atol=0.0, rtol=1e-8)).num_steps > run(Termination(atol=0.0, rtol=1e-2)).num_steps
    assert run(Termination(norm=max_norm, max_steps=3)).error < run(Termination(max_steps=3)).error
    for wrong in ({"atol": -1.0}, {"rtol": float("nan")}, {"max_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Termination(**wrong)


def test_budget_beyond_convergence_changes_nothing() -> None:
    energy, z = LogCosh(), some_context()
    few, many = (minimize(energy, None, z, step_size=0.2, termination=Termination(max_steps=m)) for m in (500, 5000))
    assert torch.equal(few.value, many.value) and torch.equal(few.num_steps, many.num_steps)
    assert isinstance(Picard(), Picard) and Picard() == Picard()

"""Derivatives of every order against closed forms and dense references, relative error at most 1e-8 (float64)."""

from collections.abc import Callable

import pytest
import torch
from problems import TIGHT, Contraction, EncodedLogCosh, LogCosh, LogEnergy, newton_fixed_point, newton_minimum, some_context
from torch import Tensor
from torch.autograd import grad
from torch.func import functional_call

from energynet import FPI_GD, FPI_NN, Adjoint, Anderson, ConjugateGradient, ImplicitAdjoint, Picard, UnrolledAdjoint, fixed_point

EXACT = [
    ImplicitAdjoint(),
    ImplicitAdjoint(ConjugateGradient()),
    ImplicitAdjoint(Picard()),
    ImplicitAdjoint(Anderson(memory=3)),
    UnrolledAdjoint(),
]
FOR_MAPS = [a for a in EXACT if not isinstance(getattr(a, "solver", None), ConjugateGradient)]


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    error = (got.detach() - expected.detach()).norm() / expected.detach().norm()
    assert error <= tolerance, f"relative error {float(error):.2e}"


def reached(adjoint: Adjoint) -> float:
    """Derivatives of the iterate itself converge later than the iterate: k³ρᵏ at third order."""
    return 1e-6 if isinstance(adjoint, UnrolledAdjoint) else 1e-8


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor, order: int) -> list[Tensor]:
    """Successive derivatives of an elementwise function."""
    x = x.detach().requires_grad_()
    values = [f(x)]
    for _ in range(order):
        values.append(grad(values[-1].sum(), x, create_graph=True)[0])
    return values


@pytest.mark.parametrize("adjoint", EXACT, ids=str)
def test_closed_form_of_a_minimum_to_third_order_in_the_context(adjoint: Adjoint) -> None:
    z = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    layer = FPI_GD(LogEnergy(0.7), 0.4, termination=TIGHT, adjoint=adjoint)
    got = derivatives(layer, z, 3)
    for value, expected in zip(got, [(z / 0.7).log(), 1 / z, -1 / z**2, 2 / z**3], strict=True):
        close(value, expected, reached(adjoint))


@pytest.mark.parametrize("adjoint", EXACT, ids=str)
def test_closed_form_of_a_minimum_to_third_order_in_a_parameter(adjoint: Adjoint) -> None:
    layer = FPI_GD(LogEnergy(0.7), 0.4, termination=TIGHT, adjoint=adjoint)
    z, theta = torch.ones(1, 1, dtype=torch.float64), layer.energy.theta
    value = layer(z).sum()  # −log θ
    for expected in [-1 / 0.7, 1 / 0.7**2, -2 / 0.7**3]:
        (value,) = grad(value, theta, create_graph=True)
        close(value, torch.tensor(expected, dtype=torch.float64), reached(adjoint))


@pytest.mark.parametrize("adjoint", FOR_MAPS, ids=str)
def test_closed_form_of_a_fixed_point_to_third_order(adjoint: Adjoint) -> None:
    a = torch.tensor(0.6, dtype=torch.float64)
    z = torch.ones(1, 1, dtype=torch.float64)

    def solve(a: Tensor) -> Tensor:  # z / (1 − a)
        return fixed_point(lambda x, a: a * x + z, torch.zeros_like(z), a, termination=TIGHT, adjoint=adjoint).value

    got = derivatives(solve, a, 3)
    for value, power, factor in zip(got, [1, 2, 3, 4], [1, 1, 2, 6], strict=True):
        close(value.reshape(()), factor / (1 - a) ** power, reached(adjoint))


def third_order(f: Callable[..., Tensor], *arguments: Tensor) -> list[Tensor]:
    """First to third derivatives of a scalar along fixed directions, in every argument."""
    value = f(*arguments)
    collected = []
    for order in range(3):
        gradients = grad(value, arguments, create_graph=True)
        collected += gradients
        generator = torch.Generator().manual_seed(order)
        weights = [torch.randn(g.shape, dtype=g.dtype, generator=generator) for g in gradients]
        value = sum((w * g).sum() for w, g in zip(weights, gradients, strict=True))
    return collected


def scalar(x: Tensor) -> Tensor:
    return (x**3 + x.sin()).sum()


@pytest.mark.parametrize("adjoint", [EXACT[0], EXACT[2], EXACT[3]], ids=str)
@pytest.mark.parametrize("energy", [LogCosh(), EncodedLogCosh()], ids=["plain", "encoded"])
def test_minimum_against_a_dense_reference_to_third_order(adjoint: Adjoint, energy: LogCosh) -> None:
    z = some_context(requires_grad=True)
    layer = FPI_GD(energy, energy.step_size, termination=TIGHT, adjoint=adjoint)
    names, parameters = zip(*energy.named_parameters(), strict=True)

    def ours(z: Tensor, *parameters: Tensor) -> Tensor:
        named = {f"energy.{name}": p for name, p in zip(names, parameters, strict=True)}
        return scalar(functional_call(layer, named, (z,)))

    def reference(z: Tensor, *parameters: Tensor) -> Tensor:
        bound = lambda x, z: functional_call(energy, dict(zip(names, parameters, strict=True)), (x, z))  # noqa: E731
        return sum(scalar(newton_minimum(bound, torch.zeros(4, dtype=torch.float64), row)) for row in z)

    for got, expected in zip(third_order(ours, z, *parameters), third_order(reference, z, *parameters), strict=True):
        close(got, expected)


@pytest.mark.parametrize("adjoint", [EXACT[0], EXACT[3]], ids=str)
def test_fixed_point_of_a_network_against_a_dense_reference_to_third_order(adjoint: Adjoint) -> None:
    network, z = Contraction(), some_context(requires_grad=True)
    layer = FPI_NN(network, start=lambda z: z.new_zeros(z.shape[0], 4), termination=TIGHT, adjoint=adjoint)
    names, parameters = zip(*network.named_parameters(), strict=True)

    def ours(z: Tensor, *parameters: Tensor) -> Tensor:
        named = {f"network.{name}": p for name, p in zip(names, parameters, strict=True)}
        return scalar(functional_call(layer, named, (z,)))

    def reference(z: Tensor, *parameters: Tensor) -> Tensor:
        bound = lambda x, z: functional_call(network, dict(zip(names, parameters, strict=True)), (x, z))  # noqa: E731
        return sum(scalar(newton_fixed_point(bound, torch.zeros(4, dtype=torch.float64), row)) for row in z)

    for got, expected in zip(third_order(ours, z, *parameters), third_order(reference, z, *parameters), strict=True):
        close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [a for a in EXACT if a != EXACT[1]], ids=str)  # which is the default for an energy
def test_gradcheck_and_gradgradcheck_of_a_minimum(adjoint: Adjoint) -> None:
    energy = LogCosh(n=2, m=3)
    layer = FPI_GD(energy, energy.step_size, termination=TIGHT, adjoint=adjoint)
    inputs = (some_context(1, requires_grad=True), energy.A, energy.W)

    def solve(z: Tensor, A: Tensor, W: Tensor) -> Tensor:
        return functional_call(layer, {"energy.A": A, "energy.W": W}, (z,))

    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(solve, inputs, check_fwd_over_rev=True)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", FOR_MAPS, ids=str)
def test_gradcheck_and_gradgradcheck_of_a_network(adjoint: Adjoint) -> None:
    network = Contraction(n=2, rate=0.4)
    layer = FPI_NN(network, start=lambda z: z.new_zeros(z.shape[0], 2), termination=TIGHT, adjoint=adjoint)
    inputs = (some_context(1, requires_grad=True), network.R, network.b)

    def solve(z: Tensor, R: Tensor, b: Tensor) -> Tensor:
        return functional_call(layer, {"network.R": R, "network.b": b}, (z,))

    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(solve, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("adjoint", EXACT[:4], ids=str)
def test_loss_plus_gradient_penalty_in_one_backward(adjoint: Adjoint) -> None:
    energy = LogCosh()
    layer = FPI_GD(energy, energy.step_size, termination=TIGHT, adjoint=adjoint)
    parameters = [energy.A, energy.W]

    def total(solve: Callable[[Tensor], Tensor]) -> Tensor:
        z = some_context(requires_grad=True)
        loss = scalar(solve(z))
        (gradient,) = grad(loss, z, create_graph=True)
        return loss + gradient.square().sum()

    total(layer).backward()
    got = [p.grad for p in parameters]
    start = torch.zeros(4, dtype=torch.float64)
    expected = grad(total(lambda z: torch.stack([newton_minimum(energy, start, row) for row in z])), parameters)
    for g, e in zip(got, expected, strict=True):
        close(g, e)


def test_encode_changes_no_derivative() -> None:
    z = some_context(requires_grad=True)
    results = []
    for energy in (LogCosh(), EncodedLogCosh()):
        layer = FPI_GD(energy, energy.step_size, termination=TIGHT)
        results.append(third_order(lambda z, A, W, layer=layer: scalar(layer(z)), z, energy.A, energy.W))
    for plain, encoded in zip(*results, strict=True):
        close(encoded, plain, 1e-9)


def test_unrolled_differentiates_the_start_and_the_step_size() -> None:
    from energynet import Termination, minimize

    x0 = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    three = Termination(atol=0.0, rtol=0.0, max_steps=3)
    x = minimize(lambda x: 0.5 * x.square().sum(-1), x0, step_size=gamma, solver=Picard(), termination=three,
                 adjoint=UnrolledAdjoint(), on_failure="ignore").value  # fmt: skip
    dx0, dgamma = grad(x.sum(), (x0, gamma))
    close(dx0, torch.full((1, 1), 0.9**3, dtype=torch.float64))
    close(dgamma, torch.tensor(-3 * 0.9**2, dtype=torch.float64))

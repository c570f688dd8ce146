"""Priors of pictures: their potentials, their bounds for all weights, exact derivatives of their minimizers to third order."""

import math
from collections.abc import Callable

import pytest
import torch
from problems import TIGHT
from torch import Tensor, nn
from torch.nn.functional import conv2d

from energynet import FPI_NN, LBFGS, Nesterov, fixed_point, minimize
from energynet.diagnostics import curvature
from energynet.energies import (
    AdaptivePrior,
    Composed,
    CosineStart,
    Huber,
    ImageContraction,
    Potential,
    Prior,
    ResidualPrior,
    Restoration,
    RidgePrior,
    Spline,
    filter_bank,
    largest_response,
)
from energynet.testing import check_energy

DOUBLE = torch.float64
POTENTIALS: dict[str, Callable[[], Potential]] = {
    "huber": lambda: Huber(8), "weakly convex": lambda: Huber(8, concavity=0.9), "groups": lambda: Huber(8, group=4),
    "weakly convex groups": lambda: Huber(8, group=2, concavity=0.9), "spline": lambda: Spline(knots=6, reach=4.0),
    "weakly convex spline": lambda: Spline(knots=6, reach=4.0, concavity=0.9),
}  # fmt: skip
PRIORS: dict[str, Callable[[], Prior]] = {
    **{name: (lambda make=make: RidgePrior(CosineStart(3), make(), strength=7.0)) for name, make in POTENTIALS.items()},
    "composed": lambda: RidgePrior(Composed((1, 2, 8), size=3), Huber(8), strength=7.0),
    "adaptive": lambda: AdaptivePrior(CosineStart(3), width=4, depth=1, strength=7.0),
}


def shaken(module: nn.Module, seed: int = 0, size: float = 1.0) -> nn.Module:
    """In float64, with weights at random."""
    torch.manual_seed(seed)
    module.to(DOUBLE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def hessian(prior: Prior, x: Tensor, sigma: Tensor) -> Tensor:  # (1, 1, H, W), (1,) -> (n, n)
    code = prior.encode(x, sigma)
    flat = torch.func.hessian(lambda v: prior.evaluate(v.reshape(x.shape), *code)[0])(x.flatten())
    return flat.detach()


@pytest.mark.parametrize("name", PRIORS)
def test_curvatures_lie_within_their_bounds(name: str) -> None:
    for seed in range(3):
        prior = shaken(PRIORS[name](), seed)
        if isinstance(prior, RidgePrior):
            prior.raw_strength.data[0] = (-4.0, 1.0, 30.0)[seed]
        sigma = torch.tensor([(0.02, 0.1, 0.4)[seed]], dtype=DOUBLE)
        x = (0.1, 1.0, 3.0)[seed] * sigma * torch.randn(1, 1, 7, 6, dtype=DOUBLE)
        H = hessian(prior, x, sigma)
        eigenvalues = torch.linalg.eigvalsh(H)
        torch.testing.assert_close(H, H.T, rtol=0, atol=1e-10)
        assert eigenvalues[0] >= -prior.concavity - 1e-9
        assert eigenvalues[-1] <= prior.strength + 1e-9


def test_the_bound_is_reached_by_cosines_and_agrees_with_lanczos() -> None:
    prior = RidgePrior(CosineStart(3), Huber(8), strength=7.0).to(DOUBLE)
    prior.raw_strength.data[0] = 30.0
    energy, flat, sigma = Restoration(prior), torch.zeros(1, 1, 16, 16, dtype=DOUBLE), torch.tensor([0.1], dtype=DOUBLE)
    seen = curvature(energy, flat, flat, sigma)
    assert 0.9 * 8 < float(seen.largest) <= 8 + 1e-9
    assert energy.step_size == pytest.approx(2 / (1 + 1 + 7))


@pytest.mark.parametrize("name", POTENTIALS)
def test_potentials_are_even_and_as_curved_as_they_say(name: str) -> None:
    potential = shaken(POTENTIALS[name]())
    strength = torch.tensor([0.3, 5.0], dtype=DOUBLE)
    code = potential.encode(strength)
    u = (3 * torch.randn(2, 8, 1, dtype=DOUBLE)).requires_grad_()
    value = potential(u, *code)
    torch.testing.assert_close(potential(-u, *code), value)
    torch.testing.assert_close(potential(0 * u, *code), torch.zeros_like(value))
    for sample, most in enumerate((strength.clamp(min=potential.concavity)).tolist()):
        H = torch.func.hessian(lambda v: potential(v.reshape(1, 8, 1).expand(2, 8, 1), *code)[sample].sum())(u[sample, :, 0])  # noqa: B023
        eigenvalues = torch.linalg.eigvalsh(H.detach())
        assert eigenvalues[0] >= -potential.concavity / most - 1e-9
        assert eigenvalues[-1] <= 1 + 1e-9


def test_a_weakly_convex_potential_is_somewhere_concave() -> None:
    potential = Huber(1, concavity=0.9).to(DOUBLE)
    potential.raw_mixing.data.fill_(30.0)  # type: ignore[union-attr]
    code = potential.encode(torch.tensor([2.0], dtype=DOUBLE))
    t = torch.linspace(0, 3, 50, dtype=DOUBLE)
    bent = torch.func.vmap(torch.func.grad(torch.func.grad(lambda t: potential(t.reshape(1, 1, 1), *code)[0, 0])))(t)
    assert bent.min() < -0.02
    assert bent[0].item() == pytest.approx(1 - 0.45, abs=1e-6)


def test_spline_is_what_its_second_derivative_says() -> None:
    potential = shaken(Spline(knots=3, reach=1.5))
    (table,) = potential.encode(torch.ones(1, dtype=DOUBLE))
    assert table.shape == (1, 4, 8)
    knots = torch.cat([torch.sigmoid(potential.raw.detach()), torch.zeros(1, dtype=DOUBLE)])  # type: ignore[operator]
    t = torch.linspace(-2.0, 2.0, 81, dtype=DOUBLE) + 1e-3

    def value(t: Tensor) -> Tensor:
        return potential(t.reshape(1, 1, 1), table)[0, 0] / potential.spacing**2 * 0.25

    second = torch.func.vmap(torch.func.grad(torch.func.grad(value)))(t).detach()
    place = (t.abs() / 0.5).clamp(max=3 - 1e-12)
    low = place.floor().long()
    expected = torch.where(t.abs() >= 1.5, 0, knots[low] * (1 - place + low) + knots[low + 1] * (place - low))
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-9)
    first = torch.func.vmap(torch.func.grad(value))(torch.tensor([0.0, 1.5, 5.0], dtype=DOUBLE)).detach()
    area = 0.5 * (knots[0] / 2 + knots[1] + knots[2])
    torch.testing.assert_close(first, torch.stack([0 * area, area, area]))


def test_composed_filters_are_the_convolutions_one_after_another() -> None:
    bank = shaken(Composed((1, 3, 5), size=3))
    assert bank.size == 5
    x = torch.randn(1, 1, 9, 9, dtype=DOUBLE)
    first, second = (weight.detach() for weight in bank.weights)
    one_by_one = conv2d(conv2d(x, first - first.mean((2, 3), keepdim=True)), second)
    ratio = filter_bank(x, bank().detach()) / one_by_one
    torch.testing.assert_close(ratio, ratio[0, 0, 0, 0].expand_as(ratio))
    assert 0.5 < largest_response(bank()).item() <= 1 + 1e-9
    assert Composed()().shape == (60, 1, 13, 13)


@pytest.mark.parametrize("name", ["weakly convex groups", "spline", "adaptive"])
def test_what_is_scaled_with_its_noise_is_scaled_in_its_answer(name: str) -> None:
    """Where scale and strength do not depend on σ: R(c x; c y, c σ) = c² R(x; y, σ)."""
    prior = PRIORS[name]().to(DOUBLE)
    if isinstance(prior, AdaptivePrior):
        for layer in (prior.network.first,):
            layer.weight.data.zero_()
    else:
        prior.raw_strength.data[1], prior.log_scale.data[1] = 0.0, 0.0  # their change with log σ
    x, y = 0.2 * torch.randn(2, 2, 1, 7, 7, dtype=DOUBLE)
    sigma = torch.tensor([0.1, 0.2], dtype=DOUBLE)
    torch.testing.assert_close(prior(3 * x, 3 * y, 3 * sigma), 9 * prior(x, y, sigma))


def test_samples_do_not_mix_and_check_energy_agrees() -> None:
    for make in (PRIORS["weakly convex groups"], PRIORS["adaptive"], lambda: ResidualPrior(width=3, depth=1)):
        prior = shaken(make(), size=0.3)
        sigma = torch.tensor([0.1, 0.3, 0.5], dtype=DOUBLE)
        check_energy(prior, torch.randn(3, 1, 6, 7, dtype=DOUBLE), torch.randn(3, 1, 6, 7, dtype=DOUBLE), sigma)


@pytest.mark.parametrize("name", ["weakly convex groups", "adaptive"])
def test_third_derivatives_of_the_minimizer_are_exact(name: str) -> None:
    """Along a line through y, by differences of the exact second derivative."""
    prior = shaken(PRIORS[name](), size=0.3)
    energy, sigma = Restoration(prior), torch.tensor([0.5], dtype=DOUBLE)
    y, along, weight = torch.randn(3, 1, 1, 3, 3, dtype=DOUBLE)

    def along_line(t: Tensor) -> Tensor:
        return (weight * minimize(energy, y, y + t * along, sigma, termination=TIGHT).value).sum()

    first = torch.func.grad(along_line)
    second = torch.func.grad(first)
    third = torch.func.grad(second)
    t, step = torch.tensor(0.1, dtype=DOUBLE), 1e-4
    for derivative, function in ((first, along_line), (second, first), (third, second)):
        difference = (function(t + step) - function(t - step)) / (2 * step)
        torch.testing.assert_close(derivative(t), difference, rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_weight() -> None:
    for make in (*PRIORS.values(), lambda: ResidualPrior(width=3, depth=1)):
        prior = shaken(make(), size=0.2)
        y = torch.randn(2, 1, 7, 7, dtype=DOUBLE)
        x = minimize(Restoration(prior), None, y, torch.tensor([0.4, 0.8], dtype=DOUBLE), termination=TIGHT).value
        (x - 1).square().sum().backward()
        for parameter_name, parameter in prior.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("solver", [LBFGS(), Nesterov()])
def test_a_deep_prior_is_lowered_to_a_stationary_point(solver: LBFGS | Nesterov) -> None:
    prior = shaken(ResidualPrior(width=4, depth=1), size=0.1)
    energy, y = Restoration(prior), torch.randn(2, 1, 8, 8, dtype=DOUBLE)
    solution = minimize(energy, None, y, 0.5, solver=solver, termination=TIGHT)
    slope = torch.func.grad(lambda x: energy(x, y, 0.5).sum())(solution.value)
    assert slope.norm() < 1e-8 and bool((energy(solution.value, y, 0.5) < energy(y, y, 0.5)).all())


def test_the_map_contracts_for_all_weights() -> None:
    network = shaken(ImageContraction(3, width=4, depth=1, coupling=0.8), size=2.0)
    y, sigma = torch.randn(2, 1, 7, 7, dtype=DOUBLE), torch.tensor([0.1, 0.5], dtype=DOUBLE)
    code = network.encode(y, sigma)
    for sample in range(2):
        one = [part[sample : sample + 1] for part in code]
        J = torch.func.jacrev(lambda x: network(x.reshape(1, 1, 7, 7), *one).flatten())(y[sample].flatten())  # noqa: B023
        assert torch.linalg.matrix_norm(J, 2) <= 0.8 + 1e-9
    layer = FPI_NN(network, start=lambda *code: code[0], termination=TIGHT)
    answer = layer(*code)
    torch.testing.assert_close(answer, network(answer, *code), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fixed_point(network, 0 * y, *code, termination=TIGHT).value, answer, rtol=1e-8, atol=1e-8)


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in (lambda: Huber(8, concavity=1.0), lambda: Huber(8, group=3), lambda: Spline(concavity=-0.1),
                  lambda: RidgePrior(CosineStart(3), Huber(8), strength=0.0), lambda: ImageContraction(coupling=1.0),
                  lambda: AdaptivePrior(CosineStart(3), strength=math.inf)):  # fmt: skip
        with pytest.raises(ValueError, match=r"must (be|lie)"):
            wrong()

"""Losses of energies against cases computed by hand, and their gradients against finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from energynet import minimize
from energynet.losses import (
    CostAugmented,
    denoising_score_matching,
    hinge,
    logistic,
    perceptron,
    soft_f1,
    square_square,
    value_regression,
)

PAIRWISE = [perceptron, hinge, logistic, square_square, value_regression, soft_f1]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_same(found: Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, tensor(*expected), rtol=1e-15, atol=1e-15)


def test_perceptron_is_the_distance_above_the_minimum() -> None:
    assert_same(perceptron(tensor(2.0, -1.0, 0.5), tensor(-1.0, -1.0, 1.0)), 3.0, 0.0, -0.5)


def test_hinge_asks_for_the_margin() -> None:
    truth, wrong = tensor(0.0, 0.0, 3.0), tensor(1.0, 0.25, 1.0)
    assert_same(hinge(truth, wrong), 0.0, 0.75, 3.0)  # a margin that is met exactly has no loss
    assert_same(hinge(truth, wrong, tensor(2.0, 0.25, 0.0)), 1.0, 0.0, 2.0)
    assert_same(hinge(truth, wrong, torch.tensor(2.0, dtype=torch.float64)), 1.0, 1.75, 4.0)


def test_logistic_is_the_smooth_hinge() -> None:
    found = logistic(tensor(0.0, 1.0, 800.0), tensor(0.0, 0.0, 0.0))
    assert_same(found, math.log(2), math.log1p(math.e), 800.0)


def test_square_square_pulls_down_and_pushes_up() -> None:
    assert_same(square_square(tensor(0.5, 0.0), tensor(0.25, 2.0)), 0.25 + 0.5625, 0.0)
    assert_same(square_square(tensor(0.5), tensor(0.25), 3.0), 0.25 + 2.75**2)


def test_value_regression_is_lowest_where_the_value_is_the_quality() -> None:
    quality = tensor(0.25, 0.5, 1.0)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    energies = tensor(math.log(3), 0.0, -40.0).requires_grad_()  # σ(−log 3) = 1/4
    loss = value_regression(energies, quality)
    assert_same(loss.detach(), entropy, math.log(2), math.log1p(math.exp(-40.0)))
    (slope,) = torch.autograd.grad(loss.sum(), energies)
    torch.testing.assert_close(slope, tensor(0.0, 0.0, 0.0), rtol=0, atol=1e-15)


def test_soft_f1_of_sets_is_f1_and_of_parts_is_between() -> None:
    labels = tensor(1.0, 1.0, 0.0, 0.0).expand(4, 4)
    predicted = torch.stack([tensor(1, 1, 0, 0), tensor(1, 0, 1, 0), tensor(0.5, 0, 0.5, 0), tensor(0, 0, 0, 0)])
    assert_same(soft_f1(predicted, labels), 1.0, 0.5, 1 / 3, 0.0)
    assert_same(soft_f1(torch.zeros(1, 3).double(), torch.zeros(1, 3).double()), 1.0)
    nothing = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(soft_f1(nothing, torch.zeros(1, 3).double()).sum(), nothing)
    assert torch.equal(slope, torch.zeros(1, 3).double())


@pytest.mark.parametrize("loss", PAIRWISE, ids=lambda loss: loss.__name__)
def test_derivatives(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    shape = (5, 3) if loss is soft_f1 else (5,)
    first, second = (torch.rand(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(loss, (first, second))
    assert torch.autograd.gradgradcheck(loss, (first, second))


@pytest.mark.parametrize("loss", PAIRWISE, ids=lambda loss: loss.__name__)
def test_shapes_that_would_broadcast_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\(5,\), \(5, 1\)"):
        loss(torch.rand(5), torch.rand(5, 1))


def test_margin_that_would_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match="sample by sample"):
        hinge(torch.rand(5), torch.rand(5), torch.rand(5, 1))


def test_structured_hinge_bounds_the_cost_and_has_the_derivative_of_its_maximum() -> None:
    # E = a (x − z)², Δ = (x − y)²: the most violating x is (a z − y) / (a − 1); all by hand for a = 2, z = 1, y = 0.
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y, z = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)

    def energy(x: Tensor, z: Tensor, a: Tensor) -> Tensor:
        return a * (x - z).square().sum(-1)

    def cost(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().sum(-1)

    with torch.no_grad():
        worst = minimize(CostAugmented(energy, cost), y, y, z, a).value
    torch.testing.assert_close(worst, torch.full_like(y, 2.0), rtol=1e-6, atol=0)
    loss = hinge(energy(y, z, a), energy(worst, z, a), cost(worst, y))  # 2 + 4 − 2
    torch.testing.assert_close(loss.detach(), tensor(4.0, 4.0), rtol=1e-6, atol=0)
    best = minimize(energy, y, z, a).value
    assert bool((loss >= cost(best, y)).all())
    (slope,) = torch.autograd.grad(loss.sum(), a)  # of a z² − min (a (x − z)² − x²) = a + a/(a − 1): 1 − 1/(a − 1)², zero
    assert abs(float(slope)) < 1e-5


def test_score_matching_of_a_gaussian_is_least_at_the_noisy_density() -> None:
    """½‖σ∇E − ε‖² of E = x²/(2v), data N(0, s²): its mean is ½ n (σ²(s² + σ²)/v² − 2σ²/v + 1), least at v = s² + σ²."""
    torch.manual_seed(0)
    s, sigma, n = 2.0, 0.5, 200_000
    x, noise = s * torch.randn(n, 1, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)
    v = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def loss(v: torch.Tensor) -> torch.Tensor:
        energy = lambda x, v: 0.5 * (x.square() / v).sum(-1)  # noqa: E731
        return denoising_score_matching(energy, x, v, sigma=sigma, noise=noise).mean()

    expected = 0.5 * (sigma**2 * (s**2 + sigma**2) / v**2 - 2 * sigma**2 / v + 1)
    torch.testing.assert_close(loss(v), expected, rtol=2e-2, atol=0)
    best = torch.tensor(s**2 + sigma**2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(best), best)
    (elsewhere,) = torch.autograd.grad(loss(v), v)
    assert abs(slope) < 0.05 * abs(elsewhere)


def test_score_matching_per_sample_and_through_second_derivatives() -> None:
    x, noise = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    energy = lambda x, w: (w * x).cosh().sum((1, 2))  # noqa: E731
    got = denoising_score_matching(energy, x, weight, sigma=sigma, noise=noise)
    level = sigma[:, None, None]
    by_hand = 0.5 * (level * weight * (weight * (x + level * noise)).sinh() - noise).square().sum((1, 2))
    torch.testing.assert_close(got, by_hand)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), weight)[0] for value in (got, by_hand)))
    torch.manual_seed(1)
    drawn = denoising_score_matching(energy, x, weight, sigma=0.5)
    torch.manual_seed(1)
    same = denoising_score_matching(energy, x, weight, sigma=torch.tensor(0.5), noise=torch.randn_like(x))
    torch.testing.assert_close(drawn, same)
    with pytest.raises(ValueError, match="a number or one per sample"):
        denoising_score_matching(energy, x, weight, sigma=torch.ones(2))
    with pytest.raises(ValueError, match="noise like x"):
        denoising_score_matching(energy, x, weight, sigma=1.0, noise=noise[:1])

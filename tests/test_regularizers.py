"""The Jacobian penalty against dense Jacobians; layers of bounded norm against singular values, and in a layer."""

import pytest
import torch
from problems import Contraction, LogCosh, some_context
from torch import Tensor, nn

from energynet import FPI_NN, GradientStep, fixed_point
from energynet.regularizers import jacobian_penalty, spectrally_normalized


def squared_norms(network: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    J = torch.func.vmap(torch.func.jacrev(lambda x, z: network(x[None], z[None])[0]))(x, z)
    return J.square().sum((1, 2))


@pytest.mark.slow
def test_penalty_estimates_the_squared_norm_of_each_sample() -> None:
    network, x, z = Contraction(), torch.randn(3, 4, dtype=torch.float64), 0.3 * some_context(3)
    found = jacobian_penalty(network, x, z, num_vectors=4000)
    torch.testing.assert_close(found, squared_norms(network, x, z), rtol=0.05, atol=0)


def test_penalty_is_exact_for_one_variable_and_follows_the_generator() -> None:
    x = torch.randn(5, 1, dtype=torch.float64)
    torch.testing.assert_close(jacobian_penalty(torch.tanh, x), (1 - x.tanh().square()).square()[:, 0])
    network, x, z = Contraction(), torch.randn(3, 4, dtype=torch.float64), some_context(3)
    first, again, other = (
        jacobian_penalty(network, x, z, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_penalty_is_differentiable_in_parameters_and_through_the_answer() -> None:
    # One variable: the estimate is the norm itself. x* = tanh(w x* + z), J = w (1 − x*²).
    network, z = Contraction(n=1), some_context(3)

    def penalty(w: float) -> Tensor:
        network.R = nn.Parameter(torch.full((1, 1), w, dtype=torch.float64))
        x = fixed_point(network, torch.zeros(3, 1, dtype=torch.float64), z).value
        return jacobian_penalty(network, x, z).sum()

    (total,) = torch.autograd.grad(penalty(0.5), network.R)
    difference = (penalty(0.5 + 1e-5) - penalty(0.5 - 1e-5)).detach() / 2e-5
    torch.testing.assert_close(total.squeeze(), difference, rtol=1e-4, atol=1e-8)


def test_penalty_training_makes_a_map_contract() -> None:
    network, z = Contraction(rate=3.0), torch.zeros(8, 3, dtype=torch.float64)
    optimizer = torch.optim.Adam([network.R], lr=0.05)
    x = 0.1 * torch.randn(8, 4, dtype=torch.float64)
    before = squared_norms(network, x, z).mean()
    for _ in range(60):
        optimizer.zero_grad()
        jacobian_penalty(network, x, z).mean().backward()
        optimizer.step()
    assert squared_norms(network, x, z).mean() < 0.1 * before


def test_penalty_takes_steps_pytrees_and_single_problems() -> None:
    energy, z = LogCosh(), some_context(2)
    assert jacobian_penalty(GradientStep(energy, 0.1), torch.zeros(2, 4, dtype=torch.float64), z).shape == (2,)
    tree = jacobian_penalty(lambda x: {"a": 2 * x["a"], "b": 0 * x["b"]}, {"a": torch.ones(3, 2), "b": torch.ones(3, 2, 2)})
    torch.testing.assert_close(tree, torch.full((3,), 8.0))
    torch.testing.assert_close(jacobian_penalty(lambda x: 2 * x, torch.ones(3), batch_dims=0), torch.tensor(12.0))
    with pytest.raises(ValueError, match="num_vectors must be at least 1"):
        jacobian_penalty(torch.tanh, torch.ones(2, 3), num_vectors=0)
    with pytest.raises(ValueError, match="shapes of x"):
        jacobian_penalty(lambda x: x.sum(-1), torch.ones(2, 3))


# ------------------------------------------------------------------------------------------------- bounded layers


class Cell(nn.Module):
    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.inward, self.context, self.outward = nn.Linear(n, 9), nn.Linear(3, 9), nn.Linear(9, n)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # (B, n), (B, 3)
        return self.outward(torch.tanh(self.inward(x) + self.context(z)))


@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0])
def test_linear_layers_have_the_norm_that_was_asked_for(limit: float) -> None:
    given = Cell()
    with torch.no_grad():
        given.inward.weight.mul_(20)
    before = given.inward.weight.clone()
    cell = spectrally_normalized(given, limit)
    for _ in range(10):
        cell(torch.zeros(1, 4), torch.zeros(1, 3))
    for layer in (cell.inward, cell.context, cell.outward):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(limit, rel=0.02)
    assert torch.equal(given.inward.weight, before) and not hasattr(given.inward, "parametrizations")  # a copy


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}, {"padding_mode": "circular"}], ids=str)
def test_convolutions_are_bounded_as_operators(options: dict[str, object]) -> None:
    layers = [nn.Conv2d(2, 4, 3, padding=1, bias=False, **options)]
    if "padding_mode" not in options:
        layers.append(nn.ConvTranspose2d(2, 4, 3, padding=1, bias=False, **options))
    for layer in layers:
        with torch.no_grad():
            layer.weight.fill_(1.0)  # all alike: the worst case for the norm of the matrix
        bounded = spectrally_normalized(layer, 0.9).double()
        J = torch.func.jacrev(lambda x, bounded=bounded: bounded(x[None])[0].flatten())(torch.zeros(2, 7, 7, dtype=torch.float64))
        norm = torch.linalg.matrix_norm(J.detach().flatten(1), 2)
        assert 0.2 < float(norm) <= 0.9 * 1.001


def test_a_normalized_network_solves_and_its_weights_are_computed_once_a_solve() -> None:
    cell = spectrally_normalized(Cell(), 0.8).double()
    computed = []
    cell.inward.parametrizations.weight[1].register_forward_hook(lambda *_: computed.append(1))
    layer, z = FPI_NN(cell, start=lambda z: z.new_zeros(len(z), 4)), some_context(5)
    x = layer(z)
    assert len(computed) == 1
    x.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())
    assert float(layer.network.inward.parametrizations.weight.original.grad.norm()) > 0


def test_what_cannot_be_normalized_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        spectrally_normalized(nn.Sequential(nn.Tanh()))
    with pytest.raises(ValueError, match="limit must be positive"):
        spectrally_normalized(Cell(), 0.0)

"""The multi-label energy: its bounds hold, its minimizer is the answer, its gradients are exact."""

import pytest
import torch
from problems import TIGHT
from torch import Tensor, nn
from torch.nn.functional import softplus

from energynet import FPI_GD, FPI_NN, Termination, minimize
from energynet.energies import BoundedNorm, LabelContraction, LabelFeatures, MultiLabelEnergy, StructuredEnergy

L, M, B = 5, 2, 4


def energy_with_large_weights() -> MultiLabelEnergy:
    torch.manual_seed(0)
    energy = MultiLabelEnergy(L, num_ridges=7).double()
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.copy_(5 * torch.randn_like(parameter))
    return energy


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (1, 4), (6, 6)])
def test_bounded_norm_bounds_the_largest_singular_value(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight = BoundedNorm(0.7)(100 * torch.randn(shape, dtype=torch.float64))
    largest = torch.linalg.matrix_norm(weight, 2)
    assert largest <= 0.7 + 1e-12
    assert largest >= 0.7 / min(shape) ** (1 / 8) - 1e-12


def test_hessian_lies_within_the_documented_bounds() -> None:
    energy = energy_with_large_weights()
    scores = torch.randn(1, M, L, dtype=torch.float64)
    for scale in (0.0, 0.1, 1.0, 10.0):
        u = scale * torch.randn(L, dtype=torch.float64)
        hessian = torch.func.jacrev(torch.func.jacrev(lambda u: energy(u[None], scores).sum()))(u)
        eigenvalues = torch.linalg.eigvalsh(hessian)
        assert eigenvalues.min() >= 1 - energy.coupling - 1e-9
        assert eigenvalues.max() <= 1 + energy.coupling + 1e-9


def test_energy_is_the_sum_of_experts_and_ridges() -> None:
    energy = energy_with_large_weights()
    u, scores = torch.randn(B, L, dtype=torch.float64), torch.randn(B, M, L, dtype=torch.float64)
    experts = 0.5 * (u[:, None] - scores).square().sum(-1).mean(1)
    y = u @ energy.weight.T + energy.shift
    ridges = (torch.tanh(energy.amplitude) * torch.cosh(y).log()).sum(-1)
    torch.testing.assert_close(energy(u, scores), experts - energy.coupling * ridges)


def test_minimizer_is_found_and_gradients_are_exact() -> None:
    energy = energy_with_large_weights()
    tight = Termination(atol=0.0, rtol=1e-12)
    layer = FPI_GD(energy, step_size=energy.step_size, termination=tight)
    scores = torch.randn(B, M, L, dtype=torch.float64, requires_grad=True)
    u = layer(scores)
    assert torch.func.grad(lambda u: energy(u, scores).sum())(u.detach()).norm() < 1e-9
    assert torch.autograd.gradcheck(layer, (scores,), atol=1e-6)


def test_contraction_contracts_by_its_coupling() -> None:
    torch.manual_seed(2)
    network = LabelContraction(L, num_units=7, coupling=0.8).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(20)
    mean = torch.randn(B, L, dtype=torch.float64)
    one, other = torch.randn(2, B, L, dtype=torch.float64)
    ratio = (network(one, mean) - network(other, mean)).norm(dim=1) / (one - other).norm(dim=1)
    assert ratio.max() <= 0.8
    answer = FPI_NN(network, termination=Termination(rtol=1e-10))(mean, x0=mean)
    torch.testing.assert_close(network(answer, mean), answer)


@pytest.mark.parametrize("coupling", [0.0, 1.0, -0.5])
def test_a_coupling_without_unique_answer_is_refused(coupling: float) -> None:
    for build in (MultiLabelEnergy, LabelContraction):
        with pytest.raises(ValueError, match="between 0 and 1"):
            build(L, coupling=coupling)
    with pytest.raises(ValueError, match="positive"):
        BoundedNorm(-coupling if coupling > 0 else coupling)


def test_features_give_one_score_per_expert_and_label() -> None:
    features = LabelFeatures(6, L, num_experts=M, hidden=8)
    assert features(torch.ones(B, 6)).shape == (B, M, L)
    assert sum(isinstance(module, nn.Dropout) for module in features.modules()) == 2 * M


def structured() -> StructuredEnergy:
    torch.manual_seed(3)
    energy = StructuredEnergy(6, L, hidden=7, ridge=0.3).double()
    with torch.no_grad():
        energy.labels.weight.normal_()
    return energy


class Unhoisted(nn.Module):
    """The energy without its `encode`."""

    def __init__(self, energy: StructuredEnergy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, u: Tensor, z: Tensor) -> Tensor:
        return self.energy(u, z)


def test_structured_energy_is_what_its_docstring_says() -> None:
    energy = structured()
    u, z = torch.randn(B, L, dtype=torch.float64), torch.randn(B, 6, dtype=torch.float64)
    weight = torch.cat([energy.features.weight, energy.labels.weight], 1)
    hidden = softplus(torch.cat([z, torch.sigmoid(u)], 1) @ weight.T + energy.features.bias)
    torch.testing.assert_close(energy(u, z), hidden.square().mean(1) + 0.15 * u.square().sum(1))


def test_the_features_are_computed_once_per_solve() -> None:
    energy, z = structured(), torch.randn(B, 6, dtype=torch.float64)
    read, evaluated = [], []
    energy.features.register_forward_hook(lambda *_: read.append(1))
    energy.labels.register_forward_hook(lambda *_: evaluated.append(1))
    minimize(energy, None, z)
    assert len(read) == 1 < len(evaluated)


def test_what_is_computed_once_changes_no_derivative_of_the_structured_energy() -> None:
    energy = structured()
    z = torch.randn(B, 6, dtype=torch.float64, requires_grad=True)
    variables = (z, *energy.parameters())
    results = []
    for same in (energy, Unhoisted(energy)):
        value = minimize(same, energy.start(z), z, termination=TIGHT).value
        first = torch.autograd.grad(value.sin().sum(), variables, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), variables)
        results.append([value, *first, *second])
    for hoisted, plain in zip(*results, strict=True):
        torch.testing.assert_close(hoisted, plain, rtol=1e-8, atol=1e-10)


def test_structured_energy_falls_to_a_minimum() -> None:
    energy = structured()
    z = torch.randn(B, 6, dtype=torch.float64)
    u = minimize(energy, None, z, termination=TIGHT).value.detach()
    assert torch.func.grad(lambda u: energy(u, z).sum())(u).norm() < 1e-9
    assert (energy(u, z) < energy(u + 0.1 * torch.randn_like(u), z)).all()
    with pytest.raises(ValueError, match="infinity"):
        StructuredEnergy(6, L, ridge=0.0)

"""Convexity of the convex energies for any weights, what strong convexity adds, and their minimizers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from energynet import FPI_GD, Energy, Termination, minimize
from energynet.energies import ConvexNetwork, NonNegative, Quadratic, StronglyConvex
from energynet.energy import EnergyLike

N, D = 3, 2
SEEDS, SCALES = st.integers(0, 10_000), st.floats(0.01, 5.0)


def network(seed: int, scale: float, hidden: tuple[int, ...] = (7, 5)) -> ConvexNetwork:
    torch.manual_seed(seed)
    energy = ConvexNetwork(N, D, hidden=hidden).double()
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return energy


def smallest_curvature(energy: EnergyLike, x: Tensor, *context: Tensor) -> Tensor:  # (B, n) -> (B,)
    hessian = torch.func.hessian(lambda x, *z: energy(x[None], *(t[None] for t in z))[0])
    return torch.linalg.eigvalsh(torch.func.vmap(hessian)(x, *context).detach()).amin(-1)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, scale=SCALES, hidden=st.sampled_from([(6,), (7, 5), (4, 6, 5)]))
def test_network_is_convex_for_any_weights(seed: int, scale: float, hidden: tuple[int, ...]) -> None:
    energy = network(seed, scale, hidden)
    x, y = 3 * torch.randn(2, 6, N, dtype=torch.float64)
    z = torch.randn(6, D, dtype=torch.float64)
    ends, middle = 0.5 * (energy(x, z) + energy(y, z)), energy(0.5 * (x + y), z)
    rounding = 1e-12 * (ends.abs() + middle.abs())
    assert (middle <= ends + rounding).all()
    assert (smallest_curvature(energy, x, z) >= -1e-10 * (1 + scale) ** 4).all()


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, scale=st.floats(0.01, 2.0), strength=st.floats(0.01, 10.0))
def test_strong_convexity_adds_its_strength(seed: int, scale: float, strength: float) -> None:
    plain = network(seed, scale)
    energy = StronglyConvex(plain, strength)
    x, y = torch.randn(2, 6, N, dtype=torch.float64)
    z = torch.randn(6, D, dtype=torch.float64)
    assert (smallest_curvature(energy, x, z) >= strength - 1e-10).all()
    gap = 0.5 * (energy(x, z) + energy(y, z)) - energy(0.5 * (x + y), z)
    assert (gap >= strength / 8 * (x - y).square().sum(-1) - 1e-10).all()
    torch.testing.assert_close(energy(x, z) - plain(x, z), 0.5 * strength * x.square().sum(-1))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, ridge=st.floats(0.0, 2.0))
def test_quadratic_is_as_convex_as_its_matrix(seed: int, ridge: float) -> None:
    A = torch.randn(4, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Q, b = A @ A.mT + ridge * torch.eye(N), A[:, 0]
    torch.testing.assert_close(smallest_curvature(Quadratic(), b, Q, b), torch.linalg.eigvalsh(Q).amin(-1), atol=1e-10, rtol=1e-8)


def test_network_depends_on_all_its_arguments_and_is_not_affine() -> None:
    energy = network(0, 1.0)
    x, z = torch.randn(6, N, dtype=torch.float64), torch.randn(6, D, dtype=torch.float64)
    assert (smallest_curvature(energy, x, z) > 1e-6).any()
    assert not torch.allclose(energy(x, z), energy(x, z + 1)) and energy(x, z).shape == (6,)
    for name, parameter in energy.named_parameters():
        (g,) = torch.autograd.grad(energy(x, z).sum(), parameter)
        assert g.norm() > 0, name


def test_context_features_are_encoded_once_per_solve() -> None:
    energy = StronglyConvex(network(1, 0.5), 1.0)
    encoded, evaluated = [], []
    energy.energy.features.register_forward_hook(lambda *_: encoded.append(1))
    energy.energy.skips[0].register_forward_hook(lambda *_: evaluated.append(1))
    minimize(energy, None, torch.randn(6, D, dtype=torch.float64))
    assert len(encoded) == 1 < len(evaluated)


def test_minimizer_and_gradients_of_a_strongly_convex_network() -> None:
    layer = FPI_GD(StronglyConvex(network(2, 0.5), 1.0), 0.2, termination=Termination(0.0, 1e-12))
    z = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    for x0 in (None, 5 * torch.randn(3, N, dtype=torch.float64)):
        torch.testing.assert_close(layer(z, x0=x0), layer(z))
    assert torch.autograd.gradcheck(layer, (z,), atol=1e-6)
    layer(z).square().sum().backward()
    raw = layer.energy.energy.layers[0].parametrizations.weight.original
    assert raw.grad.norm() > 0


def test_quadratic_has_its_closed_form() -> None:
    A, b = torch.randn(4, N, N, dtype=torch.float64), torch.randn(4, N, dtype=torch.float64)
    Q = A @ A.mT + torch.eye(N) + (A - A.mT)  # the antisymmetric part counts for nothing
    x = minimize(Quadratic(), None, Q, b, termination=Termination(0.0, 1e-12)).value
    torch.testing.assert_close(x, torch.linalg.solve(0.5 * (Q + Q.mT), b))
    value = 0.5 * torch.einsum("bi,bij,bj->b", x, Q, x) - (b * x).sum(-1)
    torch.testing.assert_close(Quadratic()(x, Q, b), value)
    shared = Quadratic()(x, Q[0], b)
    torch.testing.assert_close(shared[0], value[0])


class Held:
    """A callable object with a module inside."""

    def __init__(self) -> None:
        self.linear = nn.Linear(2, 1)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return self.linear(x).squeeze(-1)


def test_wrapping_keeps_start_and_parameters() -> None:
    class Shifted(Energy):
        def start(self, z: Tensor) -> Tensor:
            return z + 7

        def evaluate(self, x: Tensor, z: Tensor) -> Tensor:
            return (x - z).square().sum(-1)

    z = torch.zeros(1, 2)
    assert torch.equal(StronglyConvex(Shifted(), 1.0).start(z), z + 7)
    with pytest.raises(ValueError, match="does not define an initial point"):
        StronglyConvex(lambda x: x.sum(-1), 1.0).start(z)
    energy = StronglyConvex(Held(), 2.0)
    assert len(list(energy.parameters())) == 2
    x = minimize(energy, torch.zeros(1, 2), z).value
    torch.testing.assert_close(x, -energy.energy.linear.weight / 2, atol=1e-4, rtol=1e-4)
    x.sum().backward()
    assert energy.energy.linear.weight.grad is not None


def test_wrapping_takes_pytrees_and_single_problems() -> None:
    x = {"a": torch.ones(2, 3), "b": torch.ones(2, 2, 2), "c": torch.ones(2)}
    zero = StronglyConvex(lambda x: 0 * x["a"].sum(-1), 2.0)
    torch.testing.assert_close(zero(x), torch.full((2,), 8.0))
    torch.testing.assert_close(StronglyConvex(lambda x: 0 * x.sum(), 2.0)(torch.ones(3)), torch.tensor(3.0))
    assert zero({"a": torch.ones(0, 3), "b": torch.ones(0, 2, 2), "c": torch.ones(0)}).shape == (0,)


def test_weights_are_positive_and_can_be_set() -> None:
    weight = torch.logspace(-4, 2, 20, dtype=torch.float64)
    torch.testing.assert_close(NonNegative()(NonNegative().right_inverse(weight)), weight)
    energy = network(3, 5.0)
    assert all((layer.weight >= 0).all() for layer in energy.layers)


def test_wrong_arguments_are_refused() -> None:
    for strength in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="strength must be positive"):
            StronglyConvex(Quadratic(), strength)
    with pytest.raises(ValueError, match="needs a hidden layer"):
        ConvexNetwork(N, D, hidden=())

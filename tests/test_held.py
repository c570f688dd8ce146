"""What a layer holds in objects that are no modules: listed, saved, moved, trained."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import LogCosh
from torch import Tensor, nn

from energynet import FPI_GD, FPI_NN, DampedStep, ProjectedLBFGS, ProximalStep, Termination, minimize
from energynet.constraints import L1, Affine, Box, CappedSimplex, GroupL2, L2Ball, Simplex, TotalVariation
from energynet.energies import StronglyConvex

TIGHT = Termination(atol=1e-12, rtol=1e-12)


def bowl(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).square().sum(-1)


class Weighted:
    """A plain callable with a parameter, a tensor and a module."""

    def __init__(self) -> None:
        self.weight, self.offset, self.network = nn.Parameter(torch.ones(2)), torch.full((2,), 0.5), nn.Linear(2, 2)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return (self.weight.square() * (x - z).square() + self.offset * x).sum(-1) + 0 * self.network(x).sum(-1)


def double(value: float) -> Tensor:
    return torch.full((2,), value, dtype=torch.float64)


def test_a_bound_that_is_a_parameter_trains() -> None:
    layer = FPI_GD(bowl, prox=Box(0.0, nn.Parameter(torch.ones(2))), start=torch.zeros_like)
    assert [name for name, _ in layer.named_parameters()] == ["held_prox.upper"] == list(layer.state_dict())
    z = torch.tensor([[3.0, 0.2]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(z)[0, 0].sub(2).square().mul(0.5).backward()
    optimizer.step()
    assert layer.prox.upper.tolist() == [1.5, 1.0]
    torch.testing.assert_close(layer(z), torch.tensor([[1.5, 0.2]]), rtol=0, atol=1e-3)


PROXES: list[tuple[Callable[..., Any], dict[str, Tensor]]] = [
    (Box, {"lower": double(-1.0), "upper": double(0.5)}),
    (L1, {"weight": double(0.3)}),
    (Simplex, {"radius": torch.tensor(2.0, dtype=torch.float64)}),
    (CappedSimplex, {"upper": double(0.6), "radius": torch.tensor(1.0, dtype=torch.float64)}),
    (L2Ball, {"radius": torch.tensor(0.7, dtype=torch.float64), "center": double(0.1)}),
    (GroupL2, {"weight": torch.tensor(0.5, dtype=torch.float64)}),
    (TotalVariation, {"weight": torch.tensor(0.5, dtype=torch.float64)}),
    (Affine, {"matrix": double(1.0)[None], "right": torch.ones(1, dtype=torch.float64)}),
]


@pytest.mark.parametrize(("make", "tensors"), PROXES, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("learned", [False, True])
def test_every_constraint_is_listed_saved_moved_and_copied(
    make: Callable[..., Any], tensors: dict[str, Tensor], learned: bool
) -> None:
    def layer() -> FPI_GD:
        own = {name: nn.Parameter(t.clone()) if learned else t.clone() for name, t in tensors.items()}
        return FPI_GD(bowl, prox=make(**own), start=torch.zeros_like, termination=TIGHT)

    first, other, z = layer(), layer(), torch.tensor([[1.5, -0.4]], dtype=torch.float64)
    assert set(first.state_dict()) == {f"held_prox.{name}" for name in tensors}
    assert len(list(first.parameters())) == learned * len(tensors)
    expected = minimize(bowl, torch.zeros_like(z), z, prox=make(**tensors), termination=TIGHT).value
    torch.testing.assert_close(first(z), expected)
    for k, t in enumerate((*other.parameters(), *other.buffers())):
        t.data.mul_(1.1 + 0.1 * k)
    assert not torch.equal(other(z), first(z))
    other.load_state_dict(first.state_dict())
    torch.testing.assert_close(other(z), first(z))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(first)))
    for k, t in enumerate((*twin.parameters(), *twin.buffers())):
        t.data.mul_(1.1 + 0.1 * k)
    assert not torch.equal(twin(z), first(z))
    moved = first.float()
    moved.termination = None
    assert {t.dtype for t in moved.state_dict().values()} == {torch.float32}
    assert {getattr(moved.prox, name).dtype for name in tensors} == {torch.float32}
    assert moved(z.float()).dtype == torch.float32
    torch.testing.assert_close(moved(z.float()).double(), expected, rtol=0, atol=1e-3)


def test_steps_inside_steps_and_their_step_sizes() -> None:
    gamma, upper = nn.Parameter(torch.tensor(0.25)), nn.Parameter(torch.ones(2))
    layer = FPI_NN(DampedStep(ProximalStep(bowl, gamma, Box(torch.zeros(2), upper)), 0.9), start=torch.zeros_like)
    names = {"held_network.step.step_size", "held_network.step.prox.upper", "held_network.step.prox.lower"}
    assert set(layer.state_dict()) == names and {id(p) for p in layer.parameters()} == {id(gamma), id(upper)}
    z = torch.tensor([[3.0, 0.2]])
    layer(z).sum().backward()
    torch.testing.assert_close(upper.grad, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-3)
    layer.double()
    assert layer(z.double()).dtype == torch.float64


def test_plain_callables_partials_and_starts() -> None:
    z = torch.tensor([[3.0, 0.2]])
    energy, start = Weighted(), nn.Linear(2, 2)
    layer = FPI_GD(energy, start=functools.partial(start.forward))
    assert {"held_energy.weight", "held_energy.offset", "held_energy.network.weight", "held_start.func.self.bias"} < set(
        layer.state_dict()
    )
    expected = z - 0.25
    torch.testing.assert_close(layer(z), expected, rtol=0, atol=1e-2)
    doubled = layer.double()
    torch.testing.assert_close(doubled(z.double()), expected.double(), rtol=0, atol=1e-3)
    assert energy.offset.dtype == torch.float32  # the user's own tensor stays as it is
    convex = StronglyConvex(Weighted(), 1.0)
    assert {"held.weight", "held.offset"} < set(convex.state_dict())
    assert minimize(convex.double(), torch.zeros(1, 2).double(), z.double()).value.dtype == torch.float64
    assert not FPI_GD(bowl).state_dict() and not FPI_GD(LogCosh().forward).held_energy._parameters


def test_functional_call_replaces_what_is_held() -> None:
    layer = FPI_GD(bowl, prox=Box(0.0, nn.Parameter(torch.ones(2))), start=torch.zeros_like, solver=ProjectedLBFGS())
    z, upper = torch.tensor([[3.0, 0.2]]), torch.tensor([2.0, 2.0])
    run = lambda upper: torch.func.functional_call(layer, {"held_prox.upper": upper}, z)  # noqa: E731
    torch.testing.assert_close(run(upper), torch.tensor([[2.0, 0.2]]))
    rate = torch.func.jacrev(run)(upper)[0]
    torch.testing.assert_close(rate, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(z), torch.tensor([[1.0, 0.2]]))

"""Whatever changes an input in place is refused, and the caller's tensors keep their values."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from energynet import FPI_GD, FPI_NN, Energy, ImpureFunctionError, fixed_point, minimize

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: list[Activation] = [
    nn.Hardswish(inplace=True),
    nn.LeakyReLU(0.5, inplace=True),
    nn.ReLU(inplace=True),
    nn.ELU(inplace=True),
    nn.Threshold(0.0, 1.0, inplace=True),
    lambda z: nn.functional.silu(z, True),
    lambda z: torch.clamp(z, 0, 1, out=z),
    lambda z: torch.ops.aten.relu_.default(z),
    lambda z: torch._foreach_mul_([z], 2.0) or z,
    lambda z: z.add_(1),
]


def hidden(z: Tensor) -> Tensor:
    """As an extension in C++ would do it: no mode of PyTorch sees it."""
    with torch._C.DisableTorchFunction():
        return z.relu_()


class Held(nn.Module):
    def __init__(self, activation: Activation, value: Tensor) -> None:
        super().__init__()
        self.activation, self.value = activation, value

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.activation(self.value)).square().sum(-1)


class Encoded(Energy):
    def __init__(self, activation: Activation, early: bool) -> None:
        super().__init__()
        self.activation, self.early = activation, early

    def encode(self, z: Tensor) -> Tensor:
        return self.activation(z) if self.early else 2 * z

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:
        return (x - (z if self.early else self.activation(z))).square().sum(-1)


def ways(activation: Activation) -> dict[str, Callable[[Tensor], object]]:
    zero = torch.zeros(1, 2)
    return {
        "context": lambda z: minimize(lambda x, z: (x - activation(z)).square().sum(-1), zero, z),
        "x0": lambda z: minimize(lambda x: activation(x).square().sum(-1), z),
        "captured": lambda z: minimize(lambda x: (x - activation(z)).square().sum(-1), zero),
        "attribute": lambda z: minimize(Held(activation, z), zero),
        "code": lambda z: minimize(Encoded(activation, early=False), zero, z),
        "map": lambda z: fixed_point(lambda x, z: 0.5 * x + activation(z), zero, z),
        "layer": lambda z: FPI_GD(lambda x, z: (x - activation(z)).square().sum(-1), start=torch.zeros_like)(z),
        "under grad": lambda z: torch.func.grad(
            lambda z: minimize(lambda x, z: (x - activation(z)).square().sum(-1), zero, z).value.sum()
        )(z),
    }


@pytest.mark.parametrize("way", ways(torch.relu))
def test_in_place_changes_of_any_input_are_refused(way: str) -> None:
    for activation in ACTIVATIONS:
        z = torch.tensor([[1.0, -2.0]])
        with pytest.raises(ImpureFunctionError, match="in place"):
            ways(activation)[way](z)
        assert z.tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize("way", ["context", "code", "map", "layer"])
def test_what_no_mode_sees_is_told_by_versions(way: str) -> None:
    z = torch.tensor([[1.0, -2.0]])
    with pytest.raises(ImpureFunctionError, match="changes its input in place"):
        ways(hidden)[way](z)
    assert z.tolist() == [[1.0, -2.0]]


def test_encoders_and_starts_may_not_change_the_context_either() -> None:
    activation = nn.LeakyReLU(0.5, inplace=True)
    with pytest.raises(ImpureFunctionError, match="encoder of the context changes its input"):
        minimize(Encoded(activation, early=True), torch.zeros(1, 2), torch.tensor([[1.0, -2.0]]))
    with pytest.raises(ImpureFunctionError, match="start of FPI_GD changes its input"):
        FPI_GD(lambda x, z: (x - z).square().sum(-1), start=activation)(torch.tensor([[1.0, -2.0]]))


def test_in_place_changes_of_what_is_made_inside_are_in_order() -> None:
    activation = nn.LeakyReLU(0.5, inplace=True)

    def energy(x: Tensor, z: Tensor) -> Tensor:
        level = torch.zeros_like(z).add_(1)
        level[:, 0] = 2.0
        return (x - activation(level * z)).square().sum(-1)

    x = minimize(energy, torch.zeros(1, 2), torch.tensor([[1.0, -2.0]])).value
    torch.testing.assert_close(x, torch.tensor([[2.0, -1.0]]), rtol=0, atol=1e-6)


def test_a_map_has_no_encoder_to_which_a_random_part_could_move() -> None:
    x0, drop, norm = torch.zeros(3, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)
    for map_, remedy in (
        (nn.Sequential(nn.Linear(2, 2), drop), "Call .eval() on that part, or apply it outside and pass the result as context."),
        (
            nn.Sequential(nn.Linear(2, 2), norm),
            "replace it (LayerNorm, GroupNorm), or apply it outside and pass the result as context.",
        ),
        (lambda x: 0.5 * x + torch.randn(2), "Draw them outside and pass them as context."),
    ):
        for solve in (lambda f: fixed_point(f, x0), lambda f: FPI_NN(f, start=x0)()):
            with pytest.raises(ImpureFunctionError, match=re.escape(remedy)) as caught:
                solve(map_)
            assert "Energy.encode" not in str(caught.value)
    drop.eval()
    assert fixed_point(lambda x, z: 0.5 * drop(x) + z, x0, torch.randn(3, 2)).converged.all()
    with pytest.raises(ImpureFunctionError, match=re.escape(".eval() on that part, or move it to Energy.encode")):
        minimize(lambda x: nn.Dropout(0.5)(x).square().sum(-1), x0)

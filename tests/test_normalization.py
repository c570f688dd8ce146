"""Normalization layers in energies and maps: PyTorch's own third derivatives are wrong, ours are not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from energynet import fixed_point, minimize
from energynet._torch.normalization import composed
from tests.problems import TIGHT

WEIGHT, BIAS = torch.tensor([0.5, 2.0, -1.0, 1.5]).double(), torch.tensor([0.1, 0.0, -0.3, 1.0]).double()
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (4,), WEIGHT, BIAS),
    "layer_norm of two dimensions": lambda x: torch.layer_norm(x, (3, 4), None, None, 1e-3),
    "instance_norm": lambda x: F.instance_norm(x.mT, weight=WEIGHT, bias=BIAS),
    "batch_norm": lambda x: F.batch_norm(x.mT, None, None, WEIGHT, BIAS, training=True, eps=1e-2),
    "batch_norm of a matrix": lambda x: F.batch_norm(x.flatten(0, 1), None, None, training=True),
}


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def derivative(function: Callable[[Tensor], Tensor], x: Tensor, d: Tensor, order: int) -> Tensor:
    """The derivative of that order of Σ sin f(x + t d) in t, at 0."""
    x = x.detach().requires_grad_()
    value = function(x).sin().sum()
    for _ in range(order):
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        value = (slope * d).sum()
    return value.detach()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_written_out_it_is_the_same_function_with_the_right_third_derivative(name: str) -> None:
    function, x, d, h = FUNCTIONS[name], tokens(), tokens(2), 1e-5
    same = [derivative(function, x, d, order) for order in range(3)]
    with composed():
        torch.testing.assert_close([derivative(function, x, d, order) for order in range(3)], same, rtol=1e-12, atol=1e-12)
        third = derivative(function, x, d, 3)
    ends = [derivative(function, x + t * h * d, d, 2) for t in (-1, 1)]
    torch.testing.assert_close(third, (ends[1] - ends[0]) / (2 * h), rtol=1e-7, atol=1e-7)


def test_running_statistics_and_other_dtypes_are_as_in_pytorch() -> None:
    x, norm = tokens().mT, nn.BatchNorm1d(4).double()
    with composed():
        norm(x)
        assert norm.running_mean is not None and norm.running_mean.abs().sum() > 0
        for half in (torch.float16, torch.bfloat16):
            assert F.layer_norm(x.to(half), (3,)).dtype is half
        for refused in (lambda: F.batch_norm(x, None, None), lambda: F.instance_norm(x, use_input_stats=False)):
            with pytest.raises(RuntimeError, match="running_mean"):
                refused()
        norm.eval()
        mean, variance = norm.running_mean[:, None], torch.as_tensor(norm.running_var)[:, None]
        torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-5).sqrt())


@pytest.mark.parametrize("norm", [nn.LayerNorm(4, elementwise_affine=False), nn.InstanceNorm1d(3)], ids=["layer", "instance"])
def test_a_solve_through_it_to_third_order(norm: nn.Module) -> None:
    norm, z, d, h = norm.double(), tokens(3), tokens(2), 1e-4

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return 0.3 * (z * norm(x + z)).flatten(1).sum(-1) + 0.5 * (x - z).square().flatten(1).sum(-1)

    def step(x: Tensor, z: Tensor) -> Tensor:
        return 0.2 * norm(x + 3 * z) + z

    for solve in (
        lambda z: minimize(energy, torch.zeros_like(z), z, termination=TIGHT).value,
        lambda z: fixed_point(step, torch.zeros_like(z), z, termination=TIGHT).value,
    ):
        for order in (2, 3):
            ends = [derivative(solve, z + t * h * d, d, order - 1) for t in (-1, 1)]
            torch.testing.assert_close(derivative(solve, z, d, order), (ends[1] - ends[0]) / (2 * h), rtol=1e-5, atol=1e-6)

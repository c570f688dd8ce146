"""Energies without a right Hessian are refused at their first solve; those with kinks, noise or strong curvature are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from energynet import FPI_GD, LostGradientError, Termination, fixed_point, minimize
from energynet.engine import curvature
from energynet.testing import CheckError, check_energy

Energy = Callable[..., Tensor]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * v


class ByNumPy(Once):
    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy()) * v


class Doubled(torch.autograd.Function):
    """x² with the right first derivative and twice the second one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (4 * x - 2 * x.detach()) * v


def of(function: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(function.apply(x))


def ridge(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * (x - 2 * z).square().sum(-1)


WRONG: dict[str, Energy] = {
    "once_differentiable": lambda x, z: of(Once, x - z).sum(-1) + ridge(x, z),
    "NumPy": lambda x, z: of(ByNumPy, x - z).sum(-1) + ridge(x, z),
    "second derivative": lambda x, z: of(Doubled, x - z).sum(-1) + ridge(x, z),
    "detached": lambda x, z: (x - 0.5 * x.sin().detach() - z).square().sum(-1),
    "not implemented": lambda x, z: torch.cdist(x[:, None], z[:, None]).square().sum((1, 2)) + ridge(x, z),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_missing_or_wrong_hessian_is_refused(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=dtype, requires_grad=True)
    call, layer = lambda: minimize(WRONG[name], torch.zeros_like(z), z), lambda: FPI_GD(WRONG[name])(z, x0=z.detach())
    for solve in (call, layer):
        for _ in range(2):  # not only the first time
            with pytest.raises(LostGradientError, match="a minimizer contains the Hessian"):
                solve()
    with torch.no_grad(), pytest.raises(LostGradientError):
        minimize(WRONG[name], torch.zeros(2, 2, dtype=dtype), z)
    with pytest.raises(LostGradientError):
        torch.func.grad(lambda z: minimize(WRONG[name], torch.zeros(2, 2, dtype=dtype), z).value.sum())(z.detach())
    with pytest.raises(CheckError, match="Hessian"):
        check_energy(WRONG[name], torch.rand(3, 2, dtype=dtype), torch.rand(3, 2, dtype=dtype))


def test_a_map_needs_one_derivative_only() -> None:
    z = torch.tensor([[0.2]], dtype=torch.float64, requires_grad=True)
    x = fixed_point(lambda x, z: 0.3 * of(Once, x) + z, torch.zeros(1, 1, dtype=torch.float64), z).value
    (gradient,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(gradient, 1 / (1 - 0.6 * x.detach()), rtol=1e-6, atol=0)


def relu_network(x: Tensor, z: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 4000, generator=generator).to(x)
    return 1e-3 * (x @ weight).relu().sum(-1) + 0.5 * (x - z).square().sum(-1)


RIGHT: dict[str, Energy] = {
    "relu at 0": lambda x, z: x.relu().square().sum(-1) + ridge(x, z),
    "abs": lambda x, z: x.abs().sum(-1) + ridge(x, z),
    "huber": lambda x, z: nn.functional.huber_loss(x, z, reduction="none").sum(-1) + 0.1 * ridge(x, z),
    "relu network": relu_network,
    "float32 inside": lambda x, z: ((x.float() - z.float()).cosh().sum(-1) + 100.0).to(x.dtype),
    "rounding": lambda x, z: 1e12 + (x - z).square().sum(-1),
    "steep": lambda x, z: 1e8 * (x - z).square().sum(-1) + x.pow(4).sum(-1),
    "scaled": lambda x, z: 1e-20 * ((x - z).cosh().sum(-1)),
    "logarithm": lambda x, z: (x - 1e-6 * (x.abs() + 1e-9).log()).square().sum(-1) + ridge(x, z),
    "oscillating": lambda x, z: (1e4 * x).cos().sum(-1) + ridge(x, z),
    "linear": lambda x, z: (x * z).sum(-1),
    "sorted": lambda x, z: (x.sort(-1).values - z.sort(-1).values).square().sum(-1),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kinks_noise_and_curvature_raise_no_alarm(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        z = torch.randn(3, 2, dtype=dtype)
        for start in (torch.zeros(3, 2, dtype=dtype), 1e-6 * z, 100 * z):
            curvature._known.clear()
            minimize(RIGHT[name], start, z, on_failure="ignore", termination=NOTHING)


NOTHING = Termination(max_steps=0)


def test_each_energy_is_checked_once() -> None:
    calls: list[int] = []

    class Counted(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            calls.append(len(x))
            return (x - z).square().sum(-1)

    energy, z = Counted(), torch.ones(2, 3)
    counts = []
    for _ in range(3):
        calls.clear()
        minimize(energy, torch.zeros(2, 3), z)
        counts.append(len(calls))
    assert counts[0] - counts[1] == 3  # two gradients and one product
    assert counts[1] == counts[2]

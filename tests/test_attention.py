"""Attention inside an energy or a map: derivatives of every order, and PyTorch's choice of kernels left as it was."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from energynet import FPI_GD, ImplicitAdjoint, UnrolledAdjoint, fixed_point, gradient, minimize
from energynet._torch.attention import allowed_kernels, twice_differentiable
from energynet.engine.root_gradient import Adjoint
from energynet.testing import check_energy
from tests.problems import TIGHT


class Attention(nn.Module):
    """0.3 ⟨z, attention(x)⟩ + ½ ‖x‖², over tokens ``(B, T, 4)``."""

    def __init__(self, part: nn.Module | None) -> None:
        super().__init__()
        self.part = part

    def attended(self, x: Tensor) -> Tensor:
        if self.part is None:
            return nn.functional.scaled_dot_product_attention(x, x, x)
        if isinstance(self.part, nn.MultiheadAttention):
            found: Tensor = self.part(x, x, x, need_weights=False)[0]
            return found
        return torch.as_tensor(self.part(x))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.3 * (z * self.attended(x)).flatten(1).sum(-1) + 0.5 * x.square().flatten(1).sum(-1)


def make(name: str) -> Attention:
    torch.manual_seed(0)
    parts: dict[str, nn.Module | None] = {
        "function": None,
        "multihead": nn.MultiheadAttention(4, 2, batch_first=True),
        "encoder": nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True, norm_first=True),
    }
    return Attention(parts[name]).double()


def some_tokens() -> Tensor:
    return torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def directional(solve: Callable[[Tensor], Tensor], z: Tensor, d: Tensor, order: int) -> Tensor:
    """The derivative of that order of Σ sin x*(z + t d) in t, at 0."""
    value = solve(z).sin().sum()
    for _ in range(order):
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        value = (slope * d).sum()
    return value.detach()


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["function", pytest.param("multihead", marks=SLOW), pytest.param("encoder", marks=SLOW)])
def test_transformer_energy_to_third_order(name: str) -> None:
    energy, z = make(name), some_tokens().requires_grad_()
    d, h = z.detach().cos(), 1e-4

    def solve(z: Tensor) -> Tensor:
        value: Tensor = minimize(energy, 0.1 * d, z, termination=TIGHT).value
        return value

    for order in (1, 2, 3):
        ends = [directional(solve, (z + t * h * d).detach().requires_grad_(), d, order - 1) for t in (-1, 1)]
        torch.testing.assert_close(directional(solve, z, d, order), (ends[1] - ends[0]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_attention_without_gradients_in_transforms_and_in_check_energy() -> None:
    energy, z = make("function"), some_tokens()
    x = minimize(energy, torch.zeros_like(z), z, termination=TIGHT).value
    assert float(gradient(energy, x, z).abs().max()) < 1e-10
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # what the caller allows has no second derivative
        torch.testing.assert_close(minimize(energy, torch.zeros_like(z), z, termination=TIGHT).value, x, rtol=0, atol=1e-9)
    layer = FPI_GD(energy, start=torch.zeros_like, solver=None, termination=TIGHT)
    forward = torch.func.jacfwd(layer)(z)
    torch.testing.assert_close(forward, torch.func.jacrev(layer)(z), rtol=0, atol=1e-9)
    assert check_energy(energy, 0.1 * torch.cat([z, 2 * z]), torch.cat([z, z.cos()])).second_derivative_error < 1e-5


@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), UnrolledAdjoint()], ids=repr)
def test_second_derivatives_of_a_map_of_attention(adjoint: Adjoint) -> None:
    z = some_tokens().requires_grad_()

    def attend(x: Tensor, z: Tensor) -> Tensor:
        return 0.3 * nn.functional.scaled_dot_product_attention(x, x, x) + z

    def solve(z: Tensor) -> Tensor:
        value: Tensor = fixed_point(attend, torch.zeros_like(z), z, adjoint=adjoint, termination=TIGHT).value
        return value

    d, h = z.detach().cos(), 1e-4
    ends = [directional(solve, (z + t * h * d).detach().requires_grad_(), d, 1) for t in (-1, 1)]
    torch.testing.assert_close(directional(solve, z, d, 2), (ends[1] - ends[0]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_kernels_are_as_they_were() -> None:
    def fails(x: Tensor) -> Tensor:
        if allowed_kernels() is not None and x.requires_grad and x.sum() != 0:
            raise KeyError("on purpose")
        return x.square().sum(-1)

    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            before = allowed_kernels()
            minimize(make("function"), torch.zeros(1, 3, 4, dtype=torch.float64), some_tokens())
            with pytest.raises(KeyError):
                gradient(fails, torch.ones(1, 2))
            assert allowed_kernels() == before
    assert torch.backends.cuda.flash_sdp_enabled()


def test_threads_need_it_at_once() -> None:
    """Whoever leaves first does not take it from the other, and the last one puts back what was before."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with twice_differentiable:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with twice_differentiable:
        pass
    assert not torch.backends.cuda.flash_sdp_enabled()
    leave.set()
    thread.join()
    assert torch.backends.cuda.flash_sdp_enabled()

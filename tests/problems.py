"""Test problems with exact answers, in float64."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from energynet import Energy, Termination, gradient

TIGHT = Termination(atol=1e-12, rtol=1e-12, max_steps=20_000)


class LogEnergy(Energy):
    """θ exp(x) − z x, with x* = log(z/θ): every derivative has a closed form."""

    def __init__(self, theta: float = 0.7) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def start(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:  # (B, n), (B, n)
        return (self.theta * x.exp() - z * x).sum(-1)


class LogCosh(Energy):
    """½‖A x − W z‖² + 0.1 Σ log cosh x + μ/2 ‖x‖², no closed form: compared with `newton_reference`."""

    def __init__(self, n: int = 4, m: int = 6, ridge: float = 0.5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.A = nn.Parameter(0.4 * torch.randn(m, n, dtype=torch.float64, generator=generator))
        self.W = nn.Parameter(torch.randn(m, 3, dtype=torch.float64, generator=generator))
        self.ridge = ridge

    @property
    def step_size(self) -> float:
        return float(1.8 / (torch.linalg.matrix_norm(self.A.detach(), 2) ** 2 + 0.1 + 2 * self.ridge))

    def start(self, z: Tensor) -> Tensor:
        return z.new_zeros(z.shape[0], self.A.shape[1])

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:  # (B, n), (B, 3)
        fit = 0.5 * (x @ self.A.mT - z @ self.W.mT).square().sum(-1)
        return fit + 0.1 * x.cosh().log().sum(-1) + 0.5 * self.ridge * x.square().sum(-1)


class EncodedLogCosh(LogCosh):
    """The same energy, its x-independent part computed once a solve."""

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        target = z @ self.W.mT
        return target @ self.A, 0.5 * target.square().sum(-1)

    def evaluate(self, x: Tensor, right: Tensor, constant: Tensor) -> Tensor:
        fit = 0.5 * (x @ self.A.mT).square().sum(-1) - (x * right).sum(-1) + constant
        return fit + 0.1 * x.cosh().log().sum(-1) + 0.5 * self.ridge * x.square().sum(-1)


class Contraction(nn.Module):
    """tanh(x R + z W + b) with ‖R‖ = rate: not symmetric."""

    def __init__(self, n: int = 4, rate: float = 0.6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        R = torch.randn(n, n, dtype=torch.float64, generator=generator)
        self.R = nn.Parameter(rate * R / torch.linalg.matrix_norm(R, 2))
        self.W = nn.Parameter(torch.randn(3, n, dtype=torch.float64, generator=generator))
        self.b = nn.Parameter(0.1 * torch.randn(n, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # (B, n), (B, 3) -> (B, n)
        return torch.tanh(x @ self.R + z @ self.W + self.b)


@dataclasses.dataclass
class Newton:
    """The root of F by dense Newton steps; the last ones carry the graph, so derivatives are exact to order 3."""

    optimality: Callable[[Tensor], Tensor]  # (n,) -> (n,)

    def root(self, x: Tensor) -> Tensor:
        jacobian = torch.func.jacrev(self.optimality)
        with torch.no_grad():
            for _ in range(50):
                x = x - torch.linalg.solve(jacobian(x), self.optimality(x))
        for _ in range(3):  # each doubles the order to which the graph is right
            x = x - torch.linalg.solve(jacobian(x), self.optimality(x))
        return x


def newton_minimum(energy: Callable[..., Tensor], x: Tensor, z: Tensor) -> Tensor:  # (n,), (k,) -> (n,)
    return Newton(lambda x: gradient(energy, x[None], z[None])[0]).root(x)


def newton_fixed_point(network: Callable[..., Tensor], x: Tensor, z: Tensor) -> Tensor:
    return Newton(lambda x: x - network(x[None], z[None])[0]).root(x)


def some_context(batch: int = 2, requires_grad: bool = False) -> Tensor:
    z = torch.randn(batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return z.requires_grad_(requires_grad)

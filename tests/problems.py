"""Test problems with exact answers, in float64."""

import dataclasses
import math
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
    """The same energy, its x-independent part computed once per solve."""

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
            for _ in range(12):
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


# The test functions of Moré, Garbow and Hillstrom, "Testing unconstrained optimization software",
# ACM TOMS 7 (1981), by their numbers (MGH 1 to 35), and Himmelblau's.


@dataclasses.dataclass(frozen=True)
class Classic:
    """One of the classic test functions, E(x) = Σ f_i(x)², with its standard start and its known least values."""

    name: str
    residuals: Callable[[Tensor], Tensor]  # (..., n) -> (..., m), batched over leading dimensions
    start: tuple[float, ...]  # the standard starting point
    minima: tuple[float, ...]  # known least values of E, the global one first; some local ones are reached at infinity only
    singular: bool = False  # whether the Hessian at a global minimizer is, to 1e-10 of its norm, if only by bad scaling

    def energy(self, x: Tensor) -> Tensor:  # (B, n) -> (B,)
        return self.residuals(x).square().sum(-1)


def numbers_like(x: Tensor, *numbers: float) -> Tensor:
    """The numbers, in the dtype and on the device of x."""
    return torch.tensor(numbers, dtype=x.dtype, device=x.device)


def count_like(x: Tensor, m: int) -> Tensor:
    """1, ..., m, in the dtype and on the device of x."""
    return torch.arange(1, m + 1, dtype=x.dtype, device=x.device)


def coefficients(x: Tensor) -> tuple[Tensor, ...]:  # (..., n) -> n of (..., 1)
    """The coordinates of x, ready to be broadcast against the m data points of a fit."""
    return x[..., None].unbind(-2)


def rosenbrock(x: Tensor) -> Tensor:
    """MGH 1, and the extended form, MGH 21, for an even n > 2."""
    odd, even = x[..., ::2], x[..., 1::2]
    return torch.cat((10 * (even - odd.square()), 1 - odd), -1)


def freudenstein_roth(x: Tensor) -> Tensor:
    """MGH 2."""
    x1, x2 = x.unbind(-1)
    return torch.stack((-13 + x1 + ((5 - x2) * x2 - 2) * x2, -29 + x1 + ((x2 + 1) * x2 - 14) * x2), -1)


def powell_badly_scaled(x: Tensor) -> Tensor:
    """MGH 3."""
    x1, x2 = x.unbind(-1)
    return torch.stack((1e4 * x1 * x2 - 1, (-x1).exp() + (-x2).exp() - 1.0001), -1)


def brown_badly_scaled(x: Tensor) -> Tensor:
    """MGH 4."""
    x1, x2 = x.unbind(-1)
    return torch.stack((x1 - 1e6, x2 - 2e-6, x1 * x2 - 2), -1)


def beale(x: Tensor) -> Tensor:
    """MGH 5."""
    x1, x2 = x.unbind(-1)
    return torch.stack((1.5 - x1 * (1 - x2), 2.25 - x1 * (1 - x2**2), 2.625 - x1 * (1 - x2**3)), -1)


def jennrich_sampson(x: Tensor) -> Tensor:
    """MGH 6, m = 10."""
    x1, x2 = coefficients(x)
    i = count_like(x, 10)
    return 2 + 2 * i - (i * x1).exp() - (i * x2).exp()


def helical_valley(x: Tensor) -> Tensor:
    """MGH 7."""
    x1, x2, x3 = x.unbind(-1)
    # MGH take θ from (-¼, ¾): their cut is the negative x2 axis, not that of atan2(x2, x1), on which the start lies
    theta = 0.25 + torch.atan2(-x1, x2) / (2 * math.pi)
    return torch.stack((10 * (x3 - 10 * theta), 10 * (torch.hypot(x1, x2) - 1), x3), -1)


def bard(x: Tensor) -> Tensor:
    """MGH 8."""
    x1, x2, x3 = coefficients(x)
    y = numbers_like(x, 0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.1, 4.39)
    u = count_like(x, 15)
    return y - (x1 + u / ((16 - u) * x2 + torch.minimum(u, 16 - u) * x3))


def gaussian(x: Tensor) -> Tensor:
    """MGH 9."""
    x1, x2, x3 = coefficients(x)
    half = (0.0009, 0.0044, 0.0175, 0.054, 0.1295, 0.242, 0.3521)
    t = (8 - count_like(x, 15)) / 2
    return x1 * (-x2 * (t - x3).square() / 2).exp() - numbers_like(x, *half, 0.3989, *reversed(half))


def meyer(x: Tensor) -> Tensor:
    """MGH 10."""
    x1, x2, x3 = coefficients(x)
    y = (34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872)
    return x1 * (x2 / (45 + 5 * count_like(x, 16) + x3)).exp() - numbers_like(x, *y)


def gulf(x: Tensor) -> Tensor:
    """MGH 11, m = 99; y_i - x2, not the misprinted y_i m i x2."""
    x1, x2, x3 = coefficients(x)
    t = count_like(x, 99) / 100
    y = 25 + (-50 * t.log()) ** (2 / 3)
    return (-((y - x2).abs() ** x3) / x1).exp() - t


def box(x: Tensor) -> Tensor:
    """MGH 12, m = 10."""
    x1, x2, x3 = coefficients(x)
    t = count_like(x, 10) / 10
    return (-t * x1).exp() - (-t * x2).exp() - x3 * ((-t).exp() - (-10 * t).exp())


def powell_singular(x: Tensor) -> Tensor:
    """MGH 13, and the extended form, MGH 22, for n = 8, 12, ..."""
    x1, x2, x3, x4 = (x[..., k::4] for k in range(4))
    slopes = (x1 + 10 * x2, math.sqrt(5) * (x3 - x4))
    return torch.cat((*slopes, (x2 - 2 * x3).square(), math.sqrt(10) * (x1 - x4).square()), -1)


def wood(x: Tensor) -> Tensor:
    """MGH 14."""
    x1, x2, x3, x4 = x.unbind(-1)
    valleys = (10 * (x2 - x1**2), 1 - x1, math.sqrt(90) * (x4 - x3**2), 1 - x3)
    return torch.stack((*valleys, math.sqrt(10) * (x2 + x4 - 2), (x2 - x4) / math.sqrt(10)), -1)


def kowalik_osborne(x: Tensor) -> Tensor:
    """MGH 15."""
    x1, x2, x3, x4 = coefficients(x)
    y = numbers_like(x, 0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
    u = numbers_like(x, 4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)
    return y - x1 * (u**2 + u * x2) / (u**2 + u * x3 + x4)


def brown_dennis(x: Tensor) -> Tensor:
    """MGH 16, m = 20."""
    x1, x2, x3, x4 = coefficients(x)
    t = count_like(x, 20) / 5
    return (x1 + t * x2 - t.exp()).square() + (x3 + x4 * t.sin() - t.cos()).square()


OSBORNE1 = (
    *(0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603),
    *(0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411),
    0.406,
)


def osborne1(x: Tensor) -> Tensor:
    """MGH 17."""
    x1, x2, x3, x4, x5 = coefficients(x)
    t = 10 * (count_like(x, 33) - 1)
    return numbers_like(x, *OSBORNE1) - (x1 + x2 * (-t * x4).exp() + x3 * (-t * x5).exp())


def biggs_exp6(x: Tensor) -> Tensor:
    """MGH 18, m = 13."""
    x1, x2, x3, x4, x5, x6 = coefficients(x)
    t = count_like(x, 13) / 10
    y = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return x3 * (-t * x1).exp() - x4 * (-t * x2).exp() + x6 * (-t * x5).exp() - y


OSBORNE2 = (
    *(1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606),
    *(0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423),
    *(0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668),
    *(0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098),
    0.054,
)


def osborne2(x: Tensor) -> Tensor:
    """MGH 19."""
    t = (count_like(x, 65)[:, None] - 1) / 10
    height, rate, center = x[..., None, 1:4], x[..., None, 5:8], x[..., None, 8:11]
    peaks = (height * (-(t - center).square() * rate).exp()).sum(-1)
    return numbers_like(x, *OSBORNE2) - (x[..., :1] * (-t[:, 0] * x[..., 4:5]).exp() + peaks)


def watson(x: Tensor) -> Tensor:
    """MGH 20."""
    j = count_like(x, x.shape[-1])
    t = count_like(x, 29)[:, None] / 29
    slope, value = x[..., 1:] @ (j[:-1] * t ** (j[:-1] - 1)).mT, x @ (t ** (j - 1)).mT
    return torch.cat((slope - value.square() - 1, x[..., :1], x[..., 1:2] - x[..., :1].square() - 1), -1)


def penalty1(x: Tensor) -> Tensor:
    """MGH 23."""
    return torch.cat((math.sqrt(1e-5) * (x - 1), x.square().sum(-1, keepdim=True) - 0.25), -1)


def penalty2(x: Tensor) -> Tensor:
    """MGH 24."""
    n = x.shape[-1]
    growth, exact = (x / 10).exp(), (count_like(x, n) / 10).exp()
    pairs = growth[..., 1:] + growth[..., :-1] - (exact[1:] + exact[:-1])
    small = math.sqrt(1e-5) * torch.cat((pairs, growth[..., 1:] - math.exp(-0.1)), -1)
    return torch.cat((x[..., :1] - 0.2, small, x.square() @ count_like(x, n).flip(0)[:, None] - 1), -1)


def variably_dimensioned(x: Tensor) -> Tensor:
    """MGH 25."""
    tail = (x - 1) @ count_like(x, x.shape[-1])[:, None]
    return torch.cat((x - 1, tail, tail.square()), -1)


def trigonometric(x: Tensor) -> Tensor:
    """MGH 26."""
    cosine = x.cos()
    return (1 - cosine).sum(-1, keepdim=True) + count_like(x, x.shape[-1]) * (1 - cosine) - x.sin()


def brown_almost_linear(x: Tensor) -> Tensor:
    """MGH 27."""
    n = x.shape[-1]
    return torch.cat((x[..., :-1] + x.sum(-1, keepdim=True) - (n + 1), x.prod(-1, keepdim=True) - 1), -1)


def between_zeros(x: Tensor) -> Tensor:  # (..., n) -> (..., n + 2)
    """x with the zero boundary values x_0 and x_{n+1}."""
    return nn.functional.pad(x, (1, 1))


def discrete_boundary_value(x: Tensor) -> Tensor:
    """MGH 28."""
    h = 1 / (x.shape[-1] + 1)
    padded = between_zeros(x)
    cubic = (x + h * count_like(x, x.shape[-1]) + 1) ** 3
    return 2 * x - padded[..., :-2] - padded[..., 2:] + h**2 * cubic / 2


def discrete_integral_equation(x: Tensor) -> Tensor:
    """MGH 29."""
    h = 1 / (x.shape[-1] + 1)
    t = h * count_like(x, x.shape[-1])
    kernel = torch.minimum(t, t[:, None]) * (1 - torch.maximum(t, t[:, None]))
    return x + h * ((x + t + 1) ** 3 @ kernel) / 2


def broyden_tridiagonal(x: Tensor) -> Tensor:
    """MGH 30."""
    padded = between_zeros(x)
    return (3 - 2 * x) * x - padded[..., :-2] - 2 * padded[..., 2:] + 1


def broyden_banded(x: Tensor) -> Tensor:
    """MGH 31: five neighbors below and one above."""
    every = x.new_ones(x.shape[-1], x.shape[-1])
    band = every.triu(-5).tril(1) - every.triu().tril()
    return x * (2 + 5 * x**2) + 1 - (x * (1 + x)) @ band.mT


def linear_full_rank(x: Tensor) -> Tensor:
    """MGH 32, m = 2n."""
    n = x.shape[-1]
    return nn.functional.pad(x, (0, n)) - x.sum(-1, keepdim=True) / n - 1


def linear_rank1(x: Tensor) -> Tensor:
    """MGH 33, m = 2n."""
    j = count_like(x, x.shape[-1])
    return (x @ j[:, None]) * count_like(x, 2 * x.shape[-1]) - 1


def linear_rank1_with_zeros(x: Tensor) -> Tensor:
    """MGH 34, m = 2n: columns 1 and n, and rows 1 and m, are zero."""
    n = x.shape[-1]
    j = count_like(x, n)[1:-1]
    inner = (x[..., 1:-1] @ j[:, None]) * count_like(x, 2 * n - 2) - 1
    return nn.functional.pad(inner, (1, 1), value=-1.0)


def chebyquad(x: Tensor) -> Tensor:
    """MGH 35, m = n."""
    y = 2 * x - 1
    polynomials = [torch.ones_like(y), y]  # the recurrence holds outside [-1, 1] too, where cos(i arccos y) does not
    for _ in x.unbind(-1)[1:]:
        polynomials.append(2 * y * polynomials[-1] - polynomials[-2])
    integrals = [0.0 if i % 2 else -1 / (i**2 - 1) for i in range(1, len(polynomials))]
    return torch.stack(polynomials[1:], -1).mean(-2) - numbers_like(x, *integrals)


def himmelblau(x: Tensor) -> Tensor:
    """Himmelblau, "Applied nonlinear programming" (1972)."""
    x1, x2 = x.unbind(-1)
    return torch.stack((x1**2 + x2 - 11, x1 + x2**2 - 7), -1)


PARABOLA = tuple(j * (j - 11) / 121 for j in range(1, 11))  # t (t - 1), the start of MGH 28 and 29

CLASSICS: tuple[Classic, ...] = (
    Classic("Rosenbrock", rosenbrock, (-1.2, 1.0), (0.0,)),
    Classic("Freudenstein and Roth", freudenstein_roth, (0.5, -2.0), (0.0, 48.98425368)),
    Classic("Powell badly scaled", powell_badly_scaled, (0.0, 1.0), (0.0, 1.040294004), singular=True),
    Classic("Brown badly scaled", brown_badly_scaled, (1.0, 1.0), (0.0,), singular=True),
    Classic("Beale", beale, (1.0, 1.0), (0.0,)),
    Classic("Jennrich and Sampson", jennrich_sampson, (0.3, 0.4), (124.3621824, 259.5801901)),
    Classic("helical valley", helical_valley, (-1.0, 0.0, 0.0), (0.0,)),
    Classic("Bard", bard, (1.0, 1.0, 1.0), (8.214877307e-3, 17.42869333)),
    Classic("Gaussian", gaussian, (0.4, 1.0, 0.0), (1.127932770e-8,)),
    Classic("Meyer", meyer, (0.02, 4000.0, 250.0), (87.94585517,), singular=True),
    Classic("Gulf research and development", gulf, (5.0, 2.5, 0.15), (0.0,)),
    Classic("Box three-dimensional", box, (0.0, 10.0, 20.0), (0.0, 7.558874075e-2), singular=True),
    Classic("Powell singular", powell_singular, (3.0, -1.0, 0.0, 1.0), (0.0,), singular=True),
    Classic("Wood", wood, (-3.0, -1.0, -3.0, -1.0), (0.0,)),
    Classic("Kowalik and Osborne", kowalik_osborne, (0.25, 0.39, 0.415, 0.39), (3.075056038e-4, 1.027343049e-3)),
    Classic("Brown and Dennis", brown_dennis, (25.0, 5.0, -5.0, -1.0), (85822.20163,)),
    Classic("Osborne 1", osborne1, (0.5, 1.5, -1.0, 0.01, 0.02), (5.464894697e-5,)),
    Classic("Biggs EXP6", biggs_exp6, (1.0, 2.0, 1.0, 1.0, 1.0, 1.0), (0.0, 5.655649925e-3, 0.3063667726)),
    Classic("Osborne 2", osborne2, (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5), (4.013773629e-2, 1.789813587)),
    Classic("Watson", watson, (0.0,) * 6, (2.287670054e-3,)),
    Classic("extended Rosenbrock", rosenbrock, (-1.2, 1.0) * 5, (0.0,)),
    Classic("extended Powell singular", powell_singular, (3.0, -1.0, 0.0, 1.0) * 3, (0.0,), singular=True),
    Classic("penalty I", penalty1, (1.0, 2.0, 3.0, 4.0), (2.249977501e-5,)),
    Classic("penalty II", penalty2, (0.5,) * 4, (9.376293007e-6,)),
    Classic("variably dimensioned", variably_dimensioned, tuple(1 - j / 10 for j in range(1, 11)), (0.0,)),
    Classic("trigonometric", trigonometric, (0.1,) * 10, (0.0, 4.473565813e-7, 2.795056122e-5, 4.218633888e-5)),
    Classic("Brown almost-linear", brown_almost_linear, (0.5,) * 10, (0.0, 0.9179000998, 1.0)),
    Classic("discrete boundary value", discrete_boundary_value, PARABOLA, (0.0,)),
    Classic("discrete integral equation", discrete_integral_equation, PARABOLA, (0.0,)),
    Classic("Broyden tridiagonal", broyden_tridiagonal, (-1.0,) * 10, (0.0, 0.397373469, 1.028652036, 1.051226188, 1.360255905)),
    Classic("Broyden banded", broyden_banded, (-1.0,) * 10, (0.0, 2.680219921, 3.057278432)),
    Classic("linear, full rank", linear_full_rank, (1.0,) * 10, (10.0,)),
    Classic("linear, rank 1", linear_rank1, (1.0,) * 10, (190 / 41,), singular=True),
    Classic("linear, rank 1 with zeros", linear_rank1_with_zeros, (1.0,) * 10, (227 / 37,), singular=True),
    Classic("Chebyquad", chebyquad, tuple(j / 9 for j in range(1, 9)), (3.516873726e-3,)),
    Classic("Himmelblau", himmelblau, (1.0, 1.0), (0.0,)),
)


# Convex energies of six variables, whose curvature at a start of zeros says little of that on the way: four samples each.
_GENERATOR = torch.Generator().manual_seed(0)
_A = torch.randn(4, 9, 6, dtype=torch.float64, generator=_GENERATOR)
_B = torch.randn(4, 9, dtype=torch.float64, generator=_GENERATOR)


def _fit(x: Tensor) -> Tensor:
    return (_A @ x[..., None])[..., 0]


CONVEX: dict[str, Callable[[Tensor], Tensor]] = {
    "least squares": lambda x: 0.5 * (_fit(x) - _B).square().sum(-1) + 0.05 * x.square().sum(-1),
    "condition 1e3": lambda x: 0.5 * (torch.logspace(-3, 0, 6, dtype=x.dtype) * (x - 1).square()).sum(-1),
    "log cosh": lambda x: torch.nn.functional.softplus(2 * (_fit(x) - _B)).sum(-1) - _fit(x).sum(-1) + 0.05 * x.square().sum(-1),
    "cosh": lambda x: 0.1 * (x - 3).cosh().sum(-1) + 0.5 * (_fit(x) - _B).square().sum(-1),
    "exponential": lambda x: (x.exp() - 5 * x).sum(-1),
    "Poisson": lambda x: (_fit(x).exp() - _fit(x) * _B.exp().round()).sum(-1) + 0.1 * x.square().sum(-1),
    "quartic": lambda x: (x - 2).pow(4).sum(-1) + 0.1 * x.square().sum(-1),
    "Huber": lambda x: torch.nn.functional.huber_loss(x, 5 + 0 * x, reduction="none").sum(-1) + 0.01 * x.square().sum(-1),
    "pseudo-Huber": lambda x: (1 + (x - 30).square()).sqrt().sum(-1),
    "logistic": lambda x: torch.nn.functional.softplus(_fit(x)).sum(-1) - (_fit(x) * (_B > 0)).sum(-1) + 0.1 * x.square().sum(-1),
    "soft maximum": lambda x: torch.logsumexp(10 * _fit(x), -1) / 10 + 0.05 * (x - 1).square().sum(-1),
}  # fmt: skip

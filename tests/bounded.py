"""Problems with bounds, for tests and benchmarks, and SciPy's L-BFGS-B on them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy
import scipy.optimize
import torch
from torch import Tensor

Energy = Callable[..., Tensor]


class Bounded(NamedTuple):
    """min E(x, z) for lower ≤ x ≤ upper, all ``(B, n)`` in float64, z one number per sample ``(B, 1)``, of value 0."""

    energy: Energy
    lower: Tensor
    upper: Tensor
    start: Tensor

    @property
    def context(self) -> Tensor:
        return torch.zeros_like(self.start[:, :1])


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _full(size: int, n: int, value: float) -> Tensor:
    return torch.full((size, n), value, dtype=torch.float64)


def arm(generator: torch.Generator, size: int = 4, n: int = 7) -> Bounded:
    """Angles of n links of length 1 in the plane, whose end shall reach a target; joint limits of 0.6 rad."""
    target = 6 * _rand(generator, size, 2) - 1

    def energy(x: Tensor, z: Tensor) -> Tensor:
        angle = x.cumsum(-1)
        end = torch.stack([angle.cos().sum(-1), angle.sin().sum(-1)], -1)
        return (end - target - z).square().sum(-1) + 1e-3 * x.square().sum(-1)

    return Bounded(energy, _full(size, n, -0.6), _full(size, n, 0.6), _full(size, n, 0.1))


def quadratic(generator: torch.Generator, size: int = 2, n: int = 50, condition: float = 1e4) -> Bounded:
    """Made from its answer, at which half of the bounds hold with multipliers that are not tiny."""
    Q = torch.linalg.qr(_randn(generator, size, n, n)).Q
    H = Q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64) @ Q.mT
    answer, side, multiplier = _randn(generator, size, n), _rand(generator, size, n), 1 + _rand(generator, size, n)
    at_lower, at_upper = side < 0.25, (side > 0.25) & (side < 0.5)
    slope = torch.where(at_lower, multiplier, torch.where(at_upper, -multiplier, 0))
    lower, upper = torch.where(at_lower, answer, answer - 1), torch.where(at_upper, answer, answer + 1)
    right = (H @ answer.unsqueeze(-1)).squeeze(-1) - slope

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (x * (H @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - ((right + z) * x).sum(-1)

    return Bounded(energy, lower, upper, torch.zeros_like(answer))


def nonnegative_least_squares(generator: torch.Generator, size: int = 3, m: int = 60, n: int = 40) -> Bounded:
    A = _rand(generator, size, m, n)
    y = (A @ _randn(generator, size, n, 1).clamp_min(0)).squeeze(-1) + 0.1 * _randn(generator, size, m)

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * ((A @ x.unsqueeze(-1)).squeeze(-1) - y - z).square().sum(-1)

    return Bounded(energy, _full(size, n, 0), _full(size, n, math.inf), _full(size, n, 0.5))


def logistic_regression(generator: torch.Generator, size: int = 3, m: int = 200, n: int = 30) -> Bounded:
    A = _randn(generator, size, m, n)
    label = ((A @ (2 * _randn(generator, size, n, 1))).squeeze(-1) + _randn(generator, size, m) > 0).double()

    def energy(x: Tensor, z: Tensor) -> Tensor:
        score = (A @ x.unsqueeze(-1)).squeeze(-1) + z
        return (torch.nn.functional.softplus(score) - label * score).sum(-1)

    return Bounded(energy, _full(size, n, -0.5), _full(size, n, 0.5), _full(size, n, 0))


def rosenbrock(generator: torch.Generator, size: int = 3, n: int = 10) -> Bounded:
    """Every third coordinate below its unconstrained answer; several local minima."""
    upper = _full(size, n, 1.5)
    upper[:, ::3] = 0.8

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 + z - x[..., :-1]) ** 2).sum(-1)

    return Bounded(energy, _full(size, n, -1.5), upper, 2 * _rand(generator, size, n) - 1.5)


PROBLEMS: dict[str, Callable[[torch.Generator], Bounded]] = {
    "arm": arm,
    "quadratic": quadratic,
    "nonnegative least squares": nonnegative_least_squares,
    "logistic regression": logistic_regression,
    "Rosenbrock": rosenbrock,
}


def problem(name: str, seed: int = 0) -> Bounded:
    return PROBLEMS[name](torch.Generator().manual_seed(seed))


class Found(NamedTuple):
    x: Tensor  # (B, n)
    points: list[Tensor]  # where each sample was evaluated, (T, n) of different T


def evaluations(points: Tensor, answer: Tensor, tolerance: float = 1e-6) -> int:
    """How many of the points, ``(T, n)``, until one is that near to the answer; infinitely many if none is."""
    near = (points - answer).norm(dim=-1) <= tolerance * (1 + answer.norm())
    return int(near.int().argmax()) + 1 if near.any() else 10**9


def by_scipy(problem: Bounded, tolerance: float = 1e-9) -> Found:
    """Sample by sample, until the projected gradient is small or differences of energies are noise."""
    xs, points = [], []
    for i, (start, lower, upper) in enumerate(zip(problem.start, problem.lower, problem.upper)):
        points.append([])

        def value_and_gradient(x: numpy.ndarray, i: int = i) -> tuple[float, numpy.ndarray]:
            points[i].append(torch.tensor(x))
            rows = problem.start.clone()
            rows[i] = torch.from_numpy(x)
            rows.requires_grad_()
            energy = problem.energy(rows, problem.context)[i]
            (gradient,) = torch.autograd.grad(energy, rows)
            return energy.item(), gradient[i].numpy()

        found = scipy.optimize.minimize(
            value_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", bounds=scipy.optimize.Bounds(lower, upper),
            options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 0.0, "gtol": tolerance},
        )  # fmt: skip
        xs.append(torch.from_numpy(found.x))
    return Found(torch.stack(xs), [torch.stack(p) for p in points])


def active(problem: Bounded, x: Tensor) -> Tensor:
    """−1 at the lower bound, 1 at the upper one, else 0: exactly."""
    return (x >= problem.upper).int() - (x <= problem.lower).int()


def polished(problem: Bounded, x: Tensor) -> Tensor:
    """Newton steps in the coordinates between their bounds, with the dense Hessian: exact where these are the right ones."""
    for _ in range(5):
        free = active(problem, x) == 0
        slope = torch.func.grad(lambda x: problem.energy(x, problem.context).sum())(x)
        H = hessian(problem, x, free)
        x = x - torch.linalg.solve(H, torch.where(free, slope, 0))
    return x


def hessian(problem: Bounded, x: Tensor, free: Tensor) -> Tensor:  # (B, n, n)
    """Of each sample, with the identity in the rows and columns that are not free."""
    whole = torch.func.jacrev(torch.func.grad(lambda x: problem.energy(x, problem.context).sum()))(x)
    own = whole.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    both = free.unsqueeze(-1) & free.unsqueeze(-2)
    return torch.where(both, own, torch.eye(x.shape[1], dtype=x.dtype))

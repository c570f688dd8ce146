"""Hypothesis strategies for property tests: random energies and contractions with known constants.

Example:
    >>> from hypothesis import given, settings
    >>> from energynet import minimize
    >>> from energynet.testing.strategies import energies
    >>> @settings(max_examples=5, deadline=None)
    ... @given(energies())
    ... def test_converges(case):
    ...     solution = minimize(case.energy, case.x0, *case.context, step_size=case.step_size)
    ...     assert bool(solution.converged.all())
    >>> test_converges()
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from energynet._torch.tree import Layout
from energynet.energy import Energy

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError('energynet.testing.strategies needs hypothesis. Install it: pip install "energynet[test]"') from error

# ------------------------------------------------------------------------------------------------- energies


class Quadratic(Energy):
    """½ xᵀ A x − (W z)ᵀ x, where the eigenvalues of A lie between μ and L."""

    def __init__(self, n: int, d: int, mu: float, top: float, draw: torch.Generator) -> None:
        super().__init__()
        q, eigenvalues = _orthogonal(n, draw), torch.linspace(mu, top, n, dtype=torch.float64)
        self.A = nn.Parameter(q @ torch.diag(eigenvalues) @ q.T)
        self.W = nn.Parameter(_normal(draw, n, d))

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:  # (B, n), (B, d) -> (B,)
        return 0.5 * ((x @ self.A) * x).sum(-1) - ((z @ self.W.T) * x).sum(-1)


class LogCosh(Energy):
    """½ μ ‖x‖² + Σ log cosh(K x + W z); the Hessian lies between μ and μ + ‖K‖²."""

    def __init__(self, n: int, d: int, mu: float, top: float, draw: torch.Generator) -> None:
        super().__init__()
        self.mu = mu
        self.K = nn.Parameter(_normed(draw, n + 1, n) * (top - mu) ** 0.5)
        self.W = nn.Parameter(_normal(draw, n + 1, d))

    def encode(self, z: Tensor) -> Tensor:  # (B, d) -> (B, n + 1)
        return z @ self.W.T

    def evaluate(self, x: Tensor, shift: Tensor) -> Tensor:  # (B, n), (B, n + 1) -> (B,)
        y = x @ self.K.T + shift
        return 0.5 * self.mu * x.square().sum(-1) + (y + nn.functional.softplus(-2 * y)).sum(-1)


class SoftplusNetwork(Energy):
    """½ μ ‖x‖² + Σ a softplus(K x + W z + b), 0 < a ≤ 4; the Hessian lies between μ and μ + ‖K‖²."""

    def __init__(self, n: int, d: int, mu: float, top: float, draw: torch.Generator) -> None:
        super().__init__()
        self.mu = mu
        self.K = nn.Parameter(_normed(draw, 2 * n, n) * (top - mu) ** 0.5)
        self.W, self.b = nn.Parameter(_normal(draw, 2 * n, d)), nn.Parameter(_normal(draw, 2 * n))
        self.a = nn.Parameter(_normal(draw, 2 * n))

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:  # (B, n), (B, d) -> (B,)
        hidden = nn.functional.softplus(x @ self.K.T + z @ self.W.T + self.b)
        return 0.5 * self.mu * x.square().sum(-1) + (4 * torch.sigmoid(self.a) * hidden).sum(-1)


class Quartic(Energy):
    """½ μ ‖x‖² + ¼ q Σ (Q x)⁴ − (W z)ᵀ Q x, Q orthogonal; q is so small that the Hessian stays below L along any descent."""

    def __init__(self, n: int, d: int, mu: float, top: float, draw: torch.Generator) -> None:
        super().__init__()
        self.mu = mu
        self.Q = nn.Parameter(_orthogonal(n, draw))
        self.W = nn.Parameter(_normed(draw, n, d) * mu)
        # |W z| ≤ μ √d for |z| ≤ 1, and |x0| ≤ 1, so with γ ≤ 1/L no coordinate leaves [−r, r]. Half of L remains as a margin.
        radius = 1.5 * max(d, n) ** 0.5
        self.q = nn.Parameter(torch.tensor((top - mu) / (6 * radius**2), dtype=torch.float64))

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:  # (B, n), (B, d) -> (B,)
        y = x @ self.Q.T
        return 0.5 * self.mu * x.square().sum(-1) + 0.25 * self.q * y.pow(4).sum(-1) - ((z @ self.W.T) * y).sum(-1)


_ENERGIES = (Quadratic, LogCosh, SoftplusNetwork, Quartic)

# ------------------------------------------------------------------------------------------------- contractions


class Affine(nn.Module):
    """ρ K x + W z, ‖K‖ = 1."""

    def __init__(self, n: int, d: int, rate: float, draw: torch.Generator) -> None:
        super().__init__()
        self.K, self.W = nn.Parameter(rate * _normed(draw, n, n)), nn.Parameter(_normal(draw, n, d))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # (B, n), (B, d) -> (B, n)
        return x @ self.K.T + z @ self.W.T


class TanhCell(Affine):
    """tanh(ρ K x + W z), ‖K‖ = 1."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(super().forward(x, z))


class TwoLayers(nn.Module):
    """ρ V sin(U x + W z) + b, ‖U‖ = ‖V‖ = 1."""

    def __init__(self, n: int, d: int, rate: float, draw: torch.Generator) -> None:
        super().__init__()
        self.U, self.W = nn.Parameter(_normed(draw, n + 2, n)), nn.Parameter(_normal(draw, n + 2, d))
        self.V, self.b = nn.Parameter(rate * _normed(draw, n, n + 2)), nn.Parameter(_normal(draw, n))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # (B, n), (B, d) -> (B, n)
        return torch.sin(x @ self.U.T + z @ self.W.T) @ self.V.T + self.b


_NETWORKS = (Affine, TanhCell, TwoLayers)

# ------------------------------------------------------------------------------------------------- pytrees


class Pair(NamedTuple):
    """A named tuple that serves as x."""

    first: Any
    second: Any


FOLDS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "dict": lambda parts: {f"part {k}": part for k, part in enumerate(parts)},
    "namedtuple": lambda parts: Pair(parts[0], list(parts[1:])),
    "nested": lambda parts: {"head": parts[0], "tail": ({"rest": list(parts[1:])},)},
}


class FoldedEnergy(Energy):
    """Applies an energy on ``(B, n)`` to a pytree."""

    def __init__(self, core: Energy) -> None:
        super().__init__()
        self.core = core

    def encode(self, *context: Any) -> Any:
        return self.core.encode(*context)

    def evaluate(self, x: Any, *code: Any) -> Tensor:
        return self.core.evaluate(Layout.of(x, 1).ravel(x), *code)


class FoldedNetwork(nn.Module):
    """Applies a network on ``(B, n)`` to a pytree."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Any, *context: Any) -> Any:
        layout = Layout.of(x, 1)
        return layout.unravel(self.core(layout.ravel(x), *context))


# ------------------------------------------------------------------------------------------------- cases


@dataclasses.dataclass(frozen=True)
class EnergyCase:
    """A strictly convex energy in float64 with its known constants.

    Args:
        energy: E(x, z) -> ``(B,)``.
        x0: a tensor ``(B, ...)`` or a pytree of such.
        context: ``(z,)``, z of shape ``(B, d)``.
        step_size: γ, a float, a 0-d tensor or ``(B,)``, with which gradient descent converges.
        mu: the smallest curvature, > 0.
        L: the largest curvature between x0 and the minimizer.
        core: the same energy for x as one matrix ``(B, n)``.
    """

    energy: Energy
    x0: Any
    context: tuple[Tensor, ...]
    step_size: float | Tensor
    mu: float
    L: float
    core: Energy

    @property
    def flat(self) -> Tensor:
        """x0 as one matrix ``(B, n)``."""
        return Layout.of(self.x0, 1).ravel(self.x0)


@dataclasses.dataclass(frozen=True)
class ContractionCase:
    """A contracting network in float64.

    Args:
        network: g(x, z) -> like x.
        x0: a tensor ``(B, ...)`` or a pytree of such.
        context: ``(z,)``, z of shape ``(B, d)``.
        rate: the Lipschitz constant of g in x, < 1.
        core: the same network for x as one matrix ``(B, n)``.
    """

    network: nn.Module
    x0: Any
    context: tuple[Tensor, ...]
    rate: float
    core: nn.Module

    @property
    def flat(self) -> Tensor:
        """x0 as one matrix ``(B, n)``."""
        return Layout.of(self.x0, 1).ravel(self.x0)


def batch_sizes(largest: int = 4) -> st.SearchStrategy[int]:
    """Batch sizes B ≥ 1."""
    return st.integers(1, largest)


def shapes(largest: int = 5) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Shapes, without the batch, of the tensors in x, with at most ``largest`` elements: ``((2,),)``, ``((), (1, 2))``."""
    one = st.one_of(st.just(()), st.tuples(st.integers(1, largest)), st.tuples(st.integers(1, 2), st.integers(1, 2)))
    return st.lists(one, min_size=1, max_size=3).map(tuple).filter(lambda s: sum(torch.Size(t).numel() for t in s) <= largest)


def step_sizes(mu: float, top: float, batch: int) -> st.SearchStrategy[float | Tensor]:
    """γ for curvatures between ``mu`` and ``top``, from half of the best 2/(μ + L) up to it; a float, 0-d or ``(batch,)``."""
    best = 2 / (mu + top)
    number = st.floats(0.5 * best, best)
    tensor = number.map(lambda g: torch.tensor(g, dtype=torch.float64))
    return st.one_of(number, tensor, st.lists(number, min_size=batch, max_size=batch).map(_column))


@st.composite
def points(draw: st.DrawFn, batch: int) -> Any:
    """Points x in [−1, 1]: a tensor ``(batch, ...)`` or a tuple, dict, named tuple or nested pytree of such."""
    chosen, random = draw(shapes()), draw(generators())
    parts = [2 * torch.rand(batch, *shape, generator=random, dtype=torch.float64) - 1 for shape in chosen]
    if len(parts) == 1 and draw(st.booleans()):
        return parts[0]
    return FOLDS[draw(st.sampled_from(sorted(FOLDS)))](parts)


@st.composite
def energies(draw: st.DrawFn, kinds: tuple[type[Any], ...] = _ENERGIES, condition: float = 8.0) -> EnergyCase:
    """Quadratics, log-cosh energies, and softplus networks and quartics with a ridge; condition number ≤ ``condition``."""
    batch, random = draw(batch_sizes()), draw(generators())
    x0, d = draw(points(batch)), draw(st.integers(1, 3))
    mu = draw(st.floats(0.5, 2.0))
    top = mu * draw(st.floats(1.5, condition))
    core = draw(st.sampled_from(kinds))(Layout.of(x0, 1).ravel(x0).shape[-1], d, mu, top, random)
    z = 2 * torch.rand(batch, d, generator=random, dtype=torch.float64) - 1
    energy = core if _is_matrix(x0) else FoldedEnergy(core)
    return EnergyCase(energy, x0, (z,), draw(step_sizes(mu, top, batch)), mu, top, core)


@st.composite
def contractions(draw: st.DrawFn, kinds: tuple[type[Any], ...] = _NETWORKS, largest: float = 0.8) -> ContractionCase:
    """Affine maps, tanh cells and two-layer networks with a Lipschitz constant of at most ``largest``."""
    batch, random = draw(batch_sizes()), draw(generators())
    x0, d, rate = draw(points(batch)), draw(st.integers(1, 3)), draw(st.floats(0.05, largest))
    core = draw(st.sampled_from(kinds))(Layout.of(x0, 1).ravel(x0).shape[-1], d, rate, random)
    z = 2 * torch.rand(batch, d, generator=random, dtype=torch.float64) - 1
    return ContractionCase(core if _is_matrix(x0) else FoldedNetwork(core), x0, (z,), rate, core)


def generators() -> st.SearchStrategy[torch.Generator]:
    """Seeded random generators."""
    return st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


def _is_matrix(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 2


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _normed(draw: torch.Generator, *shape: int) -> Tensor:
    """A matrix with the largest singular value 1."""
    matrix = _normal(draw, *shape)
    norm: Tensor = torch.linalg.matrix_norm(matrix, 2)
    return matrix / norm


def _orthogonal(n: int, draw: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(_normal(draw, n, n))[0]
    return q

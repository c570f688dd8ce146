"""Learning the parameters of constrained problems end to end, by `FPI_GD` with a prox and by cvxpylayers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from energynet import FPI_GD, Energy, Nesterov, Newton, Prox, Termination, minimize
from energynet.constraints import Box, Simplex

from .data import Data, Rows
from .solves import SolveLog
from .task import Column, Options, Rates, Rival, Task

EXACT = Termination(atol=0.0, rtol=1e-9, max_steps=5000)
INNER = Termination(atol=1e-11, rtol=1e-11, max_steps=100)
RIDGE = 0.5


class DoublyStochastic(Prox):
    """Square matrices of non-negative numbers whose rows and columns sum to 1, as vectors (B, n²): relaxed permutations.

    The projection is a solve of its dual, in one number per column: given those, each row is a projection onto the simplex.

    Example:
        >>> x = DoublyStochastic()(torch.tensor([[3.0, 0.0, 0.0, 0.1]]), 1.0)
        >>> x.reshape(2, 2)
        tensor([[1., 0.],
                [0., 1.]])

    Source: Blondel, Seguy and Rolet (2018), Smooth and sparse optimal transport, the semi-dual.
    """

    def __call__(self, x: Tensor, step_size: float | Tensor, *code: Any) -> Tensor:  # (B, n²) -> (B, n²)
        side = round(x.shape[-1] ** 0.5)
        rows = x.unflatten(-1, (side, side))
        prices = minimize(_SemiDual(), None, rows, solver=Newton(), termination=INNER, on_failure="ignore")
        return _rows_at(rows, prices.value)[1].flatten(-2)


class _SemiDual(Energy):
    """Σ_i max over the simplex of ⟨v_i, p⟩ − ½‖p‖², v_i = y_i + b, minus Σ b; its derivative is Σ_i p_i − 1.

    The last price is 0: only differences of prices count.
    """

    def start(self, y: Tensor) -> Tensor:  # (B, n, n) -> (B, n - 1)
        return torch.zeros_like(y[..., 0, 1:])

    def evaluate(self, b: Tensor, y: Tensor) -> Tensor:  # (B, n - 1), (B, n, n) -> (B,)
        v, p = _rows_at(y, b)
        return ((v - 0.5 * p) * p).sum((-2, -1)) - b.sum(-1)


def _rows_at(y: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # (B, n, n), (B, n - 1) -> 2 × (B, n, n)
    """Rows shifted by the prices, and their projections onto the simplex."""
    v = y + nn.functional.pad(b, (0, 1)).unsqueeze(-2)
    return v, Simplex()(v, 1.0)


class LearnedQuadratic(Energy):
    r"""½ xᵀ(FᵀF + ½ I) x − xᵀ(A z + c), whose F, A and c are learned.

    Example:
        >>> LearnedQuadratic(3, 2)(torch.zeros(5, 3), torch.ones(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, num_unknowns: int, num_inputs: int) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.randn(num_unknowns, num_unknowns) / num_unknowns**0.5)
        self.linear = nn.Linear(num_inputs, num_unknowns)

    def start(self, z: Tensor) -> Tensor:  # (B, d) -> (B, n)
        """The same share for each unknown, which no constraint forbids."""
        return torch.full_like(self.linear(z), 1 / self.root.shape[0] ** 0.5).detach()

    def matrix(self) -> Tensor:  # (n, n)
        """FᵀF + ½ I."""
        return self.root.T @ self.root + RIDGE * torch.eye(len(self.root), dtype=self.root.dtype)

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:  # (B, d) -> (n, n), (B, n)
        """The matrix, and A z + c."""
        return self.matrix(), self.linear(z)

    def evaluate(self, x: Tensor, matrix: Tensor, right: Tensor) -> Tensor:  # (B, n), (n, n), (B, n) -> (B,)
        return ((0.5 * x @ matrix - right) * x).sum(-1)


class Constraint(ABC):
    """A convex set: its projection, and how cvxpy writes it."""

    prox: Prox

    @abstractmethod
    def conditions(self, x: Any) -> list[Any]:
        """The constraints on a cvxpy variable (n,)."""


class UnitBox(Constraint):
    """0 ≤ x ≤ 1."""

    prox = Box(0.0, 1.0)

    def conditions(self, x: Any) -> list[Any]:
        return [x >= 0, x <= 1]


class UnitSimplex(Constraint):
    """x ≥ 0, Σ x = 1."""

    prox = Simplex()

    def conditions(self, x: Any) -> list[Any]:
        return [x >= 0, sum(x) == 1]


class Matching(Constraint):
    """A doubly stochastic matrix, row by row."""

    prox = DoublyStochastic()

    def conditions(self, x: Any) -> list[Any]:
        n = round(x.shape[0] ** 0.5)
        rows, columns = ([sum(x[n * i + j] for j in range(n)) == 1 for i in range(n)],
                         [sum(x[n * i + j] for i in range(n)) == 1 for j in range(n - 1)])  # fmt: skip
        return [x >= 0, *rows, *columns]  # the last column follows from the others


CONSTRAINTS: Mapping[str, Constraint] = {"box": UnitBox(), "simplex": UnitSimplex(), "matching": Matching()}


@dataclass(frozen=True)
class ConstrainedOptions(Options):
    """Constrained quadratic problems, whose parameters are learned from their solutions."""

    problem: Literal["box", "simplex", "matching"] = "box"
    """The set that the unknowns lie in."""
    unknowns: int = 9
    """How many; for a matching the square of its side."""
    rows: int = 400
    """Solved problems to learn from; half as many are tested."""
    updates: int = 500
    batch_size: int = 32
    every: int = 25
    folds: int | None = 1


@dataclass(frozen=True)
class ConstrainedSize:
    """Which set, how many unknowns and how many inputs."""

    problem: str
    num_unknowns: int
    num_inputs: int


class Constrained(Task):
    """Constrained problems: learn an energy from its minimizers on a box, a simplex, or relaxed permutations."""

    name = "constrained"
    options_class = ConstrainedOptions
    size_class = ConstrainedSize
    choice = "error"
    larger_is_better = False
    columns: ClassVar[Mapping[str, Column]] = {
        "error": Column("error · 10³", 1000, 3),
        "active": Column("active %", 100),
    }
    options: ConstrainedOptions

    @classmethod
    def rivals(cls) -> Sequence[Rival]:
        return (ProjectedFPI(), CvxpyLayers())

    @classmethod
    def usual(cls) -> Sequence[Rival]:
        return cls.rivals() if find_spec("cvxpylayers") else (ProjectedFPI(),)

    def load(self, folder: Path | None) -> Data:
        """Inputs at random, and the minimizers of one hidden energy; no folder is read."""
        size = ConstrainedSize(self.options.problem, self.options.unknowns, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            truth = ProjectedModel(size).double()
            truth.energy.linear.weight.data.mul_(3)
            inputs = torch.randn(self.options.rows * 3 // 2, size.num_inputs, dtype=torch.float64)
        with torch.no_grad():
            rows = Rows(inputs, truth(inputs))
        numbers = torch.arange(len(inputs))
        train = numbers < self.options.rows
        return Data(f"{self.options.problem}-{self.options.unknowns}", rows[numbers[train]], rows[numbers[~train]])

    def size(self, data: Data) -> ConstrainedSize:
        return ConstrainedSize(self.options.problem, data.train.targets.shape[1], data.train.inputs.shape[1])

    def loss(self, output: Tensor, batch: Rows) -> Tensor:
        return (output - batch.targets).square().sum(-1).mean()

    def evaluate(self, output: Tensor, rows: Rows, calibration: Mapping[str, float]) -> dict[str, float]:
        """The mean distance of answers from the truth, and the share of unknowns on a bound of 0."""
        distance = torch.linalg.vector_norm(output - rows.targets, dim=-1)
        return {"error": distance.mean().item(), "active": (output.abs() < 1e-6).double().mean().item()}


class ProjectedModel(nn.Module):
    """The minimizer of a learned energy over a convex set, by gradient steps and projections."""

    def __init__(self, size: ConstrainedSize) -> None:
        super().__init__()
        self.energy, self.solves = LearnedQuadratic(size.num_unknowns, size.num_inputs), SolveLog()
        prox = CONSTRAINTS[size.problem].prox
        self.layer = FPI_GD(self.energy, prox=prox, solver=Nesterov(), termination=EXACT, on_failure="warn")

    def forward(self, z: Tensor) -> Tensor:  # (B, d) -> (B, n)
        return self.solves.add(self.layer.solve(z)).value


class CvxpyModel(nn.Module):
    """The same minimizer by cvxpylayers: a cone program per row, differentiated at its solution."""

    def __init__(self, size: ConstrainedSize) -> None:
        super().__init__()
        self.energy = LearnedQuadratic(size.num_unknowns, size.num_inputs)
        self.layer = cvxpy_layer(CONSTRAINTS[size.problem], size.num_unknowns)

    def forward(self, z: Tensor) -> Tensor:  # (B, d) -> (B, n)
        with torch.enable_grad():  # without, the solver is handed the options of its derivative, which it does not know
            matrix, right = self.energy.encode(z)
            (x,) = self.layer(torch.linalg.cholesky(matrix).T, right)
        return x if torch.is_grad_enabled() else x.detach()


def cvxpy_layer(constraint: Constraint, num_unknowns: int) -> Any:
    """min ½‖R x‖² − rᵀx over a set, as a layer of R (n, n) and r (n,) or (B, n).

    Raises:
        ImportError: where cvxpylayers is not installed.
    """
    cvxpy, layers = import_module("cvxpy"), import_module("cvxpylayers.torch")
    x, root, right = cvxpy.Variable(num_unknowns), cvxpy.Parameter((num_unknowns,) * 2), cvxpy.Parameter(num_unknowns)
    objective = cvxpy.Minimize(0.5 * cvxpy.sum_squares(root @ x) - right @ x)
    problem = cvxpy.Problem(objective, constraint.conditions(x))
    arguments = {"solve_method": "SCS", "eps": 1e-10, "max_iters": 100_000, "acceleration_lookback": 0, "mode": "dense"}
    return layers.CvxpyLayer(problem, [root, right], [x], solver_args=arguments)


class ProjectedFPI(Rival):
    """`FPI_GD` with a prox, accelerated, with exact implicit gradients."""

    name = "fpi-gd"
    rates = Rates(learning_rate=1e-2, weight_decay=0.0)

    def build(self, size: ConstrainedSize) -> nn.Module:
        return ProjectedModel(size).double()


class CvxpyLayers(Rival):
    """cvxpylayers on the same energy (Agrawal et al. 2019, Differentiable convex optimization layers)."""

    name = "cvxpylayers"
    rates = Rates(learning_rate=1e-2, weight_decay=0.0)

    def build(self, size: ConstrainedSize) -> nn.Module:
        return CvxpyModel(size).double()

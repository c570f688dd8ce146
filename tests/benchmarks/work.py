"""What is to be done, and what the right answer is."""

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from .ops import TORCH, Ops

Tensors = tuple[Tensor, ...]


class Task(enum.Enum):
    """What is timed."""

    FORWARD = "forward"
    GRADIENT = "forward + gradient"
    JACOBIAN = "Jacobian dx*/db"
    HESSIAN = "Hessian of a loss"


class Formula(ABC):
    """An energy, written once for PyTorch and JAX, and its derivatives by hand."""

    def encode(self, ops: Ops, *inputs: Any) -> tuple[Any, ...]:
        """What does not depend on x."""
        return inputs

    @abstractmethod
    def evaluate(self, ops: Ops, x: Any, *code: Any) -> Any:
        """E(x), ``(B,)``, or 0-d for one problem."""

    def energy(self, ops: Ops, x: Any, *inputs: Any) -> Any:
        return self.evaluate(ops, x, *self.encode(ops, *inputs))

    @abstractmethod
    def loss(self, ops: Ops, x: Any, *targets: Any) -> Any:
        """What is differentiated, a scalar."""

    @abstractmethod
    def gradient(self, x: Tensor, *code: Tensor) -> Tensor:
        """∇E(x) by hand."""

    @abstractmethod
    def curvature(self, x: Tensor, *code: Tensor) -> Any:
        """p -> ∇²E(x) p by hand, with all that does not depend on p computed already."""

    @abstractmethod
    def pullback(self, x: Tensor, u: Tensor, *inputs: Tensor) -> Tensors:
        """-uᵀ ∂∇E(x)/∂θ for each wanted input θ, by hand."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The data of a workload."""

    formula: Formula
    x0: Tensor
    inputs: Tensors
    wanted: tuple[int, ...]
    """Which of the inputs are differentiated."""
    tolerance: float
    """Length of the step, that of the slowest sample, at which the plain loop stops."""
    adjoint_tolerance: float
    """Of the adjoint equation's residual, relative to the incoming gradient."""
    targets: Tensors = ()
    max_steps: int = 20_000

    def energy(self, x: Tensor, *inputs: Tensor) -> Tensor:
        return self.formula.energy(TORCH, x, *inputs)

    def code(self) -> Tensors:
        """What the energy needs of the inputs."""
        return self.formula.encode(TORCH, *self.inputs)

    def loss(self, x: Tensor) -> Tensor:
        return self.formula.loss(TORCH, x, *self.targets)

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same in another precision."""
        inputs, targets = (tuple(t.to(dtype) for t in ts) for ts in (self.inputs, self.targets))
        return dataclasses.replace(self, x0=self.x0.to(dtype), inputs=inputs, targets=targets)

    def double(self) -> "Problem":
        """The same in float64."""
        return self.to(torch.float64)

    def with_wanted(self, values: Sequence[Tensor]) -> Tensors:
        """The inputs with these in the place of the wanted ones."""
        inputs = list(self.inputs)
        for k, value in zip(self.wanted, values, strict=True):
            inputs[k] = value
        return tuple(inputs)

    def leaves(self) -> tuple[Tensors, Tensors]:
        """The inputs, and among them the wanted ones as leaves that require grad."""
        wanted = tuple(self.inputs[k].detach().clone().requires_grad_() for k in self.wanted)
        return self.with_wanted(wanted), wanted

    def rows(self, x: Tensor) -> Tensor:  # -> (B, n)
        """Samples as rows, whatever their shape; one problem is one row."""
        return x.reshape(1 if x.ndim == 1 else x.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Work:
    """A problem, its right answers, and tolerances that stop every kind of test after the same number of iterations."""

    problem: Problem
    step_size: float
    """γ = 2/(L + μ), of the curvatures at the answers."""
    contraction: float
    """(L - μ)/(L + μ)."""
    steps: int
    """Iterations of the plain loop."""
    distance: float
    """‖x - x*‖ of the slowest sample where the plain loop stops: for tests of the distance."""
    whole: float
    """Length of the step of all samples together that the plain loop's last one, and none before, falls below."""
    answers: dict[Task, Tensors]

    def error(self, task: Task, found: Sequence[Tensor]) -> float:
        """Largest relative error of the results; of x, of the slowest sample."""
        if task is Task.FORWARD:
            (right,) = self.answers[task]
            x, right = (self.problem.rows(t.to(right)) for t in (found[0], right))
            return float(((x - right).norm(dim=1) / right.norm(dim=1)).max())
        pairs = zip(found, self.answers[task], strict=True)
        return max(float((f.to(a) - a).norm() / a.norm()) for f, a in pairs)


def prepare(problem: Problem, tasks: Sequence[Task]) -> Work:
    """Solve in float64, with a dense Hessian where it fits, then see how the plain iteration goes."""
    double = problem.double()
    x = _newton(double)
    hessian = dense_hessian(double, x) if double.rows(x).shape[1] <= DENSE else None
    smallest, largest = extremes(double, x) if hessian is None else _bounds(torch.linalg.eigvalsh(hessian))
    step_size, contraction = 2 / (smallest + largest), (largest - smallest) / (largest + smallest)
    answers = {task: _answer(double, task, x, hessian) for task in tasks}
    steps, distance, whole = _calibrate(problem, step_size, x)
    return Work(problem, step_size, contraction, steps, distance, whole, answers)


def answered(problem: Problem) -> Work:
    """With the minimum alone: for solvers that bring their own steps and tolerances."""
    return Work(problem, 0.0, 0.0, 0, 0.0, 0.0, {Task.FORWARD: (_newton(problem.double()),)})


def bounded(problem: Problem, smallest: float, largest: float) -> Work:
    """Without answers: the distance follows from bounds of the curvature."""
    contraction = (largest - smallest) / (largest + smallest)
    distance = problem.tolerance * contraction / (1 - contraction)
    return Work(problem, 2 / (smallest + largest), contraction, 0, distance, problem.tolerance, {})


DENSE = 1000
"""Unknowns up to which the reference solves with dense Hessians; beyond, by conjugate gradients to 1e-13."""


def _bounds(spectrum: Tensor) -> tuple[float, float]:
    return float(spectrum.amin()), float(spectrum.amax())


def extremes(problem: Problem, x: Tensor) -> tuple[float, float]:
    """Smallest and largest curvature of all samples, by Lanczos' iteration."""
    product = _product(problem, x)

    def flat(p: Any) -> Any:
        return product(torch.from_numpy(p).to(x).reshape(x.shape)).cpu().ravel().numpy()

    operator = LinearOperator((x.numel(), x.numel()), flat, dtype="float64")
    smallest, largest = (float(eigsh(operator, 1, which=end, tol=1e-3, return_eigenvectors=False)[0]) for end in ("SA", "LA"))
    return smallest, largest


def _product(problem: Problem, x: Tensor) -> Callable[[Tensor], Tensor]:
    """p -> ∇²E(x) p."""
    x, _, slope = _slope(problem, x, problem.code())
    return lambda p: torch.autograd.grad(slope, x, p, retain_graph=True)[0]


def dense_hessian(problem: Problem, x: Tensor) -> Tensor:  # (*shape) -> (B, n, n)
    """Column by column, of all samples at once."""
    x, _, slope = _slope(problem, x, problem.code())
    rows = problem.rows(slope)
    columns = [torch.autograd.grad(rows[:, k].sum(), x, retain_graph=True)[0] for k in range(rows.shape[1])]
    return torch.stack([problem.rows(column) for column in columns], -1)


def _slope(problem: Problem, x: Tensor, code: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """x as a leaf, the energy of all samples, and its gradient, recorded."""
    x = x.detach().requires_grad_()
    energy = problem.formula.evaluate(TORCH, x, *code).sum()
    return x, energy.detach(), torch.autograd.grad(energy, x, create_graph=True)[0]


def _newton(problem: Problem) -> Tensor:
    """x* in float64, by truncated Newton steps, until the gradient is as small as rounding lets it be."""
    found, sizes, code = problem.x0, list[float](), problem.code()
    for _ in range(200):
        _, energy, slope = _slope(problem, found, code)
        sizes.append(float(slope.detach().abs().max()))
        if sizes[-1] <= 1e-9 * sizes[0] and sizes[-1] >= 0.5 * sizes[-2]:
            return found
        move = conjugate_gradients(_product(problem, found), slope.detach(), 1e-6)
        found = _shortened(problem, found, move, energy, code)
    raise RuntimeError("The reference did not converge: the benchmark's energy has no clear minimum.")


def _shortened(problem: Problem, x: Tensor, move: Tensor, energy: Tensor, code: Tensors) -> Tensor:
    """x - move, or a shorter move, so that the energy does not rise."""
    for halvings in range(20):
        trial = x - 0.5**halvings * move
        if problem.formula.evaluate(TORCH, trial, *code).sum() <= energy + 1e-12 * energy.abs():
            return trial
    return x - move


def conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float) -> Tensor:
    """H u = v over all samples at once, to a relative residual, or until a direction has no positive curvature."""
    u, left, direction = torch.zeros_like(right), right, right
    squared = (left * left).sum()
    goal = float(squared) * tolerance**2
    for k in range(5_000):
        image = product(direction)
        curvature = (direction * image).sum()
        if not curvature > 0:
            return u if k else right
        length = squared / curvature
        u, left = u + length * direction, left - length * image
        squared, before = (left * left).sum(), squared
        if not float(squared) > goal:
            return u
        direction = left + squared / before * direction
    return u


def _solved(problem: Problem, x: Tensor, hessian: Tensor | None, v: Tensor) -> Tensor:
    """H⁻¹ v."""
    if hessian is None:
        return conjugate_gradients(_product(problem, x), v, 1e-13)
    return torch.cholesky_solve(problem.rows(v).unsqueeze(-1), torch.linalg.cholesky(hessian)).reshape(x.shape)


def _answer(problem: Problem, task: Task, x: Tensor, hessian: Tensor | None) -> Tensors:
    if task is Task.FORWARD:
        return (x,)
    if task is Task.GRADIENT:
        leaf = x.clone().requires_grad_()
        (v,) = torch.autograd.grad(problem.loss(leaf), leaf)
        u = _solved(problem, x, hessian, v)
        inputs, wanted = problem.leaves()
        (slope,) = torch.autograd.grad(problem.energy(leaf, *inputs).sum(), leaf, create_graph=True)
        return tuple(-t for t in torch.autograd.grad((slope * u).sum(), wanted))

    # Two Newton steps from the answer have its first and second derivatives.
    def answer(value: Tensor) -> Tensor:
        inputs, found = problem.with_wanted([value]), x
        for _ in range(2):
            slope = torch.func.grad(problem.energy)(found, *inputs)
            found = found - torch.linalg.solve(torch.func.hessian(problem.energy)(found, *inputs), slope)
        return found

    (value,) = (problem.inputs[k] for k in problem.wanted)
    if task is Task.JACOBIAN:
        return (torch.func.jacrev(answer)(value),)
    return (torch.func.hessian(lambda value: problem.loss(answer(value)))(value),)


def _calibrate(problem: Problem, step_size: float, answer: Tensor) -> tuple[int, float, float]:
    """How many iterations the plain loop takes, how far it stays from the answer, and its last step of all samples."""
    x, before, code = problem.x0, float("inf"), problem.code()
    for steps in range(1, problem.max_steps + 1):
        move = step_size * _slope(problem, x, code)[2].detach()
        x = x - move
        whole = float(move.norm())
        if float(problem.rows(move).norm(dim=1).max()) <= problem.tolerance:
            far = problem.rows(x.double() - answer).norm(dim=1)
            return steps, float(far.max()), (whole * min(before, 2 * whole)) ** 0.5
        before = whole
    raise RuntimeError(f"The plain loop takes more than {problem.max_steps} iterations: choose another tolerance.")

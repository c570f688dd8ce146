"""The tasks that a driver runs, directly or as a compiled program: a solve and a gradient, as functions of tensors only."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from energynet._torch.autodiff import pullback, readable
from energynet.engine.binding import Binding
from energynet.engine.equation import Equation, Linear
from energynet.engine.loop import CROWD, LoopState, loop
from energynet.engine.row_inputs import own_rows
from energynet.solution import Status
from energynet.solvers import Solver
from energynet.solvers import problem as problems
from energynet.solvers.problem import Problem
from energynet.solvers.spectrum import ritz_values, some_direction
from energynet.step import Kind
from energynet.termination import Termination, max_norm

Observe = Callable[[LoopState], None]


class Task(ABC):
    """A function of tensors, which otherwise depends only on a step, in its binding, and on its own fields."""

    equation: Equation
    check_every: int | None
    """The number of updates between two status checks where Python runs the loop; None: it depends on the device."""

    @property
    def binding(self) -> Binding:
        """The user's step with its tensors."""
        return self.equation.binding

    @property
    def batch_dims(self) -> int:
        """The number of leading batch dimensions."""
        return self.equation.batch_dims

    @abstractmethod
    def checked(self, every: int | None, observe: Observe | None = None) -> "Task":
        """The same function with another `check_every`, and with a callback that receives the state after each update."""

    @abstractmethod
    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Evaluate it."""


class Outcome(NamedTuple):
    """The result of a solve, per sample."""

    value: Tensor  # (*batch, n)
    status: Tensor  # (*batch) int8
    error: Tensor  # (*batch); for a linear equation, relative to its right-hand side
    steps: Tensor  # (*batch) int32


@dataclasses.dataclass(frozen=True, eq=False)
class Solve(Task):
    """Computes (y0, \\*inputs) -> the root of an equation, its status, error and number of steps."""

    equation: Equation
    solver: Solver
    termination: Termination
    check_every: int | None = None
    observe: Observe | None = None

    def checked(self, every: int | None, observe: Observe | None = None) -> "Solve":
        return dataclasses.replace(self, check_every=every, observe=observe)

    def __call__(self, *tensors: Tensor) -> Outcome:
        y0, inputs = tensors[0], tensors[1:]
        termination = self.termination.at_precision(self.equation.rounding)
        if not isinstance(self.equation, Linear):
            state = self._loop(self.equation.problem(inputs, y0), termination, y0, inputs)
            return Outcome(state.x, state.status, state.error, state.steps)
        # A linear equation is solved with v scaled to size one: the squares of a tiny or huge loss would under- or overflow.
        largest = max_norm(inputs[0]).unsqueeze(-1)
        largest = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
        v = inputs[0] / largest
        problem = self.equation.problem((v, *inputs[1:]), y0)
        state = self._loop(problem, termination, y0, (v, *inputs[1:]))
        if readable(state.status) and bool(_given_up(state.status).any()):
            state = self._beyond_rounding(problem, termination, state, largest.squeeze(-1), inputs[1:])
        status = state.status
        if self.equation.root.kind is Kind.ENERGY and not self.solver.sees_saddles:
            status = torch.where(_negative_curvature(problem), Status.DIVERGED, status).to(torch.int8)
        size = termination.size(v)
        return Outcome(state.x * largest, status, state.error / torch.where(size > 0, size, 1), state.steps)

    def _beyond_rounding(self, problem: problems.Linear, termination: Termination, state: LoopState, unit: Tensor,
                         inputs: tuple[Tensor, ...]) -> LoopState:  # fmt: skip
        """Solve again up to the rounding error of v: along a gauge direction of an energy, A has no inverse.

        A gradient such as v has an error of ε‖H‖‖x‖, and A u has one of ε‖A‖‖u‖. If ∇E at the solution is not exactly zero, a
        gauge direction has a curvature of about ‖∇E‖/‖x‖, of either sign, so A u has an error of this curvature times ‖u‖.
        """
        eps, given_up = torch.finfo(state.x.dtype).eps, _given_up(state.status)
        norm = termination.size(problem.hvp(state.x, some_direction(torch.zeros_like(state.x))))
        reach, flat = self._reach_and_flat(termination, inputs)
        noise, right = NOISE * eps * norm * reach / unit, termination.size(problem.right)
        attained = torch.minimum(NOISE * eps * norm * termination.size(state.x), eps**0.5 * right)
        fine = given_up & (state.error <= attained) & torch.isfinite(state.error)
        state = state._replace(status=torch.where(fine, Status.CONVERGED, state.status).to(torch.int8))
        if not bool((given_up & ~fine).any()) or not bool(((noise > 0) | (flat > 0)).any()):
            return state
        again = loop(dataclasses.replace(problem, noise=noise, flat=flat), self.solver, termination, torch.zeros_like(state.x),
                     every=self.check_every)  # fmt: skip
        arrived = again.status == Status.CONVERGED
        x = torch.where(arrived.unsqueeze(-1), again.x, again.best)
        error = termination.size(problem.residual(x))
        helped = given_up & ~fine & (arrived | (error <= flat * termination.size(x)))
        return state._replace(
            x=torch.where(helped.unsqueeze(-1), x, state.x), error=torch.where(helped, error, state.error),
            status=torch.where(helped, Status.CONVERGED, state.status).to(torch.int8),
            steps=state.steps + torch.where(helped, again.steps, 0),
        )  # fmt: skip

    def _reach_and_flat(self, termination: Termination, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The norm of a minimizer, and the error of its curvatures; ``(*batch)`` zeros for other equations."""
        root, size = self.equation.linearized, termination.size(inputs[0])
        if root.kind is not Kind.ENERGY:
            return torch.zeros_like(size), torch.zeros_like(size)
        slope = termination.size(root.function(inputs[1:])(inputs[0]))
        return size, NOISE * slope / torch.where(size > 0, size, torch.inf)

    def _loop(self, problem: Problem, termination: Termination, y0: Tensor, inputs: tuple[Tensor, ...]) -> LoopState:
        plain = self.equation.batch_dims == 1 and readable(y0) and not isinstance(self.binding.step.step_size, Tensor)
        batch = Samples(self.equation, y0, inputs) if plain and len(y0) >= CROWD else None
        return loop(problem, self.solver, termination, y0, self.observe, every=self.check_every, batch=batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """A batch from which some samples may be selected to continue as a smaller batch."""

    equation: Equation
    y0: Tensor
    inputs: tuple[Tensor, ...]
    own: tuple[bool, ...] | None = None  # which inputs have one row per sample; None: not looked at yet

    @property
    def problem(self) -> Problem:
        return self.equation.problem(self.inputs, self.y0)

    def some(self, rows: Tensor) -> "Samples | None":
        own = own_rows(self.equation, self.y0, self.inputs) if self.own is None else self.own
        if own is None:
            return None
        inputs = tuple(t[rows] if mine else t for t, mine in zip(self.inputs, own, strict=True))
        return Samples(self.equation, self.y0[rows], inputs, own)


def _negative_curvature(problem: problems.Linear) -> Tensor:  # -> (*batch) bool
    """Whether a few products of the Hessian, starting from the right-hand side, show negative curvature at the solution.

    The equation has a solution at a saddle, too, but that is not the derivative of a minimizer.
    """
    values = ritz_values(problem.jacobian(problem.right), problem.right, PRODUCTS)
    return values.amin(-1) < -100 * torch.finfo(values.dtype).eps * values.abs().amax(-1)


def _given_up(status: Tensor) -> Tensor:
    return (status == Status.MAX_STEPS) | (status == Status.STALLED) | (status == Status.DIVERGED)


PRODUCTS = 10
NOISE = 10  # accumulated rounding errors, in rounding units


@dataclasses.dataclass(frozen=True, eq=False)
class Pull(Task):
    """Computes (v, y, \\*inputs) -> the outcome of the adjoint equation at the root y, and the gradients that are wanted."""

    equation: Equation
    solver: Solver
    termination: Termination
    wanted: tuple[bool, ...]
    check_every: int | None = None
    observe: Observe | None = None

    def checked(self, every: int | None, observe: Observe | None = None) -> "Pull":
        return dataclasses.replace(self, check_every=every, observe=observe)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        v, y, inputs = tensors[0], tensors[1], tensors[2:]

        def solve(equation: Linear, *arguments: Tensor) -> Outcome:
            task = Solve(equation, self.solver, self.termination, self.check_every, self.observe)
            return task(torch.zeros_like(v), *arguments)

        outcome, gradients = pulled_back(self.equation, self.wanted, v, y, inputs, solve)
        found = [v.new_zeros(0) if g is None else g for g, want in zip(gradients, self.wanted) if want]
        return *outcome, *found

    def gradients(self, found: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
        """One gradient per input: None if it is not wanted, or if the equation does not contain the input."""
        rest = iter(found)
        present = [next(rest) if want else None for want in self.wanted]
        return [None if g is None or g.shape != t.shape else g for g, t in zip(present, inputs, strict=True)]


class Solved(Protocol):
    """An object that holds the solution of a linear equation."""

    @property
    def value(self) -> Tensor: ...


S = TypeVar("S", bound=Solved)


def linear_equation(equation: Equation, transposed: bool, y: Tensor, inputs: tuple[Tensor, ...]
                    ) -> tuple[Linear, tuple[Tensor, ...]]:  # fmt: skip
    """The equation A u = v or Aᵀ u = v, with A the Jacobian at the solution ``y``, and its inputs after v."""
    root, flipped, arguments = equation.linearization(y, inputs)
    return Linear(root, transposed != flipped), arguments


def pulled_back(equation: Equation, wanted: tuple[bool, ...], v: Tensor, y: Tensor, inputs: tuple[Tensor, ...],
                solve: Callable[..., S]) -> tuple[S, list[Tensor | None]]:  # fmt: skip
    """Equation (1): the solution u of Aᵀ u = v, and −(∂F/∂inputs)ᵀ u.

    Args:
        equation: F(y; inputs) = 0, with A = ∂F/∂y.
        wanted: whether the gradient of each input is wanted.
        v: the incoming gradient, ``(*batch, n)``.
        y: the solution, ``(*batch, n)``.
        inputs: the inputs of the equation.
        solve: (linear equation, v, \\*its other inputs) -> its solution.
    """
    adjoint, arguments = linear_equation(equation, True, y, inputs)
    solved = solve(adjoint, v, *arguments)
    return solved, input_gradients(equation, wanted, solved.value, y, inputs)


def input_gradients(equation: Equation, wanted: tuple[bool, ...], u: Tensor, y: Tensor,
                    inputs: tuple[Tensor, ...]) -> list[Tensor | None]:  # fmt: skip
    """−(∂F/∂inputs)ᵀ u for the inputs that are wanted."""
    chosen = [k for k, want in enumerate(wanted) if want]

    def residual(*values: Tensor) -> Tensor:
        full = list(inputs)
        for k, value in zip(chosen, values, strict=True):
            full[k] = value
        return equation.residual(y, *full)

    gradients: list[Tensor | None] = [None] * len(inputs)
    for k, g in zip(chosen, pullback(residual, [inputs[k] for k in chosen], -u), strict=True):
        gradients[k] = g
    return gradients

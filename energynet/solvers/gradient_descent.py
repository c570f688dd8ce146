"""Gradient descent with three rules for the length of its steps, batched per sample."""

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet._torch.numbers import check_number, check_whole
from energynet.solvers.base import Solver
from energynet.solvers.line_search import Backtracking, Search, begin
from energynet.solvers.problem import Minimization
from energynet.step import Kind


class GradientDescentState(NamedTuple):
    residual: Tensor  # ∇E(x), (*batch, n)
    energies: Tensor  # the last energies, newest last, (*batch, k)
    search: Search
    failures: Tensor  # consecutive failed searches, (*batch) int32
    unbounded: Tensor  # (*batch) bool: the energy decreases however long the step is


class Progress(NamedTuple):
    """The measurements after a step that a rule may use; every field is ``(*batch)``."""

    length: Tensor  # the length of the step
    moved: Tensor  # ‖s‖², s the difference of the iterates
    along: Tensor  # sᵀy, y the difference of the gradients
    changed: Tensor  # ‖y‖²


class StepRule(ABC):
    """Chooses the step lengths of gradient descent."""

    memory: int = 1
    """The number of stored energies; a step must reach a value below the largest one."""

    unrollable: ClassVar[bool] = True
    """Whether the step lengths can be differentiated."""

    def judge(self, search: Search, energy: Tensor, slope: Tensor) -> tuple[Tensor, Search]:
        """Which samples accept their trial point, and the search of the others; by default every step must descend."""
        return Backtracking().judge(search, energy, slope)

    @abstractmethod
    def next_length(self, progress: Progress) -> Tensor:
        """The length to try first in the next step, ``(*batch)``."""


@dataclasses.dataclass(frozen=True)
class FixedStep(StepRule):
    """Uses the constant step γ: this is the plain fixed-point iteration, which compares no energies.

    Example:
        >>> FixedStep()
        FixedStep()
    """

    def judge(self, search: Search, energy: Tensor, slope: Tensor) -> tuple[Tensor, Search]:
        return torch.ones_like(energy, dtype=torch.bool), search

    def next_length(self, progress: Progress) -> Tensor:
        return progress.length


@dataclasses.dataclass(frozen=True)
class BacktrackingStep(StepRule):
    """Tries a longer step than the last one and shortens it until the energy decreases sufficiently.

    Example:
        >>> BacktrackingStep(growth=1.5)
        BacktrackingStep(growth=1.5)

    Args:
        growth: the ratio of the first trial length to the last accepted one.

    Raises:
        ValueError: if growth < 1.

    Source: Armijo (1966).
    """

    growth: float = 2.0
    unrollable: ClassVar[bool] = False  # each length depends on the previous one, so that derivatives grow without bound

    def __post_init__(self) -> None:
        check_number(self, "growth", "≥ 1 that is finite", lambda v: 1 <= v < float("inf"))

    def next_length(self, progress: Progress) -> Tensor:
        return self.growth * progress.length


@dataclasses.dataclass(frozen=True)
class BarzilaiBorwein(StepRule):
    """Uses the inverse curvature along the last step. The energy may rise temporarily but stays below the last few energies.

    This is often a hundred times faster than a constant step when the condition number is large.

    Example:
        >>> BarzilaiBorwein(memory=5)
        BarzilaiBorwein(memory=5)

    Args:
        memory: the number of stored energies; with 1 the energy never rises.

    Raises:
        ValueError: if memory < 1.

    Source: Barzilai and Borwein (1988); Raydan (1997), with the line search of Grippo, Lampariello and Lucidi (1986).
    """

    memory: int = 10

    def __post_init__(self) -> None:
        check_whole(self, "memory")

    def next_length(self, progress: Progress) -> Tensor:
        positive = progress.along > 0
        length = progress.moved / torch.where(positive, progress.along, 1)
        # Without positive curvature the energy decreases ever faster, so a longer step is tried.
        return torch.where(positive & torch.isfinite(length) & (length > 0), length, 10 * progress.length)


@dataclasses.dataclass(frozen=True)
class GradientDescent(Solver):
    """Descends along −∇E, with one evaluation of the energy and its gradient per step.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> energy = lambda x: torch.cosh(x).sum(-1) + 50 * x[:, 0] ** 2
        >>> minimize(energy, torch.ones(1, 2), solver=GradientDescent(BarzilaiBorwein())).value.abs().amax() < 1e-3
        tensor(True)

    Args:
        rule: the rule for the step lengths: `FixedStep`, `BacktrackingStep` or `BarzilaiBorwein`. The first length is γ.

    Raises:
        TypeError: if it is none of these, such as a line search of `LBFGS`.
    """

    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.ENERGY})
    descends: ClassVar[bool] = True
    rule: StepRule = BacktrackingStep()

    def __post_init__(self) -> None:
        if not isinstance(self.rule, StepRule):
            raise TypeError(f"GradientDescent needs FixedStep(), BacktrackingStep() or BarzilaiBorwein(), got {self.rule!r}.")

    @property
    def unrollable(self) -> bool:  # type: ignore[override]
        return self.rule.unrollable

    def merit(self, state: GradientDescentState, size: Tensor) -> Tensor:
        return state.energies[..., -1]

    def stalled(self, state: GradientDescentState) -> Tensor:
        return state.failures > 1

    def breakdown(self, state: GradientDescentState) -> Tensor:
        return state.unbounded

    def init(self, problem: Minimization, x0: Tensor) -> GradientDescentState:
        energy, gradient = problem.value_and_gradient(x0)
        gamma = problem.gamma.squeeze(-1) if isinstance(problem.gamma, Tensor) else problem.gamma
        search = begin(energy, -gradient.square().sum(-1), gamma + torch.zeros_like(energy))
        energies = energy.unsqueeze(-1).expand(*energy.shape, self.rule.memory)
        none = torch.zeros_like(search.trials)
        return GradientDescentState(gradient, energies, search, none, none.bool())

    def update(self, problem: Minimization, x: Tensor, state: GradientDescentState) -> tuple[Tensor, GradientDescentState]:
        trial = x - state.search.length.to(x.dtype).unsqueeze(-1) * state.residual
        energy, gradient = problem.value_and_gradient(trial)
        taken, search = self.rule.judge(state.search, energy, -(gradient * state.residual).sum(-1))
        failed = search.failed & ~taken
        s, y = trial - x, gradient - state.residual
        progress = Progress(state.search.length, s.square().sum(-1), (s * y).sum(-1), y.square().sum(-1))
        rows = taken.unsqueeze(-1)
        pushed = torch.cat([state.energies[..., 1:], energy.unsqueeze(-1)], -1)
        x, gradient = torch.where(rows, trial, x), torch.where(rows, gradient, state.residual)
        energies = torch.where(rows, pushed, state.energies)
        fresh = begin(energies.amax(-1), -gradient.square().sum(-1), self.rule.next_length(progress), state.search)
        search = Search(*(torch.where(taken, new, old) for new, old in zip(fresh, search, strict=True)))
        failures = torch.where(search.successful(taken), 0, state.failures + search.failed.to(torch.int32))
        unbounded = failed & torch.isinf(search.high)
        return x, GradientDescentState(gradient, energies, search, failures, unbounded)

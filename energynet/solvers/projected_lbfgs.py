"""Limited-memory BFGS within bounds, batched per sample.

Each step is a line search from x toward the minimum of a quadratic model within the bounds, along a segment inside the box.
Coordinates at a bound are equal to it exactly.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from energynet._torch.numbers import check_whole
from energynet.solvers.base import Solver
from energynet.solvers.bounded_model import (
    Bounded,
    Memory,
    either,
    first_bound,
    inside,
    model_minimum,
    model_of,
    nothing,
    remember,
)
from energynet.solvers.line_search import Search, StrongWolfe, begin
from energynet.solvers.problem import Proximal
from energynet.solvers.vectors import inner
from energynet.step import Kind


class ProjectedLBFGSState(NamedTuple):
    residual: Tensor  # the prox-gradient mapping F(x), (*batch, n)
    energy: Tensor  # E(x), (*batch)
    gradient: Tensor  # ∇E(x), (*batch, n)
    target: Tensor  # the point that the search reaches at length 1, (*batch, n)
    search: Search
    memory: Memory
    failures: Tensor  # consecutive failed searches, (*batch) int32
    unbounded: Tensor  # (*batch) bool: the energy decreases however long the step is


@dataclasses.dataclass(frozen=True)
class ProjectedLBFGS(Solver):
    """Quasi-Newton descent within bounds, based on the last ``memory`` changes of the gradient: the method of L-BFGS-B.

    It takes one evaluation of the energy and its gradient per step, always within the bounds. If a line search fails, it
    clears the memory and follows the projected gradient. The model is kept in float64 where the device supports it.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> from energynet.constraints import Box
        >>> banana = lambda x: 100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (1 - x[:, 0]) ** 2
        >>> x0 = torch.tensor([[-1.2, 1.0]])
        >>> minimize(banana, x0, prox=Box(upper=0.8), solver=ProjectedLBFGS()).value.round(decimals=2)
        tensor([[0.8000, 0.6400]])

    Args:
        memory: m, the number of stored changes.

    Raises:
        ValueError: if memory < 1.

    Source: Byrd, Lu, Nocedal and Zhu (1995), A limited memory algorithm for bound constrained optimization; Morales and
    Nocedal (2011), its projected subspace step.
    """

    solves: ClassVar[frozenset[Kind]] = frozenset({Kind.BOUNDED})
    descends: ClassVar[bool] = True
    unrollable: ClassVar[bool] = False
    memory: int = 10

    def __post_init__(self) -> None:
        check_whole(self, "memory")

    def merit(self, state: ProjectedLBFGSState, size: Tensor) -> Tensor:
        return state.energy

    def stalled(self, state: ProjectedLBFGSState) -> Tensor:
        return state.failures > 1

    def breakdown(self, state: ProjectedLBFGSState) -> Tensor:
        return state.unbounded

    def init(self, problem: Proximal, x0: Tensor) -> ProjectedLBFGSState:
        energy, gradient = problem.value_and_gradient(x0)
        target = _downhill(problem, x0, gradient, problem.gamma)
        search = begin(energy, inner(gradient, target - x0), torch.ones_like(energy))
        residual, none = _prox_gradient(problem, x0, gradient), torch.zeros_like(search.trials)
        memory = nothing(x0, self.memory)
        return ProjectedLBFGSState(residual, energy, gradient, target, search, memory, none, none.bool())

    def update(self, problem: Proximal, x: Tensor, state: ProjectedLBFGSState) -> tuple[Tensor, ProjectedLBFGSState]:
        length, direction = state.search.length, state.target - x
        most = torch.clamp(first_bound(x, direction, *problem.bounds)[1], min=1)
        trial = inside(x + length.to(x.dtype).unsqueeze(-1) * direction, *problem.bounds)
        trial = torch.where((length == 1).unsqueeze(-1), state.target, trial)  # reaches bounds without rounding errors
        energy, gradient = problem.value_and_gradient(trial)
        taken, search = SEARCH.judge(state.search, energy, inner(gradient, direction))
        taken = taken | ((search.low >= length) & (length >= most))  # a longer step would leave the box
        failed = search.failed & ~taken
        failures = torch.where(search.successful(taken), 0, state.failures + search.failed.to(torch.int32))
        unbounded = failed & torch.isinf(search.high) & torch.isinf(most)
        memory = remember(state.memory, taken, trial - x, gradient - state.gradient)
        memory = either(failed, nothing(x, self.memory), memory)
        x = torch.where(taken.unsqueeze(-1), trial, x)
        energy = torch.where(taken, energy, state.energy)
        gradient = torch.where(taken.unsqueeze(-1), gradient, state.gradient)
        target, fresh = _begin_search(problem, x, energy, gradient, memory, failed)
        anew = taken | failed
        search = search._replace(length=torch.minimum(search.length, most))
        search = Search(*(torch.where(anew, new, old) for new, old in zip(fresh, search, strict=True)))
        target = torch.where(anew.unsqueeze(-1), target, state.target)
        residual = _prox_gradient(problem, x, gradient)
        return x, ProjectedLBFGSState(residual, energy, gradient, target, search, memory, failures, unbounded)


SEARCH = StrongWolfe()


def _prox_gradient(problem: Proximal, x: Tensor, gradient: Tensor) -> Tensor:  # (*batch, n)
    """(x − P(x − γ ∇E)) / γ, without the rounding error of that difference."""
    lower, upper = problem.bounds
    return inside(gradient, (x - upper) / problem.gamma, (x - lower) / problem.gamma)


def _downhill(problem: Proximal, x: Tensor, gradient: Tensor, length: float | Tensor) -> Tensor:  # (*batch, n)
    return inside(x - length * gradient, *problem.bounds)


def _begin_search(problem: Proximal, x: Tensor, energy: Tensor, gradient: Tensor, memory: Memory, failed: Tensor
                  ) -> tuple[Tensor, Search]:  # fmt: skip
    """A search toward the minimum of the model; along the projected gradient if a search failed or the model is useless."""
    point = Bounded(*(t.to(memory.moves.dtype) for t in (x, gradient, *problem.bounds)))
    model = model_of(memory, 1 / problem.each_gamma(x))
    target = inside(model_minimum(point, model).to(x.dtype), *problem.bounds)
    useless = failed | ~(inner(gradient, target - x) < 0)
    target = torch.where(useless.unsqueeze(-1), _downhill(problem, x, gradient, _tiny(x, gradient)), target)
    return target, begin(energy, inner(gradient, target - x), torch.ones_like(energy))


def _tiny(x: Tensor, gradient: Tensor) -> Tensor:  # -> (*batch, 1)
    """A length along −∇E that moves x by a thousandth: without other information, the search extrapolates from there."""
    size = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return 1e-3 * (1 + torch.linalg.vector_norm(x, dim=-1, keepdim=True)) / torch.where(size > 0, size, 1)

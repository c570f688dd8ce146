"""The only loop of the package: moves, judges each sample, freezes the finished ones, and checks every claim.

`body` is a pure function on a `LoopState` of fixed shapes. `loop` drives it eagerly; a compiled driver can run the same
body. A sample that seems to have converged is frozen, and once no sample moves, `_verify` measures the optimality
condition anew at the returned points: whatever a solver believes, a residual is what was seen there. A sample that ran
out of steps returns the best of its iterates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energynet import _tree
from energynet._autodiff import readable
from energynet.problem import Problem
from energynet.solution import Status
from energynet.solvers.base import Solver
from energynet.termination import Termination

RUNNING = -1
GROWTH = 1e6  # a distance this many times larger than where the sample began is called divergence


class LoopState(NamedTuple):
    """All that changes from one step to the next; every field keeps its shape."""

    x: Tensor  # (*batch, n)
    inner: Any  # the solver's own state
    status: Tensor  # (*batch) int8
    steps: Tensor  # (*batch) int32
    distance: Tensor  # (*batch), the estimate that is compared with the tolerance
    scale: Tensor  # (*batch), curvature by which ‖F‖ is divided
    limit: Tensor  # (*batch), distance beyond which a sample has diverged
    best: Tensor  # (*batch, n), the iterate of least merit
    merit: Tensor  # (*batch)


Advance = Callable[[LoopState], LoopState]


def loop(
    problem: Problem,
    solver: Solver,
    termination: Termination,
    x0: Tensor,
    observe: Callable[[LoopState], None] | None = None,
    wrap: Callable[[Advance], Advance] | None = None,
) -> LoopState:
    """Solve until every sample has converged, failed, or taken ``max_steps`` updates.

    Args:
        problem: what is solved.
        solver: how to move.
        termination: when to stop.
        x0: ``(*batch, n)``.
        observe: called with the state at the start and after each update.
        wrap: makes of one update what is run in its place, such as several ones under a checkpoint.
    """

    def update(state: LoopState) -> LoopState:
        return body(problem, solver, termination, state)

    advance = update if wrap is None else wrap(update)
    state = _begin(problem, solver, termination, x0)
    if observe is not None:
        observe(state)
    while True:
        updates = 0
        while updates < termination.max_steps and _any_running(state):
            state = advance(state)
            updates += 1
            if observe is not None:
                observe(state)
            if not readable(state.status):  # nobody sees the end coming, so every step is checked
                state = _verify(problem, solver, termination, state)
        state = _verify(problem, solver, termination, state)
        if not (readable(state.status) and _any_running(state)):
            return _stop(state)


def body(problem: Problem, solver: Solver, termination: Termination, state: LoopState) -> LoopState:
    """One update of the samples that still run."""
    running = state.status == RUNNING
    x, inner = solver.update(problem, state.x, state.inner)
    if not (readable(running) and bool(running.all())):
        x = torch.where(running.unsqueeze(-1), x, state.x)
        inner = _tree.map_structure(lambda new, old: _where(running, new, old), inner, state.inner)
    with torch.no_grad():
        steps = state.steps + running.to(torch.int32)
        size = termination.size(inner.residual)
        distance = torch.where(running, _distance(problem, termination, x, size, state.scale), state.distance)
        merit = solver.merit(inner, size)
        better = (merit < state.merit) & running
        moved = state._replace(x=x, inner=inner, steps=steps, distance=distance, merit=torch.where(better, merit, state.merit))
        status = torch.where(running, _judge(problem, solver, termination, moved), state.status)
    return moved._replace(status=status, best=torch.where(better.unsqueeze(-1), x, state.best))


def _begin(problem: Problem, solver: Solver, termination: Termination, x0: Tensor) -> LoopState:
    x = x0.clone()
    inner = solver.init(problem, x)
    with torch.no_grad():
        size = termination.size(x)
        scale = _first_scale(problem, termination, x, inner.residual)
        left = termination.size(inner.residual)
        distance = _distance(problem, termination, x, left, scale)
        limit = GROWTH * (1 + size + distance if problem.right is None else termination.size(problem.right))
        steps = torch.zeros_like(size, dtype=torch.int32)
        state = LoopState(x, inner, steps.to(torch.int8), steps, distance, scale, limit, x, solver.merit(inner, left))
        return state._replace(status=_judge(problem, solver, termination, state))


def _first_scale(problem: Problem, termination: Termination, x: Tensor, residual: Tensor) -> Tensor:
    """A guess of the curvature that only decides when to look: 1/γ. What is reported comes from `_verify`."""
    if not _curved(problem):
        return torch.ones_like(termination.size(x))
    if problem.step_size is None:
        scale = _curvature(problem, termination, x, residual)
        return torch.where((scale > 0) & torch.isfinite(scale), scale, 1)
    step_size = problem.step_size.squeeze(-1) if isinstance(problem.step_size, Tensor) else problem.step_size
    return torch.ones_like(termination.size(x)) / step_size


def _distance(problem: Problem, termination: Termination, x: Tensor, size: Tensor, scale: Tensor) -> Tensor:
    if problem.right is not None:
        return size
    # x itself is only known to its rounding unit: a low-precision step that rounds to no change has not arrived.
    rounding = 0.5 * torch.finfo(x.dtype).eps * termination.size(x)
    return torch.where(size == 0, size, size / scale) + rounding


def _judge(problem: Problem, solver: Solver, termination: Termination, state: LoopState) -> Tensor:
    finite = torch.isfinite(state.x).all(-1) & torch.isfinite(state.inner.residual).all(-1)
    status = torch.where(state.steps >= termination.max_steps, Status.MAX_STEPS, RUNNING)
    status = torch.where((state.distance > state.limit) | solver.breakdown(state.inner), Status.DIVERGED, status)
    status = torch.where(_within_tolerance(problem, termination, state), Status.CONVERGED, status)
    return torch.where(finite, status, Status.NONFINITE).to(torch.int8)


def _within_tolerance(problem: Problem, termination: Termination, state: LoopState) -> Tensor:
    if problem.right is None:
        return state.distance <= termination.tolerance(state.x)
    relative = termination.relative(torch.finfo(state.x.dtype).eps)
    return state.distance <= relative * termination.size(problem.right)


def _verify(problem: Problem, solver: Solver, termination: Termination, state: LoopState) -> LoopState:
    """Measure the condition at the returned points; samples that had stopped too early run again from there."""
    exhausted = state.status == Status.MAX_STEPS
    if not readable(exhausted) or bool(exhausted.any()):
        state = state._replace(x=torch.where(exhausted.unsqueeze(-1), state.best, state.x))
    elif not _curved(problem) and solver.exact_residual:
        return state
    with torch.no_grad():
        claimed = state.status == Status.CONVERGED
        measured = claimed | exhausted
        residual = problem.residual(state.x)
        size = termination.size(residual)
        scale = _curvature(problem, termination, state.x, residual) if _curved(problem) else state.scale
        distance = torch.where(measured, _distance(problem, termination, state.x, size, scale), state.distance)
        arrived = _within_tolerance(problem, termination, state._replace(distance=distance))
        reopened = claimed & ~arrived & (state.steps < termination.max_steps)
        # A gradient without any curvature along it, to the last: the energy falls for ever in this direction.
        ended = torch.where(torch.isinf(distance), Status.DIVERGED, Status.MAX_STEPS)
        ended = torch.where(arrived, Status.CONVERGED, torch.where(reopened, RUNNING, ended))
        status = torch.where(measured, ended, state.status).to(torch.int8)
        # Where no curvature is seen, as on the linear part of a Huber function, look again a little later.
        scale = torch.where(reopened, torch.where(scale > 0, scale, 0.1 * state.scale), state.scale)
        limit = torch.where(reopened, torch.maximum(state.limit, GROWTH * distance.nan_to_num(0, 0, 0)), state.limit)
    state = state._replace(status=status, distance=distance, scale=scale, limit=limit)
    if solver.exact_residual or (readable(status) and not _any_running(state)):
        return state
    afresh = _tree.map_structure(lambda new, old: _where(reopened, new, old), solver.init(problem, state.x), state.inner)
    return state._replace(inner=afresh)


def _curved(problem: Problem) -> bool:
    """Whether distances are measured by a derivative of F, as those of a minimisation are by a curvature."""
    return problem.jacobian is not None and problem.right is None


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:  # (*batch), (*batch, ...)
    return torch.where(mask.reshape((*mask.shape, *[1] * (new.ndim - mask.ndim))), new, old)


def _curvature(problem: Problem, termination: Termination, x: Tensor, residual: Tensor) -> Tensor:
    """‖H F‖ / ‖F‖: the curvature along the gradient. For F = 0 any value serves."""
    size = termination.size(residual)
    direction = residual / torch.where(size == 0, 1, size).to(residual.dtype).unsqueeze(-1)
    return torch.where(size == 0, 1, termination.size(problem.hvp(x, direction)))


def _any_running(state: LoopState) -> bool:
    return not readable(state.status) or bool((state.status == RUNNING).any())


def _stop(state: LoopState) -> LoopState:
    """Under ``vmap`` no value can be read, so what still runs after the last step has run out of them."""
    status = torch.where(state.status == RUNNING, Status.MAX_STEPS, state.status).to(torch.int8)
    return state._replace(status=status)

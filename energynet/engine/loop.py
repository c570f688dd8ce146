"""The only loop of the package: it updates the samples, decides their status, freezes finished ones, and verifies convergence.

`body` is a pure function on a `LoopState` of fixed shapes. `loop` runs it eagerly; a compiled driver can run the same
body. A sample that seems to have converged is frozen. Once no sample is running, `_verify` evaluates the optimality
condition at the returned points, so the reported residual never relies on the solver's own bookkeeping. A sample that ran
out of steps returns the best of its iterates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import readable, tracing
from energynet._torch.while_loop import while_loop
from energynet.engine.error_estimate import Measured, error_estimate, first_scale, measure
from energynet.engine.saddle import driven_out, leave
from energynet.solution import Status
from energynet.solvers.base import Solver
from energynet.solvers.problem import Descent, Differentiable, Linear, Problem
from energynet.termination import Termination

RUNNING = -1
CLEARLY = 4  # a running sample at a distance of more than so many tolerances is measured no further
FAR = 1e6  # a sample has diverged when its distance exceeds the initial one by this factor
LOOK = 64  # the number of updates, doubled each time, after which all running samples are measured to correct their scales
MOST_LOOK = 2**40  # an upper limit, because a number that keeps doubling overflows
PATIENCE = 8  # the number of updates between two status checks on an accelerator
REACHED = 50  # the smallest tolerance for the residual of a linear equation, in rounding units of v
FRACTION = 0.1  # that tolerance is at most this fraction of the default √ε, which matters in half precision


class LoopState(NamedTuple):
    """Everything that changes from one step to the next; every field keeps its shape."""

    x: Tensor  # (*batch, n)
    inner: Any  # the solver's own state
    status: Tensor  # (*batch) int8
    steps: Tensor  # (*batch) int32
    error: Tensor  # (*batch), the estimate that is compared with the tolerance
    scale: Tensor  # (*batch), the curvature by which ‖F‖ is divided
    limit: Tensor  # (*batch), the error, or ‖x‖ for a solver that descends, beyond which a sample has diverged
    best: Tensor  # (*batch, n), the iterate with the smallest merit
    merit: Tensor  # (*batch)
    unit: Tensor  # (*batch), ‖x0‖, which sets the scale of x where ‖x‖ is smaller


Advance = Callable[[LoopState], LoopState]
Wrap = Callable[[Advance], Advance]


class Batch(Protocol):
    """A batch of samples, of which some can be solved separately."""

    @property
    def problem(self) -> Problem: ...

    def some(self, rows: Tensor) -> "Batch | None":
        """The samples with these indices; None if they depend on the others."""


def loop(
    problem: Problem,
    solver: Solver,
    termination: Termination,
    x0: Tensor,
    observe: Callable[[LoopState], None] | None = None,
    wrap: Wrap | None = None,
    every: int | None = None,
    batch: Batch | None = None,
) -> LoopState:
    """Solve until every sample has converged, failed, or taken ``max_steps`` updates.

    Args:
        problem: the problem to solve.
        solver: computes the updates.
        termination: the stopping criteria.
        x0: ``(*batch, n)``.
        observe: called with the state at the start and after each update.
        wrap: replaces the update by another function, such as several updates under a checkpoint.
        every: the number of updates between two checks whether any sample is still running; None: 1 on a CPU, `PATIENCE` on
            an accelerator, which has to be synchronized for each check.
        batch: the samples, where values can be read; the last few running ones may then continue as a smaller batch.
    """
    if tracing() and not solver.descends and not solver.measures_first:
        _ = problem.gamma  # computed once and not in each update
    every = every or (1 if x0.device.type == "cpu" else PATIENCE)
    state = _begin(problem, solver, termination, x0)
    if observe is not None:
        observe(state)
    interval = torch.full((), LOOK, dtype=torch.int64, device=x0.device)
    return _stop(
        _go_on(problem, solver, termination, state, interval, observe=observe, wrap=wrap, every=every, batch=batch), termination
    )


def _go_on(problem: Problem, solver: Solver, termination: Termination, state: LoopState, interval: Tensor, *,
           observe: Callable[[LoopState], None] | None, wrap: Wrap | None, every: int, batch: Batch | None
           ) -> LoopState:  # fmt: skip
    first = interval
    can_read = readable(state.status) or tracing()
    cache = _StatusCache() if readable(state.status) and state.x.device.type == "cpu" else None

    def update(state: LoopState) -> LoopState:
        return body(problem, solver, termination, state, cache)

    def any_running(state: LoopState) -> Tensor | bool:
        return _any_running(state) if cache is None else cache.any_running(state.status)

    advance = update if wrap is None else wrap(update)

    def observed(state: LoopState) -> LoopState:
        state = advance(state)
        if observe is not None:
            observe(state)
        # Where values cannot be read, every step is verified.
        return state if can_read else _verify(problem, solver, termination, state)

    def rounds(carry: tuple[Tensor, LoopState]) -> tuple[Tensor, LoopState]:
        interval, state = carry
        state = while_loop(any_running, observed, state, interval if scaled or batch else termination.limit, every)
        state = _verify(problem, solver, termination, state, state.status == RUNNING if scaled else None)
        rows = _last_running(state.status) if batch else None
        some = batch.some(rows) if batch and rows is not None else None
        if some is not None and rows is not None:
            rest = _tree.map_structure(lambda t: t[rows], state)
            rest = _go_on(some.problem, solver, termination, rest, 2 * interval, observe=observe, wrap=wrap, every=every,
                          batch=some)  # fmt: skip
            state = _tree.map_structure(lambda whole, part: whole.index_copy(0, rows, part), state, rest)
        return torch.clamp(2 * interval, max=MOST_LOOK), state

    scaled = not isinstance(problem, Linear) and can_read

    def unfinished(carry: tuple[Tensor, LoopState]) -> Tensor:  # convergence at the initial point is verified as well
        return (carry[0] == first) | _any_running(carry[1])

    return while_loop(unfinished, rounds, (interval, state), termination.limit + 1 if can_read else 1)[1]


def _last_running(status: Tensor) -> Tensor | None:
    """The indices of the running samples, if most samples of a large batch have finished."""
    running = (status == RUNNING).nonzero().flatten()
    return running if len(status) >= CROWD and 0 < 2 * len(running) <= len(status) else None


CROWD = 1024  # in smaller batches, updating a few samples takes as long as updating all of them


class _StatusCache:
    """Caches what was read from a status tensor, which stays the same object while no sample changes its status."""

    def __init__(self) -> None:
        self.status: Tensor | None = None
        self.any = self.all = False

    def any_running(self, status: Tensor) -> bool:
        if status is not self.status:
            running = status == RUNNING
            self.status, self.any, self.all = status, bool(running.any()), bool(running.all())
        return self.any

    def all_running(self, status: Tensor) -> bool:
        return self.any_running(status) and self.all


def body(problem: Problem, solver: Solver, termination: Termination, state: LoopState, cache: _StatusCache | None) -> LoopState:
    """One update of the running samples."""
    running = state.status == RUNNING
    x, inner = solver.update(problem, state.x, state.inner)
    everyone = cache is not None and cache.all_running(state.status)
    if not everyone:
        x = torch.where(running.unsqueeze(-1), x, state.x)
        inner = _tree.map_structure(lambda new, old: _where(running, new, old), inner, state.inner)
    with torch.no_grad():
        steps = state.steps + running.to(torch.int32)
        size = termination.size(inner.residual)
        error = error_estimate(problem, termination, x, size, state.scale)
        merit = solver.merit(inner, size)
        better = (merit < state.merit) & running
        merit = torch.where(better, merit, state.merit)
    best = torch.where(better.unsqueeze(-1), x, state.best)
    with torch.no_grad():
        moved = state._replace(x=x, inner=inner, steps=steps, error=error, merit=merit, best=best)
        if everyone and _all_go_on(problem, solver, termination, moved):
            return moved
        error = torch.where(running, error, state.error)
        moved = moved._replace(error=error)
        return moved._replace(status=torch.where(running, _judge(problem, solver, termination, moved), state.status))


def _all_go_on(problem: Problem, solver: Solver, termination: Termination, state: LoopState) -> bool:
    """Whether every sample continues: a short form of `_judge` for the usual case."""
    far = termination.size(state.x) if solver.descends else state.error
    goes_on = ~_within_tolerance(problem, termination, state) & (far <= state.limit) & (state.steps < termination.limit)
    for stopped in (solver.stalled(state.inner), solver.breakdown(state.inner)):
        goes_on = goes_on if stopped is None else goes_on & ~stopped
    return bool((goes_on & torch.isfinite(state.error)).all())


def _begin(problem: Problem, solver: Solver, termination: Termination, x0: Tensor) -> LoopState:
    x = x0.clone()
    inner = solver.init(problem, x)
    with torch.no_grad():
        size = termination.size(x)
        scale = first_scale(problem, termination, x, inner.residual)
        left = termination.size(inner.residual)
        error = error_estimate(problem, termination, x, left, scale)
        limit = FAR * (termination.size(problem.right) if isinstance(problem, Linear) else 1 + size + error)
        limit = FAR * FAR * (1 + size + error.nan_to_num(0, 0, 0)) if solver.descends else limit
        steps = torch.zeros_like(size, dtype=torch.int32)
        merit = solver.merit(inner, left)
        state = LoopState(x, inner, steps.to(torch.int8), steps, error, scale, limit, x, merit, size)
        # Outside its domain an energy may be NaN where its gradient is finite, as with log.
        status = torch.where(torch.isfinite(merit), _judge(problem, solver, termination, state), Status.NONFINITE)
        return state._replace(status=status.to(torch.int8))


def _judge(problem: Problem, solver: Solver, termination: Termination, state: LoopState) -> Tensor:
    finite = _finite(state.x, state.inner.residual)
    ended = state.steps >= termination.limit
    stalled, broken = solver.stalled(state.inner), solver.breakdown(state.inner)
    status = torch.where(ended, Status.MAX_STEPS, RUNNING)
    status = status if stalled is None else torch.where(stalled, Status.STALLED, status)
    far = (termination.size(state.x) if solver.descends else state.error) > state.limit
    status = torch.where(far if broken is None else far | broken, Status.DIVERGED, status)
    status = torch.where(_within_tolerance(problem, termination, state) & ~far, Status.CONVERGED, status)
    return torch.where(finite, status, Status.NONFINITE).to(torch.int8)


def _finite(x: Tensor, residual: Tensor) -> Tensor:  # (*batch, n) twice -> (*batch)
    """Whether all elements are finite, determined from their sum because that is cheaper than testing each one."""
    part = 0.5 / max(1, x.shape[-1])
    return torch.isfinite((part * x + part * residual).sum(-1))


def _within_tolerance(problem: Problem, termination: Termination, state: LoopState) -> Tensor:
    if not isinstance(problem, Linear):
        return (state.error <= termination.tolerance(state.x, state.unit)) & torch.isfinite(state.error)
    eps = torch.finfo(state.x.dtype).eps
    reached = min(REACHED * eps, FRACTION * eps**0.5)  # the attainable accuracy of a sum of products
    relative = max(termination.relative(eps), reached)
    return state.error <= relative * termination.size(problem.right) + problem.noise


def _verify(problem: Problem, solver: Solver, termination: Termination, state: LoopState,
            suspects: Tensor | None = None) -> LoopState:  # fmt: skip
    """Measure the optimality condition at the returned points; samples that stopped too early continue from there.

    ``suspects``, ``(*batch)`` bool, are running samples that are measured as well.
    """
    exhausted = (state.status == Status.MAX_STEPS) | (state.status == Status.STALLED)
    budgeted = termination.budget is not None
    if not readable(exhausted) or bool(exhausted.any()):
        # With a budget, the last iterate is the result that was asked for.
        state = state if budgeted else state._replace(x=torch.where(exhausted.unsqueeze(-1), state.best, state.x))
    elif isinstance(problem, Linear) and solver.exact_residual:
        return state
    with torch.no_grad():
        claimed = state.status == Status.CONVERGED
        claimed = claimed if suspects is None else claimed | suspects
        measured = claimed | exhausted
        goes_on = ~exhausted & (state.steps < termination.limit)
        enough = torch.where(goes_on, CLEARLY * termination.tolerance(state.x, state.unit), torch.inf)
        enough = torch.where(measured, enough, 0)
        measurement = _measured_at(problem, solver, termination, state, enough)
        error = torch.where(measured, measurement.error, state.error)
        converged = _within_tolerance(problem, termination, state._replace(error=error)) | measurement.settled
        x, escaped = _escaped(problem, termination, state, measurement, measured & (converged | exhausted))
        more, converged = state.steps < termination.limit, converged & ~escaped
        escaped = escaped & more
        reopened = (claimed & ~converged & more) | escaped
        # There is no curvature along the gradient even at the end: the energy decreases without bound in this direction.
        ended = torch.where(exhausted, state.status, Status.MAX_STEPS)
        ended = torch.where(torch.isinf(error) & (not budgeted), Status.DIVERGED, ended)
        ended = torch.where(converged, Status.CONVERGED, torch.where(reopened, RUNNING, ended))
        status = torch.where(measured, ended, state.status).to(torch.int8)
        # Where no curvature is found, as on the linear part of a Huber function, measure again a little later.
        known = measured & (measurement.scale > 0)
        scale = torch.where(known, measurement.scale, torch.where(reopened, 0.1 * state.scale, state.scale))
        grown = torch.maximum(state.limit, FAR * error.nan_to_num(0, 0, 0))
        limit = state.limit if solver.descends else torch.where(reopened, grown, state.limit)
        merit = torch.where(escaped, torch.inf, state.merit)
    x = torch.where(escaped.unsqueeze(-1), x, state.x)  # outside no_grad, because unrolling differentiates it
    state = state._replace(x=x, status=status, error=error, scale=scale, limit=limit, merit=merit)
    return _restarted(problem, solver, state, escaped if solver.exact_residual else reopened)


def _measured_at(problem: Problem, solver: Solver, termination: Termination, state: LoopState, enough: Tensor) -> Measured:
    """Measure the optimality condition at x."""
    if not isinstance(problem, Linear):
        is_map = not isinstance(problem, Differentiable)
        known = state.inner.residual if is_map and solver.exact_residual and _at_x(state) else None
        return measure(problem, termination, state.x, state.scale, known, 1 if solver.follows else 2, enough)
    residual = problem.residual(state.x)
    none = torch.zeros_like(state.error, dtype=torch.bool)
    return Measured(residual, None, termination.sure_size(residual), state.scale, none, none, residual)


def _at_x(state: LoopState) -> bool:
    """Whether the solver's residual is the one at x, and not at a later, worse iterate."""
    exhausted = (state.status == Status.MAX_STEPS) | (state.status == Status.STALLED)
    return readable(exhausted) and not bool(exhausted.any())


def _escaped(problem: Problem, termination: Termination, state: LoopState, seen: Measured, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The points at which samples continue from a saddle, and which samples do so."""
    if not isinstance(problem, Descent):
        return state.x, torch.zeros_like(rows)
    unit = torch.maximum(termination.size(state.x), state.unit)
    if seen.energy is None:
        return driven_out(problem, state.x, seen.direction, seen.saddle & rows, unit)
    return leave(problem, state.x, seen.energy, seen.residual, seen.direction, seen.saddle & rows, unit)


def _restarted(problem: Problem, solver: Solver, state: LoopState, rows: Tensor) -> LoopState:
    """The state with the solver's own state initialized again for some samples."""
    if readable(rows) and not bool(rows.any()):
        return state

    def begin(inner: Any) -> Any:
        return _tree.map_structure(lambda new, old: _where(rows, new, old), solver.init(problem, state.x), inner)

    return state._replace(inner=while_loop(lambda _: rows.any(), begin, state.inner, 1))


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:  # (*batch), (*batch, ...)
    return torch.where(mask.reshape((*mask.shape, *[1] * (new.ndim - mask.ndim))), new, old)


def _any_running(state: LoopState) -> Tensor:
    return (state.status == RUNNING).any()


def _stop(state: LoopState, termination: Termination) -> LoopState:
    """Under ``vmap`` no value can be read, so a sample that is still running after the last step has run out of steps."""
    status = torch.where(state.status == RUNNING, Status.MAX_STEPS, state.status)
    if termination.budget is not None:
        exhausted = (status == Status.MAX_STEPS) | (status == Status.STALLED)
        status = torch.where(exhausted, Status.BUDGET, status)
    return state._replace(status=status.to(torch.int8))

"""The only loop of the package: it moves, judges each sample, freezes the finished ones, and verifies every claim of
convergence.

`body` is a pure function on a `LoopState` of fixed shapes. `loop` drives it eagerly; a compiled driver can run the same
body. A sample that seems to have converged is frozen, and once no sample moves, `_verify` measures the optimality
condition anew at the returned points: whatever a solver believes, a residual is what was seen there. A sample that ran
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
from energynet.engine.saddle import leave
from energynet.solution import Status
from energynet.solvers.base import Solver
from energynet.solvers.problem import Descent, Differentiable, Linear, Problem
from energynet.termination import Termination

RUNNING = -1
FAR = 1e6  # a distance this many times larger than where the sample began is called divergence
LOOK = 64  # updates, then twice as many, after which all running samples are measured: their scale may have become wrong

MOST_LOOK = 2**40  # a number that doubles overflows in the end

PATIENCE = 8
REACHED = 50  # rounding units of v, below which no residual of a linear equation can be asked for
FRACTION = 0.1  # of the default tolerance √ε, which that does not exceed: in half precision there are few such units


class LoopState(NamedTuple):
    """All that changes from one step to the next; every field keeps its shape."""

    x: Tensor  # (*batch, n)
    inner: Any  # the solver's own state
    status: Tensor  # (*batch) int8
    steps: Tensor  # (*batch) int32
    error: Tensor  # (*batch), the estimate that is compared with the tolerance
    scale: Tensor  # (*batch), curvature by which ‖F‖ is divided
    limit: Tensor  # (*batch), distance, or ‖x‖ of a solver that descends, beyond which a sample has diverged
    best: Tensor  # (*batch, n), the iterate of least merit
    merit: Tensor  # (*batch)
    unit: Tensor  # (*batch), ‖x0‖: the scale of x where x itself does not show it


Advance = Callable[[LoopState], LoopState]
Wrap = Callable[[Advance], Advance]


class Batch(Protocol):
    """Samples whose problem is known, and that of any of them."""

    @property
    def problem(self) -> Problem: ...

    def some(self, rows: Tensor) -> "Batch | None":
        """The samples of these numbers; None where they depend on the others."""


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
        problem: what is solved.
        solver: how to move.
        termination: when to stop.
        x0: ``(*batch, n)``.
        observe: called with the state at the start and after each update.
        wrap: makes of one update what is run in its place, such as several ones under a checkpoint.
        every: updates between two looks at whether any sample still runs; None: 1 on a CPU, `PATIENCE` on an accelerator,
            which has to stop its work to be looked at.
        batch: where values can be read, the samples, of which the last few may go on alone.
    """
    if tracing() and not solver.descends:
        _ = problem.gamma  # once, and not in each update
    every = every or (1 if x0.device.type == "cpu" else PATIENCE)
    state = _begin(problem, solver, termination, x0)
    if observe is not None:
        observe(state)
    look = torch.full((), LOOK, dtype=torch.int64, device=x0.device)
    return _stop(_go_on(problem, solver, termination, state, look, observe=observe, wrap=wrap, every=every, batch=batch),
                 termination)


def _go_on(problem: Problem, solver: Solver, termination: Termination, state: LoopState, look: Tensor, *,
           observe: Callable[[LoopState], None] | None, wrap: Wrap | None, every: int, batch: Batch | None
           ) -> LoopState:  # fmt: skip
    first = look
    seen = readable(state.status) or tracing()
    glance = _Glance() if readable(state.status) and state.x.device.type == "cpu" else None

    def update(state: LoopState) -> LoopState:
        return body(problem, solver, termination, state, glance)

    def any_running(state: LoopState) -> Tensor | bool:
        return _any_running(state) if glance is None else glance.any_running(state.status)

    advance = update if wrap is None else wrap(update)

    def observed(state: LoopState) -> LoopState:
        state = advance(state)
        if observe is not None:
            observe(state)
        # Where nobody sees the end coming, every step is checked.
        return state if seen else _verify(problem, solver, termination, state)

    def rounds(carry: tuple[Tensor, LoopState]) -> tuple[Tensor, LoopState]:
        look, state = carry
        state = while_loop(any_running, observed, state, look if scaled or batch else termination.limit, every)
        state = _verify(problem, solver, termination, state, state.status == RUNNING if scaled else None)
        rows = _few(state.status) if batch else None
        some = batch.some(rows) if batch and rows is not None else None
        if some is not None and rows is not None:
            rest = _tree.map_structure(lambda t: t[rows], state)
            rest = _go_on(some.problem, solver, termination, rest, 2 * look, observe=observe, wrap=wrap, every=every, batch=some)
            state = _tree.map_structure(lambda whole, part: whole.index_copy(0, rows, part), state, rest)
        return torch.clamp(2 * look, max=MOST_LOOK), state

    scaled = not isinstance(problem, Linear) and seen

    def unfinished(carry: tuple[Tensor, LoopState]) -> Tensor:  # a claim made at the start is looked at as well
        return (carry[0] == first) | _any_running(carry[1])

    return while_loop(unfinished, rounds, (look, state), termination.limit + 1 if seen else 1)[1]


def _few(status: Tensor) -> Tensor | None:
    """The numbers of the samples that run, if most of a large batch have ended."""
    running = (status == RUNNING).nonzero().flatten()
    return running if len(status) >= CROWD and 0 < 2 * len(running) <= len(status) else None


CROWD = 1024  # samples, below which a turn of few takes as long as one of all


class _Glance:
    """Reads a status once, where reading is cheap: it stays the same object while nothing happens to any sample."""

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


def body(problem: Problem, solver: Solver, termination: Termination, state: LoopState, glance: _Glance | None) -> LoopState:
    """One update of the samples that still run."""
    running = state.status == RUNNING
    x, inner = solver.update(problem, state.x, state.inner)
    everyone = glance is not None and glance.all_running(state.status)
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
    """Whether there is nothing to judge: a short form of `_judge` for the usual case."""
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
        # Outside of its domain an energy may be NaN where its gradient is not, such as that of log.
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
    """Whether all numbers are: by their mean, which is cheaper than to ask each."""
    part = 0.5 / max(1, x.shape[-1])
    return torch.isfinite((part * x + part * residual).sum(-1))


def _within_tolerance(problem: Problem, termination: Termination, state: LoopState) -> Tensor:
    if not isinstance(problem, Linear):
        return (state.error <= termination.tolerance(state.x, state.unit)) & torch.isfinite(state.error)
    eps = torch.finfo(state.x.dtype).eps
    reached = min(REACHED * eps, FRACTION * eps**0.5)  # a sum of products is not known any better
    relative = max(termination.relative(eps), reached)
    return state.error <= relative * termination.size(problem.right) + problem.noise


def _verify(problem: Problem, solver: Solver, termination: Termination, state: LoopState,
            suspects: Tensor | None = None) -> LoopState:  # fmt: skip
    """Measure the condition at the returned points; samples that had stopped too early run again from there.

    Suspects are running samples, ``(*batch)`` bool, which are measured as well.
    """
    exhausted = (state.status == Status.MAX_STEPS) | (state.status == Status.STALLED)
    budgeted = termination.budget is not None
    if not readable(exhausted) or bool(exhausted.any()):
        # Of a budget, the last iterate is what was asked for.
        state = state if budgeted else state._replace(x=torch.where(exhausted.unsqueeze(-1), state.best, state.x))
    elif isinstance(problem, Linear) and solver.exact_residual:
        return state
    with torch.no_grad():
        claimed = state.status == Status.CONVERGED
        claimed = claimed if suspects is None else claimed | suspects
        measured = claimed | exhausted
        seen = _look(problem, solver, termination, state)
        error = torch.where(measured, seen.error, state.error)
        arrived = _within_tolerance(problem, termination, state._replace(error=error)) | seen.settled
        x, left = _left(problem, termination, state, seen, measured & (arrived | exhausted))
        more, arrived = state.steps < termination.limit, arrived & ~left
        left = left & more
        reopened = (claimed & ~arrived & more) | left
        # A gradient without any curvature along it, to the last: the energy falls forever in this direction.
        ended = torch.where(exhausted, state.status, Status.MAX_STEPS)
        ended = torch.where(torch.isinf(error) & (not budgeted), Status.DIVERGED, ended)
        ended = torch.where(arrived, Status.CONVERGED, torch.where(reopened, RUNNING, ended))
        status = torch.where(measured, ended, state.status).to(torch.int8)
        # Where no curvature is seen, as on the linear part of a Huber function, look again a little later.
        known = measured & (seen.scale > 0)
        scale = torch.where(known, seen.scale, torch.where(reopened, 0.1 * state.scale, state.scale))
        grown = torch.maximum(state.limit, FAR * error.nan_to_num(0, 0, 0))
        limit = state.limit if solver.descends else torch.where(reopened, grown, state.limit)
        merit = torch.where(left, torch.inf, state.merit)
    x = torch.where(left.unsqueeze(-1), x, state.x)  # with the graph that unrolling differentiates
    state = state._replace(x=x, status=status, error=error, scale=scale, limit=limit, merit=merit)
    return _begun_again(problem, solver, state, left if solver.exact_residual else reopened)


def _look(problem: Problem, solver: Solver, termination: Termination, state: LoopState) -> Measured:
    """Measure the condition at x."""
    if not isinstance(problem, Linear):
        is_map = not isinstance(problem, Differentiable)
        known = state.inner.residual if is_map and solver.exact_residual and _at_x(state) else None
        return measure(problem, termination, state.x, state.scale, known, 1 if solver.follows else 2)
    residual = problem.residual(state.x)
    none = torch.zeros_like(state.error, dtype=torch.bool)
    return Measured(residual, None, termination.sure_size(residual), state.scale, none, none, residual)


def _at_x(state: LoopState) -> bool:
    """Whether the solver's residual is that at x, and not at a later iterate that was worse."""
    exhausted = (state.status == Status.MAX_STEPS) | (state.status == Status.STALLED)
    return readable(exhausted) and not bool(exhausted.any())


def _left(problem: Problem, termination: Termination, state: LoopState, seen: Measured, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where a minimization goes on from a saddle, of some samples, and whether it does."""
    if not isinstance(problem, Descent) or seen.energy is None:
        return state.x, torch.zeros_like(rows)
    unit = torch.maximum(termination.size(state.x), state.unit)
    return leave(problem, state.x, seen.energy, seen.residual, seen.direction, seen.saddle & rows, unit)


def _begun_again(problem: Problem, solver: Solver, state: LoopState, rows: Tensor) -> LoopState:
    """With the solver's own state made anew in some samples."""
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
    """Under ``vmap`` no value can be read, so what still runs after the last step has run out of them."""
    status = torch.where(state.status == RUNNING, Status.MAX_STEPS, state.status)
    if termination.budget is not None:
        exhausted = (status == Status.MAX_STEPS) | (status == Status.STALLED)
        status = torch.where(exhausted, Status.BUDGET, status)
    return state._replace(status=status.to(torch.int8))

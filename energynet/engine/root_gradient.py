r"""Differentiates the root of an equation.

At a solution F(x*, θ) = 0. Differentiating gives A dx* = −(∂F/∂θ) dθ with A = ∂F/∂x, hence for an incoming gradient v

    Aᵀ u = v,        dL/dθ = −(∂F/∂θ)ᵀ u.                                                                        (1)

With F = (x − g)/γ the fixed-point form of (1) is the backward iteration of arXiv 2002.02868, c ← (∂g/∂x)ᵀ c + v with
u = γ c. With F = ∇E, A is the Hessian, which is symmetric, so conjugate gradients apply.

Both the solution x* of F(x, θ) = 0 and the solution u of F'(u; v, x, θ) = A(x, θ)ᵀ u − v = 0 are roots, and equation (1) holds
for both. So one ``autograd.Function``, `_Solve`, is enough: its backward calls itself on the linear equation, with
x* saved as its *output* and therefore still connected to the graph, and it differentiates F at the solution. A derivative
of any order is then a chain of such calls. Nothing is detached.

The rule for ``vmap`` calls the function again on the mapped equation. The rule for ``jvp`` solves A dx = b, where two
vector-Jacobian products give b.

A failed sample has no derivative and must not affect the gradients of shared inputs; see `failed_samples`.
"""

import dataclasses
import functools
import inspect
import threading
import warnings
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energynet._torch.autodiff import (
    alive,
    inside_jvp,
    is_grads_batched,
    opaque,
    pushforward,
    transform_active,
    unhooked,
    with_grads_batched,
)
from energynet.engine.advice import explained
from energynet.engine.driver import Driver, Eager
from energynet.engine.equation import Equation, Linear
from energynet.engine.failed_samples import MIXED, FailedSamples, input_kinds
from energynet.engine.loop import LoopState, Wrap, loop
from energynet.engine.post_mortem import PostMortem
from energynet.engine.shared_state import SharedState
from energynet.engine.tasks import Outcome, Solve, input_gradients, linear_equation, pulled_back
from energynet.solution import (
    LEFT_OUT,
    NONE_LEFT,
    UNSEPARATED,
    ConvergenceWarning,
    OnFailure,
    Status,
    describe,
    failed,
    report,
)
from energynet.solvers import Solver
from energynet.solvers.problem import Descent, Problem
from energynet.step import Step
from energynet.termination import Termination


class AdjointRecord(NamedTuple):
    """The result of one adjoint solve, per sample; it holds no reference to a graph.

    Example:
        >>> record = AdjointRecord(torch.tensor([0, 1]), torch.tensor([1e-6, 1e-2]), torch.tensor([7, 1000]))
        >>> record.status == Status.CONVERGED
        tensor([ True, False])
    """

    status: Tensor  # (*batch) int8
    residual: Tensor  # (*batch), ‖Aᵀu − v‖ / ‖v‖
    num_steps: Tensor  # (*batch) int32


class AdjointReport:
    """Summarizes all backward solves and keeps an `AdjointRecord` for each of the most recent ones.

    Example:
        >>> import torch
        >>> from energynet import FPI_GD, ImplicitAdjoint
        >>> seen = AdjointReport()
        >>> layer = FPI_GD(lambda x, z: (x - z).square().sum(-1), 0.5, adjoint=ImplicitAdjoint(report=seen))
        >>> layer(torch.ones(4, 2, requires_grad=True), x0=torch.zeros(4, 2)).sum().backward()
        >>> seen
        AdjointReport(1 solve, CONVERGED 4, steps≤1, residual≤0)
        >>> seen.records[0].num_steps.tolist()
        [1, 1, 1, 1]

    Args:
        keep: the number of most recent records to keep; the summary covers all solves.

    Raises:
        ValueError: if keep is not a whole number ≥ 0.
    """

    def __init__(self, keep: int = 1000) -> None:
        if type(keep) is not int or keep < 0:
            raise ValueError(f"AdjointReport needs a whole number of records to keep, got {keep!r}.")
        self.records: deque[AdjointRecord] = deque(maxlen=keep)
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Delete all records and reset the summary."""
        with self._lock:
            self.records.clear()
            self.num_solves = 0
            """The number of backward solves."""
            self._counts = torch.zeros(len(Status), dtype=torch.int64)
            self.max_steps, self.max_residual = 0, 0.0

    def add(self, record: AdjointRecord) -> None:
        """Add the result of a solve."""
        status, residual, steps = (t.detach().flatten() for t in record)
        finite = residual[torch.isfinite(residual)]
        with self._lock:
            self.records.append(AdjointRecord(*(t.detach() for t in record)))
            self.num_solves += 1
            self._counts += torch.bincount(status.long(), minlength=len(Status)).cpu()
            self.max_steps = max(self.max_steps, int(steps.amax()) if len(steps) else 0)
            self.max_residual = max(self.max_residual, float(finite.amax()) if len(finite) else 0.0)

    @property
    def counts(self) -> dict[Status, int]:
        """The number of samples per status, over all solves."""
        return {status: int(count) for status, count in zip(Status, self._counts, strict=True) if count}

    def __repr__(self) -> str:
        solves = f"{self.num_solves} solve{'' if self.num_solves == 1 else 's'}"
        ended = "".join(f", {status.name} {count}" for status, count in self.counts.items())
        return f"AdjointReport({solves}{ended}, steps≤{self.max_steps}, residual≤{self.max_residual:.2g})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())


class Adjoint(ABC):
    """Defines how a solution is differentiated."""

    def check(self, step: Step) -> None:
        """Raise TypeError if this adjoint does not support the step."""

    @abstractmethod
    def run(self, method: "Method", x0: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Solve so that the result is differentiable: x, status, residual, steps, and the trace if it was requested."""


class RootAdjoint(Adjoint):
    """An adjoint that depends only on the solution and not on the iterations."""

    def run(self, method: "Method", x0: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        followed = transform_active() or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))
        method = dataclasses.replace(method, followed=followed)
        x, status, error, steps, _, *trace = solve(method, self, x0.detach(), *inputs)
        return x, status, error, steps, *trace

    @abstractmethod
    def linear_solve(self, method: "Method", equation: Linear, *inputs: Tensor) -> "Answer":
        """The solution of a linear equation with the Jacobian at the solution."""

    def pull(self, method: "Method", wanted: tuple[bool, ...], v: Tensor, y: Tensor, inputs: tuple[Tensor, ...]
             ) -> tuple["Answer", list[Tensor | None]]:  # fmt: skip
        """Equation (1): A⁻ᵀ v and the gradients of the inputs."""
        return pulled_back(method.equation, wanted, v, y, inputs, functools.partial(self.linear_solve, method))

    @abstractmethod
    def guard(self, derivatives: list[Tensor | None], sources: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Post-process the derivatives; ``sources`` are the tensors from which they were computed."""


class Recorder:
    """Collects the states of the loop for a `Trace`."""

    def __init__(self, problem: Problem, termination: Termination) -> None:
        self.problem, self.termination = problem, termination
        self.sizes: list[Tensor] = []
        self.values: list[Tensor] = []
        self.energies: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, state: LoopState) -> None:
        self.sizes.append(self.termination.size(state.inner.residual))
        self.values.append(state.x.detach())
        if isinstance(self.problem, Descent) and self.problem.has_newton_step:
            self.energies.append(self.problem.energy(state.x))

    def tensors(self, state: LoopState) -> tuple[Tensor, ...]:
        """Residuals ``(T + 1, *batch)``, iterates ``(T + 1, *batch, n)`` and, for a minimization, energies."""
        traces = (torch.stack(self.sizes) / state.scale.detach(), torch.stack(self.values))
        return (*traces, torch.stack(self.energies)) if self.energies else traces


class Answer(NamedTuple):
    """The solution of a linear equation."""

    value: Tensor  # (*batch, n)
    failed: Tensor  # (*batch) bool
    kinds: Tensor  # from `input_kinds`


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """An equation and how to solve it."""

    equation: Equation
    solver: Solver
    termination: Termination
    on_failure: OnFailure
    report: AdjointReport | None = None
    trace: bool = False
    driver: Driver = dataclasses.field(default_factory=Eager)
    followed: bool = True
    """Whether a derivative may be asked for, which then has to keep failed samples away."""

    @property
    def shared(self) -> SharedState:
        """The state that the user's function reads besides its inputs."""
        return self.equation.binding.shared

    @property
    def limits(self) -> Termination:
        """The termination criteria at the precision of the unknowns."""
        return self.termination.at_precision(self.equation.rounding)

    def run(self, y0: Tensor, inputs: tuple[Tensor, ...], wrap: Wrap | None = None) -> tuple[Outcome, tuple[Tensor, ...]]:
        """Run the loop; the second result is the trace, which is empty unless it was requested."""
        if not (self.trace or wrap or torch.is_grad_enabled() or transform_active()):
            # Without their graphs, else every evaluation would record what a gradient of the inputs needs.
            plain = (t.detach() if t.requires_grad else t for t in (y0, *inputs))
            return Outcome(*self.driver.call(Solve(self.equation, self.solver, self.termination), tuple(plain))), ()
        problem = self.equation.problem(inputs, y0)
        recorder = Recorder(problem, self.limits) if self.trace else None
        state = loop(problem, self.solver, self.limits, y0, recorder, wrap)
        trace = () if recorder is None else recorder.tensors(state)
        return Outcome(state.x, state.status, state.error, state.steps), trace

    def apply_policy(self, outcome: Outcome, start: Tensor, inputs: tuple[Tensor, ...]) -> bool:
        """Apply the failure policy to the outcome of a solve from ``start``; returns whether no sample failed."""
        adjoint = isinstance(self.equation, Linear)
        if adjoint and self.report is not None:
            self.report.add(AdjointRecord(outcome.status, outcome.error, outcome.steps))
        bad = failed(outcome.status)
        if not bool(bad.any()):
            return True
        if self.on_failure != "ignore":
            report(self._explained(outcome, start, inputs), self.on_failure, NONE_LEFT if bool(bad.all()) else LEFT_OUT)
        return False

    def judged(self, outcome: Outcome, start: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Apply the failure policy; returns the kinds of the inputs if some samples failed, else an empty tensor."""
        if self.apply_policy(outcome, start, inputs) or not self.followed:
            return start.new_zeros(0, dtype=torch.int8)
        kinds = input_kinds(self.equation, outcome, inputs)
        if self.on_failure == "warn" and MIXED in kinds.tolist():
            warnings.warn(UNSEPARATED, ConvergenceWarning, stacklevel=2)
        return kinds

    def _explained(self, outcome: Outcome, start: Tensor, inputs: tuple[Tensor, ...]) -> str:
        try:
            return explained(PostMortem(self.equation, self.solver, self.limits, outcome, start, inputs))
        except Exception:  # an error while explaining a failure must not hide the failure
            return describe(outcome.status, outcome.error, outcome.steps)


class _Solve(torch.autograd.Function):
    """The root y of an equation, differentiable to any order and under every transform of ``torch.func``."""

    @staticmethod
    def forward(method: Method, adjoint: RootAdjoint, y0: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        with unhooked():
            outcome, trace = method.run(y0, inputs)
            return *outcome, method.judged(outcome, y0, inputs), *trace

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        method, adjoint, _, *tensors = inputs
        y, status, error, steps, kinds, *trace = output
        ctx.method, ctx.adjoint = method, adjoint
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(status, error, steps, kinds, *trace)
        ctx.traces = len(trace)
        ctx.save_for_backward(y, status, kinds, *tensors)
        ctx.save_for_forward(y, status, kinds, *tensors)

    @staticmethod
    @opaque  # a compiled training step calls this outside its graphs, where Dynamo would still trace it
    def backward(ctx: Any, v: Tensor | None, *_: Any) -> tuple[Any, ...]:
        y, status, kinds, *inputs = alive(ctx.saved_tensors)
        if v is None:
            return (None,) * (len(inputs) + 3)

        def gradients(v: Tensor) -> list[Tensor | None]:
            samples = FailedSamples.of(ctx.method.equation, status, kinds, tuple(inputs))
            with ctx.method.shared.unchanged():
                return _backward(ctx.method, ctx.adjoint, ctx.needs_input_grad[3:], v, y, samples)

        with ctx.method.equation.ambient.solving():
            return None, None, None, *(with_grads_batched(gradients, [v]) if is_grads_batched(v) else gradients(v))

    @staticmethod
    @opaque
    def jvp(ctx: Any, _method: Any, _adjoint: Any, _y0: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        ambient, shared = ctx.method.equation.ambient, ctx.method.shared
        with ambient.solving(), inside_jvp(ctx.saved_tensors) as (y, status, kinds, *inputs), shared.unchanged():
            samples = FailedSamples.of(ctx.method.equation, status, kinds, tuple(inputs))
            chosen, present = zip(*((k, t) for k, t in enumerate(tangents) if t is not None), strict=True)

            def product(*present: Tensor) -> list[Tensor | None]:
                return [_jvp(ctx.method, ctx.adjoint, dict(zip(chosen, present, strict=True)), y, samples)]

            batched = any(map(is_grads_batched, present))
            (dx,) = with_grads_batched(product, present) if batched else product(*present)
            return dx, *[None] * (4 + ctx.traces)

    @staticmethod
    def vmap(info: Any, in_dims: Any, method: Method, adjoint: RootAdjoint, y0: Tensor, *inputs: Tensor) -> tuple[Any, Any]:
        def front(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor if dim is None else tensor.movedim(dim, 0)

        y0 = front(y0, in_dims[2]) if in_dims[2] is not None else y0.expand(info.batch_size, *y0.shape)
        moved = [front(tensor, dim) for tensor, dim in zip(inputs, in_dims[3:], strict=True)]
        dims: list[int | None] = [None if dim is None else 0 for dim in in_dims[3:]]
        if isinstance(method.equation, Linear):  # v and x have the shape of u
            moved[:2] = [t if d == 0 else t.expand(info.batch_size, *t.shape) for t, d in zip(moved[:2], dims[:2])]
            dims[:2] = [0, 0]
        mapped = dataclasses.replace(method, equation=method.equation.mapped(tuple(dims), info.randomness))
        outputs = solve(mapped, adjoint, y0, *moved)
        return outputs, (0, 0, 0, 0, None, *[1] * (len(outputs) - 5))


_Solve.forward.__signature__ = inspect.signature(_Solve.forward)  # type: ignore[attr-defined]  # autograd reads it at each call


def solve(method: Method, adjoint: RootAdjoint, y0: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The differentiable solution y; its status, error and steps; the result of `judged`; and the trace, if any."""
    outputs: tuple[Tensor, ...] = _Solve.apply(method, adjoint, y0, *inputs)
    return outputs


def _backward(method: Method, adjoint: RootAdjoint, wanted: tuple[bool, ...], v: Tensor, y: Tensor, samples: FailedSamples
              ) -> list[Tensor | None]:  # fmt: skip
    """Equation (1), from which failed samples are excluded."""
    if samples.all:
        return samples.nothing(wanted, v)
    v, at, inputs = samples.silence(v), samples.answer(y), samples.inputs()
    answer, gradients = adjoint.pull(method, wanted, v, at, inputs)
    if len(answer.kinds):  # some samples failed in the adjoint solve as well
        samples = samples.joined(answer.failed, answer.kinds)
        if samples.all:
            return samples.nothing(wanted, v)
        at, inputs = samples.answer(y), samples.inputs()
        gradients = input_gradients(method.equation, wanted, samples.silence(answer.value), at, inputs)
    gradients = adjoint.guard(gradients, (at, *inputs))
    return [samples.mark(k, g, want) for k, (g, want) in enumerate(zip(gradients, wanted, strict=True))]


def _jvp(method: Method, adjoint: RootAdjoint, tangents: dict[int, Tensor], y: Tensor, samples: FailedSamples) -> Tensor:
    """dx = −A⁻¹ (∂F/∂inputs) dinputs, for the inputs with these indices."""
    if samples.all:
        return torch.nan * y
    y, inputs = samples.answer(y), samples.inputs()

    def residual(*values: Tensor) -> Tensor:
        full = list(inputs)
        for k, value in zip(tangents, values, strict=True):
            full[k] = value
        return method.equation.residual(y, *full)

    right = -pushforward(residual, [inputs[k] for k in tangents], list(tangents.values()))
    tangent, arguments = linear_equation(method.equation, False, y, inputs)
    answer = adjoint.linear_solve(method, tangent, samples.silence(right), *arguments)
    samples = samples.joined(answer.failed, answer.kinds)
    (guarded,) = adjoint.guard([answer.value], (y, *inputs))
    assert guarded is not None
    return torch.where(samples.bad.unsqueeze(-1), torch.nan, guarded) if samples.active else guarded

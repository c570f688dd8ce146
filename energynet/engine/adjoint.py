"""Adjoints, which differentiate a solution. The module `energynet.engine.root_gradient` contains the derivation."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
import torch.utils.checkpoint
from torch import Tensor

from energynet._torch.attention import twice_differentiable
from energynet._torch.autodiff import alive, inside_jvp, readable, transform_active
from energynet._torch.numbers import check_number, check_whole
from energynet.engine.equation import Linear
from energynet.engine.options import check_flag, expect
from energynet.engine.root_gradient import Adjoint, AdjointReport, Answer, Method, RootAdjoint, solve
from energynet.engine.shared_state import SharedState
from energynet.engine.tasks import Outcome, Pull, linear_equation
from energynet.linear import GMRES, MINRES, ConjugateGradient
from energynet.solution import UNROLLED, OnFailure, describe, failed, report
from energynet.solvers import Picard, Solver
from energynet.step import Kind, Step
from energynet.termination import Termination


@dataclasses.dataclass(frozen=True)
class ImplicitAdjoint(RootAdjoint):
    """Computes exact gradients of any order by the implicit function theorem; memory does not grow with the iterations.

    Example:
        >>> ImplicitAdjoint(Picard(), Termination(rtol=1e-6))     # the paper's backward fixed-point iteration
        ImplicitAdjoint(solver=Picard(), termination=Termination(atol=None, rtol=1e-06, max_steps=1000, budget=None), report=None)

    Args:
        solver: solves the adjoint equation. `ConjugateGradient` and `MINRES` need an energy; `GMRES`, `BiCGSTAB` and, for
            small problems, `Dense` work for any map, and so do the paper's backward fixed-point iteration, `Picard`, and its
            accelerated forms, `Anderson` and `Broyden`. Default: conjugate gradients for energies; the backward iteration
            for networks that the forward solve found to contract, that is, with `Picard` or `Nesterov` and without a
            budget; GMRES for other networks and for proximal steps.
        termination: tolerances relative to the incoming gradient; default: those of the forward solve, without its budget.
            With a ``budget`` of its own, the gradient is the result of that many steps.
        report: an `AdjointReport` that collects the status, residual and steps of each backward solve.

    Source: arXiv 2002.02868, equations of the backward FPI layer; Christianson (1994) for its higher orders.
    """

    solver: Solver | None = None
    termination: Termination | None = None
    report: AdjointReport | None = None

    def __post_init__(self) -> None:
        expect(self.solver, Solver, "solver")
        expect(self.termination, Termination, "termination")
        expect(self.report, AdjointReport, "report")

    def check(self, step: Step) -> None:
        if self.solver is not None:
            self.solver.check(Kind.SYMMETRIC if step.symmetric else Kind.LINEAR)

    def linear_solve(self, method: Method, equation: Linear, *inputs: Tensor) -> Answer:
        linear = self._linear(method, equation)  # itself differentiable again
        value, status, _, _, kinds, *_ = solve(linear, self, torch.zeros_like(inputs[0]), *inputs)
        return Answer(value, failed(status), kinds)

    def pull(self, method: Method, wanted: tuple[bool, ...], v: Tensor, y: Tensor, inputs: tuple[Tensor, ...]
             ) -> tuple[Answer, list[Tensor | None]]:  # fmt: skip
        if torch.is_grad_enabled() or transform_active():
            return super().pull(method, wanted, v, y, inputs)
        equation, arguments = linear_equation(method.equation, True, y, inputs)
        linear = self._linear(method, equation)
        function = Pull(method.equation, linear.solver, linear.termination, wanted)
        plain = (t.detach() if t.requires_grad else t for t in (v, y, *inputs))
        value, status, error, steps, *found = linear.driver.call(function, tuple(plain))
        kinds = linear.judged(Outcome(value, status, error, steps), torch.zeros_like(v), (v, *arguments))
        return Answer(value, failed(status), kinds), function.gradients(tuple(found), inputs)

    def _linear(self, method: Method, equation: Linear) -> Method:
        # The budget of the forward solve does not apply here: the gradient is to be exact.
        termination = self.termination or dataclasses.replace(method.termination, budget=None)
        solver = self.solver or _default_solver(method)
        return dataclasses.replace(
            method, equation=equation, solver=solver, termination=termination, report=self.report, trace=False
        )

    def guard(self, derivatives: list[Tensor | None], sources: tuple[Tensor, ...]) -> list[Tensor | None]:
        return derivatives


def _default_solver(method: Method) -> Solver:
    """Conjugate gradients for energies, the paper's iteration for maps that were found to contract, GMRES otherwise."""
    equation = method.equation
    if equation.symmetric:
        minimum = equation.linearized.kind is Kind.ENERGY  # where the matrix is positive definite
        return ConjugateGradient() if minimum else MINRES()
    contracts = equation.normalized and method.solver.contracts and method.termination.budget is None
    return Picard() if contracts else GMRES()


class _FirstOrderAdjoint(RootAdjoint):
    """Replaces A⁻¹ by the first terms of a damped Neumann series: an approximation, which refuses second derivatives."""

    terms: int
    damping: float

    def linear_solve(self, method: Method, equation: Linear, *inputs: Tensor) -> Answer:
        right, y, *rest = inputs
        gamma, zero = self.damping * method.equation.problem(tuple(rest), y).gamma, torch.zeros_like(right)
        term = total = gamma * right
        for _ in range(self.terms - 1):
            term = term - gamma * equation.residual(term, zero, y, *rest)
            total = total + term
        none = torch.zeros_like(right.sum(-1), dtype=torch.bool)
        return Answer(total, none, none.new_zeros(0, dtype=torch.int8))

    def guard(self, derivatives: list[Tensor | None], sources: tuple[Tensor, ...]) -> list[Tensor | None]:
        present = [d for d in derivatives if d is not None]
        guarded = iter(_FirstOrderOnly.apply(type(self).__name__, len(present), *present, *sources))
        return [None if d is None else next(guarded) for d in derivatives]


@dataclasses.dataclass(frozen=True)
class OneStepAdjoint(_FirstOrderAdjoint):
    """Takes the gradient of a single step at the solution, (∂g/∂θ)ᵀ v: cheap, first order only, and *not exact*.

    Its relative error is about the contraction factor, so it is exact only where ∂g/∂x = 0. Differentiating it again
    raises an error.

    Example:
        >>> OneStepAdjoint()
        OneStepAdjoint()

    Source: Fung et al. (2022), JFB: Jacobian-free backpropagation.
    """

    terms: ClassVar[int] = 1  # type: ignore[misc]
    damping: ClassVar[float] = 1.0  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class NeumannAdjoint(_FirstOrderAdjoint):
    """Uses the first terms of the Neumann series of (I − ∂g/∂x)⁻¹, a phantom gradient: first order only, and *not exact*.

    With contraction factor ρ, the relative error is ρ^terms. Differentiating it again raises an error.

    Example:
        >>> import torch
        >>> from energynet import fixed_point
        >>> z = torch.ones(1, 1, requires_grad=True)
        >>> x = fixed_point(lambda x, z: 0.5 * x + z, torch.zeros(1, 1), z, adjoint=NeumannAdjoint(terms=3)).value
        >>> torch.autograd.grad(x.sum(), z)[0]     # 1 + 1/2 + 1/4; exact: 2
        tensor([[1.7500]])

    Args:
        terms: the number of terms; each term after the first costs one vector-Jacobian product.
        damping: the damping factor of the map, in (0, 1]; choose a value below 1 if ∂g/∂x does not contract.

    Raises:
        ValueError: if terms < 1 or damping is out of range.

    Source: Geng et al. (2021), On training implicit models.
    """

    terms: int = 5
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_whole(self, "terms")
        check_number(self, "damping", "in (0, 1]", lambda v: 0 < v <= 1)


@dataclasses.dataclass(frozen=True)
class UnrolledAdjoint(Adjoint):
    """Backpropagates through the iterations, which is exact for the returned iterate, to any order.

    Memory grows with the number of iterations. The gradient is that of the truncated iteration, including its dependence on
    ``x0``, on the step size, and on the step lengths that a line search chooses. If no step size is passed, the estimated
    one has no derivative, so such a solve is refused; `LBFGS` needs no step size. With ``last``, only that many steps of the
    map, taken after the solve, are differentiated: this is *not exact*, first order only, and differentiating it again
    raises an error.

    Example:
        >>> UnrolledAdjoint(checkpoint=True)
        UnrolledAdjoint(last=None, checkpoint=True)

    Args:
        last: the number of steps to differentiate; None: all.
        checkpoint: store every 32nd iterate and recompute the others: less memory, twice the time. It does not work under
            ``torch.func``.

    Raises:
        ValueError: if last < 1, or when a solve would use an estimated step size.

    Source: Shaban et al. (2019), Truncated back-propagation for bilevel optimization; Griewank and Walther (2000).
    """

    last: int | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_flag(self.checkpoint, "checkpoint")
        check_whole(self, "last", optional=True)

    def run(self, method: Method, x0: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.checkpoint and transform_active():
            raise RuntimeError(
                "UnrolledAdjoint(checkpoint=True) was used under a torch.func transform or forward-mode AD, which have no "
                "checkpoints. Use checkpoint=False, or ImplicitAdjoint(), whose memory does not grow."
            )
        if self.last is None and not method.solver.unrollable:
            raise TypeError(
                f"UnrolledAdjoint cannot differentiate the updates of {type(method.solver).__name__}: their derivatives would be "
                f"wrong, or grow without bound. Use ImplicitAdjoint(), or {_differentiable(method.equation.kind)}."
            )
        if self.last is None and method.equation.binding.step.guessed and not method.solver.measures_first:
            other = ", or use LBFGS(), which needs none" if method.equation.kind is Kind.ENERGY else ""
            raise ValueError(
                f"UnrolledAdjoint differentiates every update of {type(method.solver).__name__}, but not the step size that is "
                f"estimated where none is given, so the gradient of the iterate would be wrong. Pass step_size=...{other}, or "
                "use ImplicitAdjoint()."
            )
        if self.last is not None:
            return self._last_steps(self.last, method, x0, inputs)
        wrap = (lambda f: _checkpointed(f, method.shared)) if self.checkpoint else None
        with twice_differentiable if torch.is_grad_enabled() or transform_active() else contextlib.nullcontext():
            outcome, trace = method.run(x0, inputs, wrap)
        if readable(outcome.status):
            method.apply_policy(Outcome(*(t.detach() for t in outcome)), x0.detach(), tuple(t.detach() for t in inputs))
        else:
            _Judge.apply(method.on_failure, outcome.status, outcome.error, outcome.steps)
        return *outcome, *trace

    def _last_steps(self, last: int, method: Method, x0: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        start, status, error, steps, _, *trace = solve(method, ImplicitAdjoint(), x0.detach(), *(t.detach() for t in inputs))
        x = start.detach()
        problem = method.equation.problem(inputs, x)
        step = _checkpointed(problem.map, method.shared, 1) if self.checkpoint else problem.map
        for _ in range(last):
            x = step(x)
        return _Truncated.apply("UnrolledAdjoint(last=...)", x, *inputs), status, error, steps, *trace


def _differentiable(kind: Kind) -> str:
    """The alternative that an error message suggests."""
    if kind is Kind.ENERGY:
        return "another solver, such as LBFGS(), or FixedStep() as the rule of GradientDescent"
    return "gradient steps of a given size, step_size=... with solver=Picard()"


def _checkpointed(function: Callable[[Any], Any], shared: SharedState, times: int = 32) -> Callable[[Any], Any]:
    """The function applied several times, under a checkpoint; whatever it reads must not have changed when it is recomputed."""

    def run(value: Any) -> Any:
        for _ in range(times):
            value = function(value)
        return value

    def checkpointed(value: Any) -> Any:
        runs = itertools.count()

        def repeated(value: Any) -> Any:
            with shared.unchanged() if next(runs) else contextlib.nullcontext():
                return run(value)

        return torch.utils.checkpoint.checkpoint(repeated, value, use_reentrant=False)

    return checkpointed


class _FirstOrderOnly(torch.autograd.Function):
    """The identity on inexact gradients, which raises when it is differentiated: second derivatives would be silently wrong.

    The tensors from which the gradients were computed are arguments as well. Otherwise, an approximation that does not
    depend on one of them would have the derivative 0, which is wrong.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        _refuse(ctx.name)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _refuse(ctx.name)


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name} is a first-order approximation; its derivative would be wrong. Use ImplicitAdjoint() for second derivatives."
    )


class _Truncated(torch.autograd.Function):
    """The identity on an iterate whose graph contains its last steps only; it refuses second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, x: Tensor, *inputs: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        sources = alive(ctx.saved_tensors)
        return None, *_FirstOrderOnly.apply(ctx.name, 1, v, *sources), *[None] * (len(sources) - 1)

    @staticmethod
    def jvp(ctx: Any, _name: Any, tangent: Tensor, *_: Any) -> Tensor:
        with inside_jvp(ctx.saved_tensors) as sources:
            guarded: Tensor = _FirstOrderOnly.apply(ctx.name, 1, tangent, *sources)[0]
            return guarded


class _Judge(torch.autograd.Function):
    """Applies the failure policy where values can be read: under ``vmap``, this is only possible inside a Function."""

    @staticmethod
    def forward(on_failure: OnFailure, status: Tensor, error: Tensor, steps: Tensor) -> Tensor:
        if on_failure != "ignore" and bool(failed(status).any()):
            report(describe(status, error, steps), on_failure, UNROLLED)
        return status.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, on_failure: OnFailure, *tensors: Tensor) -> tuple[Any, Any]:
        front = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[1:], strict=True)]
        batched = [t.expand(info.batch_size, *t.shape) if d is None else t for t, d in zip(front, in_dims[1:], strict=True)]
        return _Judge.apply(on_failure, *batched), 0

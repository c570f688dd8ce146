"""The two main functions, `fixed_point` and `minimize`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import opaque, readable, recording, tracing, transform_active, unhooked
from energynet._torch.numbers import check_function
from energynet._torch.tree import Layout
from energynet.energy import Energy, EnergyLike
from energynet.engine.adjoint import ImplicitAdjoint
from energynet.engine.ambient import Ambient
from energynet.engine.binding import Binding
from energynet.engine.curvature import check_hessian
from energynet.engine.driver import Driver, Eager
from energynet.engine.envelope import EnergyOf
from energynet.engine.equation import Arguments, Root
from energynet.engine.failed_samples import encoded_apart
from energynet.engine.options import check_batch_dims, check_flag
from energynet.engine.purity import unchanged, unwatched
from energynet.engine.root_gradient import Adjoint, Method, RootAdjoint
from energynet.engine.tasks import Outcome
from energynet.engine.validation import check_fit, check_options, check_start, examine
from energynet.proximal import Prox, ProximalStep
from energynet.solution import NO_ENERGY, AnswerEnergy, NoEnergy, OnFailure, Solution, Trace, failed
from energynet.solvers import LBFGS, Nesterov, Picard, ProjectedLBFGS, Solver
from energynet.step import GradientStep, Step, as_step
from energynet.termination import Termination


def fixed_point(
    step: Step | Callable[..., Any],
    x0: Any,
    *context: Any,
    batch_dims: int = 1,
    solver: Solver | None = None,
    termination: Termination | None = None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = "raise",
    trace: bool = False,
    driver: Driver | None = None,
) -> Solution:
    """Solve x = g(x, \\*context), differentiably with respect to the context and the parameters of g.

    Example:
        >>> import torch
        >>> z = torch.full((2, 1), 0.5, requires_grad=True)
        >>> x = fixed_point(lambda x, z: 0.5 * x + z, torch.zeros(2, 1), z).value     # x* = 2 z
        >>> torch.autograd.grad(x.sum(), z)[0].flatten().round(decimals=2)
        tensor([2., 2.])

    Args:
        step: g(x, \\*context) -> like x, a function, a module or a `Step`.
        x0: the initial point: a tensor ``(B, ...)`` or a pytree of such.
        context: the other arguments of g: tensors, pytrees and other objects; floating-point tensors are differentiated.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem.
        solver: default `Picard`.
        termination: default `Termination`.
        adjoint: default `ImplicitAdjoint`.
        on_failure: what to do about samples that do not converge, forward or backward: "raise", "warn" or "ignore".
        trace: whether to store residuals and iterates of every step in ``Solution.trace``.
        driver: runs the loop: `Eager`, the default, in Python, or `Compiled`, as a program compiled at the first call.

    Returns:
        `Solution`, with ``value`` like ``x0``. A sample that ran out of steps returns the best of its iterates.

    Raises:
        ConvergenceError: if a sample fails and ``on_failure="raise"``.
        LostGradientError: if g captures a tensor that carries a derivative.
        ChangedFunctionError: in the backward pass, if something that g reads and that cannot be copied has changed.
        ImpureFunctionError: if g is random, uses batch statistics, or changes its input.
        TypeError, ValueError: if x0 or the result of g has the wrong type or shape.

    Source: arXiv 2002.02868.
    """
    check_function(step, "step")
    check_batch_dims(batch_dims, optional=isinstance(step, Step))
    options = _Options.of(Picard(), batch_dims, solver=solver, termination=termination, adjoint=adjoint,
                          on_failure=on_failure, trace=trace, driver=driver)  # fmt: skip
    return _solve(as_step, (step,), x0, context, options)


def minimize(
    energy: EnergyLike,
    x0: Any,
    *context: Any,
    step_size: float | Tensor | None = None,
    prox: Prox | Callable[[Any, float | Tensor], Any] | None = None,
    solver: Solver | None = None,
    termination: Termination | None = None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = "raise",
    trace: bool = False,
    driver: Driver | None = None,
    batch_dims: int | None = None,
) -> Solution:
    """Find x* = argmin E(x, \\*context), differentiably with respect to the context and the parameters of E.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> energy = lambda x, z: 0.5 * x.square().sum(-1) + torch.cosh(x - z).sum(-1)
        >>> x = minimize(energy, torch.zeros(1, 2), z).value
        >>> torch.autograd.grad(x.sum(), z)[0].shape
        torch.Size([1, 2])

    Args:
        energy: E(x, \\*context) -> ``(B,)``; a 0-d value means one problem without a batch dimension.
        x0: the initial point: a tensor ``(B, ...)``, a pytree of such or a `MultiStart`; None: ``energy.start(*context)``.
        context: the other arguments of E: tensors, pytrees and other objects; floating-point tensors are differentiated.
        step_size: γ of gradient steps, a float, a 0-d tensor or one value per sample ``(B,)``. None: solvers that need one
            estimate it per sample from the largest curvature at x0, and reduce it if it turns out to be too large.
        prox: the proximal map of constraints and nonsmooth terms, such as ``energynet.constraints.Box(0.0, 1.0)``; their sum
            with E is minimized.
        solver: default `Picard` with a ``step_size``, else `LBFGS`; within bounds, ``prox=Box(...)`` or ``NonNegative()``,
            `ProjectedLBFGS`; with any other ``prox``, `Nesterov`.
        termination: default `Termination`.
        adjoint: default `ImplicitAdjoint`, by conjugate gradients on the Hessian; with a ``prox``, by GMRES.
        on_failure: what to do about samples that do not converge, forward or backward: "raise", "warn" or "ignore".
        trace: whether to store residuals, energies and iterates of every step in ``Solution.trace``.
        driver: runs the loop: `Eager`, the default, in Python, or `Compiled`, as a program compiled at the first call.
        batch_dims: 1 if the leading dimension of x counts samples and E returns ``(B,)``, 0 if there is one problem and E
            returns a 0-d value; None: the result of E determines it, with a warning if a 0-d value loses the batch of x.

    Returns:
        `Solution`, with ``value`` like ``x0``. A sample that ran out of steps returns the best of its iterates.

    Raises:
        ConvergenceError: if a sample fails and ``on_failure="raise"``.
        LostGradientError: if E captures a tensor that carries a derivative.
        ChangedFunctionError: in the backward pass, if something that E reads and that cannot be copied has changed.
        ImpureFunctionError: if E is random, uses batch statistics, or changes its input.
        TypeError, ValueError: if x0 or the result of E has the wrong type or shape.

    Source: arXiv 2002.02868, FPI_GD.
    """
    if x0 is None and isinstance(energy, Energy):
        with unchanged(f"{type(energy).__name__}.start", context):
            x0 = energy.start(*context)
    check_function(energy, "energy")
    check_batch_dims(batch_dims, optional=True)
    options = _Options.of(_default_solver(step_size, prox), batch_dims, solver=solver, termination=termination, adjoint=adjoint,
                          on_failure=on_failure, trace=trace, driver=driver)  # fmt: skip
    if isinstance(x0, MultiStart):
        return _from_best(x0, energy, context, step_size, prox, options)
    if prox is None:
        return _solve(GradientStep, (energy, step_size), x0, context, options)
    return _solve(ProximalStep, (energy, step_size, prox), x0, context, options)


def _default_solver(step_size: Any, prox: Any) -> Solver:
    """A step size selects gradient steps; otherwise the solver chooses its own."""
    if step_size is not None:
        return Picard()
    if prox is None:
        return LBFGS()
    return ProjectedLBFGS() if isinstance(prox, Prox) and prox.is_box else Nesterov()


@dataclasses.dataclass(frozen=True)
class MultiStart:
    """Several starting points; for each sample, `minimize` continues from the one that leads to the lowest energy.

    Example:
        >>> import torch
        >>> double_well = lambda x: (x**2 - 1).square().sum(-1) + 0.1 * x.sum(-1)
        >>> starts = MultiStart(torch.tensor([[[1.0]], [[-1.0]]]))       # (S, B, n)
        >>> minimize(double_well, starts).value.round(decimals=2)
        tensor([[-1.0100]])

    Args:
        starts: like ``x0`` with one more leading dimension, ``(S, B, ...)``.
    """

    starts: Any


@dataclasses.dataclass(frozen=True)
class _Options:
    """The options of a solve, which do not depend on the problem."""

    solver: Solver
    termination: Termination
    adjoint: Adjoint
    on_failure: OnFailure
    trace: bool
    driver: Driver
    batch_dims: int | None

    @classmethod
    def of(cls, default: Solver, batch_dims: int | None, *, solver: Solver | None, termination: Termination | None,
           adjoint: Adjoint | None, on_failure: OnFailure, trace: bool, driver: Driver | None) -> "_Options":  # fmt: skip
        """The checked options, with defaults in place of None."""
        check_options(solver, termination, adjoint, on_failure, driver)
        check_flag(trace, "trace")
        solver, termination, adjoint = solver or default, termination or Termination(), adjoint or ImplicitAdjoint()
        return cls(solver, termination, adjoint, on_failure, trace, driver or Eager(), batch_dims)


def _from_best(x0: MultiStart, energy: EnergyLike, context: Any, step_size: Any, prox: Any, options: _Options) -> Solution:
    """Solve from every start without gradients, then once more from the best solution, which is differentiated."""
    if prox is not None:
        raise ValueError("MultiStart compares energies, but the value of the term behind a prox is not known. Use one x0.")
    check_start(x0.starts)
    scout = dataclasses.replace(options, on_failure="ignore", trace=False)

    def try_one(start: Any) -> tuple[Any, Tensor, Tensor]:
        found = _solve(GradientStep, (energy, step_size), start, context, scout)
        value = energy(found.value, *context)
        # A failed start is used only if all starts failed.
        rank = torch.where(~found.failed, 0.0, torch.where(torch.isfinite(value), 1.0, 2.0))
        return found.value, torch.stack([rank.to(value.dtype), value]), found.num_steps

    with torch.no_grad():
        values, ranks, steps = torch.func.vmap(try_one)(x0.starts)
        by_energy = ranks[:, 1].nan_to_num(torch.inf).argsort(dim=0, stable=True)
        best = by_energy.gather(0, ranks[:, 0].gather(0, by_energy).argsort(dim=0, stable=True))[:1]  # (1, *batch)
        chosen = _tree.map_structure(lambda t: _rows(t, best), values)
    solution = _solve(GradientStep, (energy, step_size), chosen, context, options)
    return dataclasses.replace(solution, num_steps=solution.num_steps + _rows(steps, best))


def _rows(values: Tensor, best: Tensor) -> Tensor:  # (S, *batch, ...), (1, *batch) -> (*batch, ...)
    index = best.reshape((*best.shape, *[1] * (values.ndim - best.ndim))).expand((1, *values.shape[1:]))
    return values.gather(0, index)[0]


@opaque  # Dynamo would unroll the loop
def _solve(make_step: Callable[..., Step], arguments: tuple[Any, ...], x0: Any, context: tuple[Any, ...],
           options: _Options) -> Solution:  # fmt: skip
    if tracing():
        raise RuntimeError(
            "its energy or map solves a problem of its own, and a program could not report how that inner solve fails. "
            "Compile the inner solve, by its driver=Compiled(), and leave the outer solve to Eager()"
        )
    batch_dims = options.batch_dims
    with recording((arguments, x0, context)) as (arguments, x0, context):
        step = make_step(*arguments)
        check_fit(step, options.solver, options.adjoint)
        check_start(x0)
        binding = options.driver.bind(step)
        with unchanged("The encoder of the context", context):
            code = binding.step.encode(*context)
        x0 = binding.step.begin(x0, *code)
        looked_at = (x0, code, batch_dims)
        with unhooked():
            seen = options.driver.examined(binding, looked_at, lambda: examine(binding, x0, code, batch_dims))
        binding, layout = seen.used(binding), Layout.of(x0, seen.batch_dims)
        if seen.precision is None:
            with unwatched(), unhooked():
                check_hessian(step, binding, x0, code, seen.batch_dims)
        if isinstance(binding.step, ProximalStep) and binding.step.step_size is None:
            binding = options.driver.bind(_with_step_size(binding.step, layout, x0, code[1:], context))
        root, inputs = _equation(binding, layout, code, context, _device(x0))
        root = dataclasses.replace(root, precision=seen.precision)
        how = options.solver, options.termination, options.on_failure
        method = Method(root, *how, trace=options.trace, driver=options.driver)
        start = layout.ravel(x0)
        with unwatched(), root.ambient.solving():
            if options.on_failure != "raise":
                inputs = _with_code_apart(method, root, start, inputs)
            x, status, error, steps, *trace = options.adjoint.run(method, start, inputs)
        binding.shared.settle()
        outcome = Outcome(x, status, error, steps)
        return Solution(layout.unravel(x), *outcome[1:], _trace(layout, trace), _energy=_energy(root, outcome, inputs, options))


def _energy(root: Root, outcome: Outcome, inputs: tuple[Tensor, ...], options: _Options) -> AnswerEnergy:
    """The energy at the solution, which is evaluated on demand."""
    if root.binding.step.energy_of is None:
        return NoEnergy(NO_ENERGY)
    return EnergyOf(root, outcome, inputs, unrolled=not isinstance(options.adjoint, RootAdjoint))


def _trace(layout: Layout, tensors: list[Tensor]) -> Trace | None:
    if not tensors:
        return None
    error, value, *energy = tensors
    return Trace(error, layout.unravel(value), *energy)


@torch.no_grad()
def _with_step_size(step: ProximalStep, layout: Layout, x0: Any, code: Any, context: Any) -> ProximalStep:
    """The step with γ from the largest curvature of its smooth part at x0, because its optimality condition contains γ.

    The code is that of the energy, which is encoded once per solve.
    """
    binding = Binding.of(GradientStep(step.energy))
    root, inputs = _equation(binding, layout, code, context, _device(x0))
    with unwatched(), unhooked(), root.ambient.solving():
        gamma = root.problem(inputs, layout.ravel(x0)).gamma
    assert isinstance(gamma, Tensor)
    return dataclasses.replace(step, step_size=gamma.squeeze(-1), guessed=True)


def _with_code_apart(method: Method, root: Root, start: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs; if a code that is not finite makes a sample fail, it is disconnected from the encoder's weights."""
    code = [t for t in inputs[root.num_shared :][: root.num_code] if t.is_floating_point()]
    followed = torch.is_grad_enabled() or transform_active()
    if not root.num_context or not followed or not all(map(readable, (start, *inputs))):
        return inputs
    if all(bool(torch.isfinite(t).all()) for t in code):
        return inputs
    with torch.no_grad():
        outcome, _ = dataclasses.replace(method, on_failure="ignore", trace=False).run(start, inputs)
    bad = failed(outcome.status)
    some = bool(bad.any()) and not bool(bad.all())
    return encoded_apart(root, outcome.value, inputs, bad) if some and root.batch_dims else inputs


def _device(x0: Any) -> str:
    first: Tensor = _tree.leaves(x0)[0]
    return first.device.type


def _equation(binding: Binding, layout: Layout, code: Any, context: Any, device: str) -> tuple[Root, tuple[Tensor, ...]]:
    """The equation to solve, and the tensors on which it depends."""
    leaves, given = _tree.leaves(code), _tree.leaves(context)
    encoded = [id(leaf) for leaf in given] != [id(leaf) for leaf in leaves]
    inputs = (t for t in (*leaves, *(given if encoded else ())) if isinstance(t, Tensor))
    root = Root(binding, layout, Arguments.of(code), Arguments.of(context) if encoded else None, Ambient.now(device))
    return root, (*binding.tensors, *inputs)

"""The adjoints: how gradients of a solution come back. The derivation stands in `energynet.implicit`."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from energynet.implicit import Adjoint, AdjointReport, Answer, Method, RootAdjoint
from energynet.linear import ConjugateGradient
from energynet.loop import loop
from energynet.solution import OnFailure, report
from energynet.solvers import Picard, Solver
from energynet.step import Kind, Step
from energynet.termination import Termination


@dataclasses.dataclass(frozen=True)
class ImplicitAdjoint(RootAdjoint):
    """Exact gradients of any order by the implicit function theorem, in memory that does not grow with the iterations.

    Example:
        >>> ImplicitAdjoint(Picard(), Termination(rtol=1e-6))     # the paper's backward fixed-point iteration
        ImplicitAdjoint(solver=Picard(), termination=Termination(atol=None, rtol=1e-06, max_steps=1000), report=None)

    Args:
        solver: of the adjoint equation. `ConjugateGradient` needs an energy; `Picard` is the paper's backward fixed-point
            iteration and `Anderson` its accelerated form, for any map. Default: conjugate gradients for energies, the
            backward iteration for networks.
        termination: relative to the incoming gradient; default: the forward solve's.
        report: collects the status, residual and steps of each backward solve.

    Source: arXiv 2002.02868, equations of the backward FPI layer; Christianson (1994) for its higher orders.
    """

    solver: Solver | None = None
    termination: Termination | None = None
    report: AdjointReport | None = None

    def check(self, step: Step) -> None:
        if self.solver is not None:
            self.solver.check(Kind.SYMMETRIC if step.symmetric else Kind.LINEAR)

    def linear_solve(self, method: Method, transposed: bool, right: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Answer:
        solver = self.solver or (ConjugateGradient() if method.equation.symmetric else Picard())
        termination = self.termination or method.termination
        linear = dataclasses.replace(method, solver=solver, termination=termination, report=self.report)
        return linear.at_solution(transposed, right, y, inputs)

    def guard(self, derivatives: list[Tensor | None], sources: tuple[Tensor, ...]) -> list[Tensor | None]:
        return derivatives


@dataclasses.dataclass(frozen=True)
class OneStepAdjoint(RootAdjoint):
    """Gradient of a single step at the solution, (∂g/∂θ)ᵀ v: cheap, first order only, and *not exact*.

    It is right to a factor of the contraction: exact only where ∂g/∂x = 0. Differentiating it again raises.

    Example:
        >>> OneStepAdjoint()
        OneStepAdjoint()

    Source: Fung et al. (2022), JFB: Jacobian-free backpropagation.
    """

    def linear_solve(self, method: Method, transposed: bool, right: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Answer:
        none = torch.zeros_like(right.sum(-1), dtype=torch.bool)
        gamma = method.equation.problem(inputs, y).gamma
        return Answer(gamma * right, none, none.new_zeros(2, len(inputs)))

    def guard(self, derivatives: list[Tensor | None], sources: tuple[Tensor, ...]) -> list[Tensor | None]:
        present = [d for d in derivatives if d is not None]
        guarded = iter(_FirstOrderOnly.apply(len(present), *present, *sources))
        return [None if d is None else next(guarded) for d in derivatives]


@dataclasses.dataclass(frozen=True)
class UnrolledAdjoint(Adjoint):
    """Ordinary backpropagation through the iterations: exact for the iterate that is returned, any order.

    Memory grows with the number of iterations. The gradient is that of the truncated iteration, also with respect to
    ``x0`` and the step size.

    Example:
        >>> UnrolledAdjoint()
        UnrolledAdjoint()
    """

    def run(self, method: Method, x0: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        problem = method.equation.problem(inputs, x0)
        state = loop(problem, method.solver, method.termination, x0)
        _Judge.apply(method.on_failure, state.status, state.distance, state.steps)
        return state.x, state.status, state.distance, state.steps


class _FirstOrderOnly(torch.autograd.Function):
    """The identity on inexact gradients, which would give wrong second derivatives in silence: so it gives none.

    What they were made from is an argument too: an approximation that does not depend on it has a wrong derivative 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_FIRST_ORDER)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_FIRST_ORDER)


_FIRST_ORDER = (
    "OneStepAdjoint is a first-order approximation; its derivative would be wrong. Use ImplicitAdjoint() for second derivatives."
)


class _Judge(torch.autograd.Function):
    """Applies the failure policy where values can be read: under ``vmap`` only the inside of a Function sees them."""

    @staticmethod
    def forward(on_failure: OnFailure, status: Tensor, distance: Tensor, steps: Tensor) -> Tensor:
        report(status, distance, steps, on_failure)
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

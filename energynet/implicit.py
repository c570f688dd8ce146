"""Exact gradients for the solutions of an external solver."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.numbers import check_function
from energynet.engine.adjoint import ImplicitAdjoint
from energynet.engine.options import check_batch_dims, check_flag
from energynet.engine.root_gradient import Adjoint
from energynet.engine.validation import check_options
from energynet.solution import ConvergenceError, OnFailure
from energynet.solve import fixed_point
from energynet.solvers import Solver
from energynet.solvers.problem import Problem
from energynet.step import OptimalityStep
from energynet.termination import Termination


def implicit(
    solve: Callable[..., Any],
    optimality: Callable[..., Any],
    *,
    symmetric: bool = False,
    batch_dims: int = 0,
    termination: Termination | None = None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = "raise",
) -> Callable[..., Any]:
    """Make any solver differentiable to any order, by means of the condition that its solutions satisfy.

    Example:
        >>> import torch
        >>> def bisect(z):                                # anything: SciPy, a simulator, a table
        ...     low, high = torch.zeros_like(z), z + 1
        ...     for _ in range(60):
        ...         middle = (low + high) / 2
        ...         low, high = torch.where(middle**3 < z, middle, low), torch.where(middle**3 < z, high, middle)
        ...     return low
        >>> cube_root = implicit(bisect, lambda x, z: x**3 - z, symmetric=True)
        >>> z = torch.tensor([8.0, 27.0], requires_grad=True)
        >>> torch.autograd.grad(cube_root(z).sum(), z)[0]     # 1 / 3x²
        tensor([0.0833, 0.0370])

    Args:
        solve: (\\*context) -> x, a tensor or a pytree of such. It is called without gradients and on plain tensors; under
            ``vmap`` it is called once per index.
        optimality: F(x, \\*context) -> like x, zero at the solution: a gradient, a residual, g(x) − x.
        symmetric: whether ∂F/∂x is symmetric, as it is if F is a gradient.
        batch_dims: 1 if the leading dimension of x counts samples that do not depend on one another; 0 is always correct.
        termination: how accurately x must satisfy the condition, and how accurately the adjoint equation is solved; default
            `Termination`. With a ``budget``, x need not satisfy it, and is differentiated as if it did.
        adjoint: default `ImplicitAdjoint`: by MINRES if symmetric (definite or not), otherwise by GMRES.
        on_failure: what to do if x does not satisfy the condition: "raise", "warn" or "ignore".

    Returns:
        A differentiable function of the context with the same result as ``solve``.

    Raises:
        ConvergenceError: by that function, if x does not satisfy the condition, or if the gradient does not exist.
        TypeError: by that function, if ``solve`` returns anything except tensors.

    Source: Christianson (1994); Blondel et al. (2022), Efficient and modular implicit differentiation.
    """
    check_function(solve, "solve")
    check_function(optimality, "optimality")
    check_batch_dims(batch_dims)
    check_flag(symmetric, "symmetric")
    check_options(None, termination, adjoint, on_failure, None)
    termination = termination or Termination()
    adjoint = adjoint or ImplicitAdjoint()
    step = OptimalityStep(optimality, symmetric)

    def solved(*context: Any) -> Any:
        x = _call(solve, context)
        try:
            return fixed_point(
                step, x, *context, batch_dims=batch_dims, solver=_Given(), termination=termination, adjoint=adjoint,
                on_failure=on_failure,
            ).value  # fmt: skip
        except ConvergenceError as error:
            raise ConvergenceError(
                f"The result of {getattr(solve, '__name__', solve)} does not satisfy its optimality condition. {error}"
            ) from error

    return solved


class _GivenState(NamedTuple):
    residual: Tensor


class _Given(Solver):
    """Does not move: the solution is given, and only its condition is evaluated."""

    def init(self, problem: Problem, x0: Tensor) -> _GivenState:
        return _GivenState(problem.residual(x0))

    def update(self, problem: Problem, x: Tensor, state: _GivenState) -> tuple[Tensor, _GivenState]:
        return x, state

    def stalled(self, state: _GivenState) -> Tensor:
        return torch.ones_like(state.residual[..., :1].sum(-1), dtype=torch.bool)


def _call(solve: Callable[..., Any], context: tuple[Any, ...]) -> Any:
    """Call the black box on plain tensors, even under transforms."""
    leaves, spec = _tree.flatten(context)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    specs: list[Any] = []

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        arguments = _tree.unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        results, found = _tree.flatten(solve(*arguments))
        wrong = [type(r).__name__ for r in results if not isinstance(r, Tensor)]
        if wrong or not results:
            raise TypeError(
                f"{getattr(solve, '__name__', solve)} returned {wrong[0] if wrong else 'nothing'}; it must return tensors. "
                "Convert the result, for example by torch.from_numpy(...)."
            )
        specs[:] = [found]
        return tuple(results)

    outputs = _BlackBox.apply(call, *tensors)
    return _tree.unflatten(list(outputs), specs[0])


class _BlackBox(torch.autograd.Function):
    """A call without derivatives, because they come from the optimality condition."""

    @staticmethod
    def forward(call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        # The results are copied, because the black box may return its input or reuse its output.
        return tuple(t.detach().clone() for t in call(*(t.detach() for t in tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count, ctx.outputs = len(inputs), len(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return (None,) * ctx.outputs

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Any, Any]:
        def one(index: int) -> tuple[Tensor, ...]:
            chosen = (t if d is None else t.select(d, index) for t, d in zip(tensors, in_dims[1:], strict=True))
            outputs: tuple[Tensor, ...] = _BlackBox.apply(call, *chosen)
            return outputs

        rows = [one(index) for index in range(info.batch_size)]
        columns = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return columns, (0,) * len(columns)

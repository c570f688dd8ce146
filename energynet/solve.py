"""The two calls, `fixed_point` and `minimize`; user input is checked here and nowhere else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energynet import _tree
from energynet._autodiff import readable, recording
from energynet._tree import Layout
from energynet.adjoint import ImplicitAdjoint
from energynet.binding import Binding
from energynet.energy import Energy, EnergyLike
from energynet.equation import Constant, Root
from energynet.implicit import Adjoint, Method, RootAdjoint
from energynet.probe import probe, unwatched
from energynet.quarantine import replaced_by_good
from energynet.solution import POLICIES, OnFailure, Solution
from energynet.solvers import LBFGS, Picard, Solver
from energynet.step import GradientStep, Step, as_step
from energynet.termination import Termination


def fixed_point(
    step: Step | Callable[..., Any],
    x0: Any,
    *inputs: Any,
    batch_dims: int = 1,
    solver: Solver | None = None,
    termination: Termination | None = None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = "raise",
) -> Solution:
    """Solve x = g(x, \\*inputs), differentiably in the inputs and in the parameters of g.

    Example:
        >>> import torch
        >>> z = torch.full((2, 1), 0.5, requires_grad=True)
        >>> x = fixed_point(lambda x, z: 0.5 * x + z, torch.zeros(2, 1), z).value     # x* = 2 z
        >>> torch.autograd.grad(x.sum(), z)[0].flatten().round(decimals=2)
        tensor([2., 2.])

    Args:
        step: g(x, \\*inputs) -> like x, a function, a module or a `Step`.
        x0: where to start: a tensor ``(B, ...)`` or a pytree of such.
        inputs: tensors, pytrees and anything else that g takes; tensors of floating point are differentiated.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem.
        solver: default `Picard`.
        termination: default `Termination`.
        adjoint: default `ImplicitAdjoint`.
        on_failure: what to do about samples that do not converge, forward or backward: "raise", "warn" or "ignore".

    Returns:
        `Solution`, with ``value`` like ``x0``.

    Raises:
        ConvergenceError: if a sample fails and ``on_failure="raise"``.
        LostGradientError: if g uses a tensor from outside that carries a derivative.
        ImpureFunctionError: if g is random, keeps batch statistics, or changes its input.
        TypeError, ValueError: if x0 or the result of g has the wrong type or shape.

    Source: arXiv 2002.02868.
    """
    return _solve(as_step, (step,), x0, inputs, batch_dims, solver, termination, adjoint, on_failure)


def minimize(
    energy: EnergyLike,
    x0: Any,
    *context: Any,
    step_size: float | Tensor | None = None,
    solver: Solver | None = None,
    termination: Termination | None = None,
    adjoint: Adjoint | None = None,
    on_failure: OnFailure = "raise",
) -> Solution:
    """Find x* = argmin E(x, \\*context), differentiably in the context and in the parameters of E.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> energy = lambda x, z: 0.5 * x.square().sum(-1) + torch.cosh(x - z).sum(-1)
        >>> x = minimize(energy, torch.zeros(1, 2), z).value
        >>> torch.autograd.grad(x.sum(), z)[0].shape
        torch.Size([1, 2])

    Args:
        energy: E(x, \\*context) -> ``(B,)``; a 0-d value means one problem without a batch dimension.
        x0: where to start: a tensor ``(B, ...)`` or a pytree of such; None asks ``energy.start(*context)``.
        context: tensors, pytrees and anything else that E takes; tensors of floating point are differentiated.
        step_size: γ, a float, a 0-d tensor or one value a sample ``(B,)``; None: solvers that need one estimate it, sample
            by sample, from the largest curvature at x0. Of the default solver only the length of the first step.
        solver: default `LBFGS`.
        termination: default `Termination`.
        adjoint: default `ImplicitAdjoint`, by conjugate gradients on the Hessian.
        on_failure: what to do about samples that do not converge, forward or backward: "raise", "warn" or "ignore".

    Returns:
        `Solution`, with ``value`` like ``x0``.

    Raises:
        ConvergenceError: if a sample fails and ``on_failure="raise"``.
        LostGradientError: if E uses a tensor from outside that carries a derivative.
        ImpureFunctionError: if E is random, keeps batch statistics, or changes its input.
        TypeError, ValueError: if x0 or the result of E has the wrong type or shape.

    Source: arXiv 2002.02868, FPI_GD.
    """
    if x0 is None and isinstance(energy, Energy):
        x0 = energy.start(*context)
    return _solve(GradientStep, (energy, step_size), x0, context, None, solver or LBFGS(), termination, adjoint, on_failure)


@torch.compiler.disable  # Dynamo would unroll the loop
def _solve(
    make_step: Callable[..., Step],
    arguments: tuple[Any, ...],
    x0: Any,
    context: tuple[Any, ...],
    batch_dims: int | None,
    solver: Solver | None,
    termination: Termination | None,
    adjoint: Adjoint | None,
    on_failure: OnFailure,
) -> Solution:
    solver, termination = solver or Picard(), termination or Termination()
    adjoint = adjoint or ImplicitAdjoint()
    with recording((arguments, x0, context)) as (arguments, x0, context):
        step = make_step(*arguments)
        _check_options(step, solver, adjoint, on_failure)
        _check_start(x0)
        binding = Binding.of(step)
        code = binding.step.encode(*context)
        if on_failure != "raise":
            x0, code = _without_nonfinite(binding.step, x0, context, code)
        layout = Layout.of(x0, _examine(binding, x0, code, batch_dims))
        root, inputs = _equation(binding, layout, code, context)
        method = Method(root, solver, termination, on_failure, adjoint if isinstance(adjoint, RootAdjoint) else None)
        with unwatched():
            x, status, residual, steps = adjoint.run(method, layout.ravel(x0), inputs)
        return Solution(layout.unravel(x), status, residual, steps)


def _without_nonfinite(step: Step, x0: Any, context: Any, code: Any) -> tuple[Any, Any]:
    """Keep a sample whose context is not finite from the weights of an encoder, where 0 · NaN = NaN.

    It is encoded as if it were the first good sample, and starts at NaN, so that it fails. Only where the other samples'
    code is finite: elsewhere the NaN was in something shared.
    """
    rows = {leaf.shape[:1] for leaf in _tree.leaves(x0)}
    leaves, spec = _tree.flatten(context)
    size = next(iter(rows))
    own = [
        isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 0 and t.shape[:1] == size and t.numel() > 0 for t in leaves
    ]
    if len(rows) != 1 or not any(own) or not all(readable(t) for t in _tree.leaves((x0, context)) if isinstance(t, Tensor)):
        return x0, code
    bad = torch.stack([~torch.isfinite(t).reshape(len(t), -1).all(1) for t, yes in zip(leaves, own) if yes]).any(0)
    given = {id(leaf) for leaf in leaves}
    made = [t for t in _tree.leaves(code) if isinstance(t, Tensor) and t.shape[:1] == size and id(t) not in given]
    if not bad.any() or bad.all() or not made or not all(torch.isfinite(t[~bad]).all() for t in made):
        return x0, code
    replaced = [replaced_by_good(t, bad) if yes else t for t, yes in zip(leaves, own)]
    started = _tree.map_structure(lambda t: torch.where(bad.reshape(-1, *[1] * (t.ndim - 1)), torch.nan, t), x0)
    return started, step.encode(*_tree.unflatten(replaced, spec))


def _equation(binding: Binding, layout: Layout, code: Any, context: Any) -> tuple[Root, tuple[Tensor, ...]]:
    """What is to be solved, and the tensors that it depends on."""
    leaves, spec = _tree.flatten(code)
    given = _tree.leaves(context)
    encoded = [id(leaf) for leaf in given] != [id(leaf) for leaf in leaves]
    constants = tuple(None if isinstance(leaf, Tensor) else Constant(leaf) for leaf in leaves)
    inputs = (t for t in (*leaves, *(given if encoded else ())) if isinstance(t, Tensor))
    return Root(binding, layout, spec, constants, encoded), (*binding.tensors, *inputs)


# ------------------------------------------------------------------------------------------------- checks


def _check_options(step: Step, solver: Solver, adjoint: Adjoint, on_failure: OnFailure) -> None:
    if on_failure not in POLICIES:
        raise ValueError(f"on_failure must be one of {POLICIES}, got {on_failure!r}.")
    for option, kind in ((solver, Solver), (adjoint, Adjoint)):
        if not isinstance(option, kind):
            hint = f" Did you mean {option.__name__}()?" if isinstance(option, type) else ""
            raise TypeError(f"Expected a {kind.__name__}, got {option!r}.{hint}")
    solver.check(step.kind)
    adjoint.check(step)
    size = step.step_size
    if size is None:
        return
    if isinstance(size, Tensor):
        if not size.is_floating_point():
            raise TypeError(f"step_size must be floating point, got a tensor of {size.dtype}.")
        if not readable(size) or bool((size > 0).all() & torch.isfinite(size).all()):
            return
    elif 0 < size < float("inf"):
        return
    raise ValueError(f"step_size must be positive and finite, got {size}.")


def _check_start(x0: Any) -> None:
    leaves = _tree.leaves(x0)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        kinds = sorted({type(leaf).__name__ for leaf in leaves}) or ["nothing"]
        raise TypeError(
            f"x0 must be a tensor or a pytree of tensors, got {', '.join(kinds)}. Pass x0=..., give the layer start=..., or "
            "define start(*context) on the Energy."
        )
    wrong = [leaf.dtype for leaf in leaves if not leaf.is_floating_point()]
    if wrong:
        raise TypeError(
            f"x0 must be floating point, got {wrong[0]}: an iterate moves by fractions. Convert it, as by x0.float(); a complex "
            "one by torch.view_as_real."
        )


def _examine(binding: Binding, x0: Any, code: Any, batch_dims: int | None) -> int:
    """Evaluate the user's function once and hold its result against x0; the number of batch dimensions."""

    def function(tensors: list[Tensor], x: Any, *code: Any) -> Any:
        leaves = _tree.map_structure(lambda t: t.detach().requires_grad_(), x)  # to see that the energy's graph reaches x
        return binding.attach(tensors).probe(leaves, *code)

    step = binding.step
    tensors, (x, *_), output = probe(function, _name(step), list(binding.tensors), (x0, *code))
    step = binding.attach(tensors)
    if step.energy_of is None:
        batch_dims = 1 if batch_dims is None else batch_dims
        _check_map_output(_name(step), x, output)
    else:
        batch_dims = _check_energy_output(_name(step), x, output, batch_dims)
    if batch_dims:
        _check_batch(x, step.step_size)
    elif isinstance(step.step_size, Tensor) and step.step_size.ndim:
        raise ValueError(
            f"step_size has shape {tuple(step.step_size.shape)}, one value a sample, but the energy returns a 0-d value: one "
            "problem without a batch dimension."
        )
    return batch_dims


def _name(step: Step) -> str:
    """The user's function in an error message."""
    function = step.energy_of or getattr(step, "network", step)
    kind = "The energy" if step.energy_of is not None else "The map"
    name = getattr(function, "__qualname__", None) or type(function).__name__
    return f"{kind} {name}"


def _shapes(tree: Any) -> str:
    return str(_tree.map_structure(lambda t: tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__, tree))


def _check_map_output(name: str, x: Any, output: Any) -> None:
    (xs, spec), (outputs, output_spec) = _tree.flatten(x), _tree.flatten(output)
    same = spec == output_spec and all(isinstance(t, Tensor) and t.shape == s.shape for t, s in zip(outputs, xs))
    if not same:
        raise ValueError(f"{name} must return the structure and shapes of x, {_shapes(x)}, but returned {_shapes(output)}.")
    for t in outputs:
        if not t.is_floating_point():
            raise TypeError(f"{name} returned {t.dtype}; it must be floating point like x.")


def _check_energy_output(name: str, x: Any, output: Any, batch_dims: int | None) -> int:
    if not isinstance(output, Tensor):
        raise TypeError(f"{name} must return a tensor (B,), one scalar a sample, but returned {type(output).__name__}.")
    if not output.is_floating_point():
        raise TypeError(f"{name} returned {output.dtype}, which has no gradient; it must be floating point.")
    if not output.requires_grad:
        raise ValueError(
            f"{name} does not depend on x by operations that can be differentiated, so its gradient would be zero everywhere. "
            "Likely cause: .detach(), .item(), NumPy or torch.no_grad() inside, or x is not used."
        )
    expected = 0 if output.ndim == 0 else 1
    sizes = {leaf.shape[:1] for leaf in _tree.leaves(x)}
    if (batch_dims is not None and batch_dims != expected) or (expected and sizes != {output.shape}):
        raise ValueError(
            f"{name} returned shape {tuple(output.shape)} for x of shape {_shapes(x)}; it must return one scalar a sample, "
            "(B,) with B the leading dimension of x, or a 0-d tensor for one problem without a batch dimension. Sum over all "
            "dimensions but the first, as in .flatten(1).sum(-1)."
        )
    return expected


def _check_batch(x: Any, step_size: float | Tensor | None) -> None:
    leaves = _tree.leaves(x)
    if any(leaf.ndim == 0 for leaf in leaves) or len({leaf.shape[0] for leaf in leaves}) > 1:
        raise ValueError(
            f"x0 has shape {_shapes(x)}; every tensor in it needs the same leading batch dimension. For one problem without a "
            "batch dimension pass batch_dims=0 (or return a 0-d energy)."
        )
    if isinstance(step_size, Tensor) and step_size.ndim and step_size.shape != leaves[0].shape[:1]:
        raise ValueError(
            f"step_size has shape {tuple(step_size.shape)} but x0 has {leaves[0].shape[0]} samples; it must be a float, a 0-d "
            f"tensor or of shape ({leaves[0].shape[0]},)."
        )

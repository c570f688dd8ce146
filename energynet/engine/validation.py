"""Checks the user's arguments before the first step; all messages about them are in this module."""

import contextlib
import warnings
import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.attention import twice_differentiable
from energynet.engine.binding import Binding
from energynet.engine.driver import Driver
from energynet.engine.options import check_policy, check_step_size, expect
from energynet.engine.purity import ImpureFunctionError, Untouched, probe
from energynet.engine.root_gradient import Adjoint
from energynet.proximal import ProximalStep
from energynet.solvers import Solver
from energynet.step import Step
from energynet.termination import Termination


def check_options(solver: Any, termination: Any, adjoint: Any, on_failure: Any, driver: Any) -> None:
    """Refuse options of the wrong type; None stands for a default."""
    expect(solver, Solver, "solver")
    expect(termination, Termination, "termination")
    expect(adjoint, Adjoint, "adjoint")
    expect(driver, Driver, "driver")
    check_policy(on_failure)


def check_fit(step: Step, solver: Solver, adjoint: Adjoint) -> None:
    """Refuse a solver or an adjoint that does not support the step."""
    check_step_size(step.step_size)
    solver.check(step.kind)
    solver.require(step.energy_of)
    adjoint.check(step)


def check_start(x0: Any) -> None:
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
            f"x0 must be floating point, got {wrong[0]}. Convert it, for example by x0.float(), or a complex tensor by "
            "torch.view_as_real."
        )


class Examined(NamedTuple):
    """What one evaluation of the user's function shows."""

    batch_dims: int
    precision: torch.dtype | None  # the least precise dtype between x and the result, if coarser than x, as under autocast
    unused: tuple[int, ...]  # the indices of tensors of the binding that have a graph and that the function did not use

    def used(self, binding: Binding) -> Binding:
        """The binding without the unused tensors."""
        return binding.without([binding.tensors[k] for k in self.unused], Untouched.of) if self.unused else binding


def examine(binding: Binding, x0: Any, code: Any, batch_dims: int | None) -> Examined:
    """Evaluate the user's function once and check its result against x0."""

    def function(tensors: list[Tensor], x: Any, *code: Any) -> Any:
        leaves = _tree.map_structure(lambda t: t.detach().requires_grad_(), x)  # shows whether the energy's graph reaches x
        return binding.attach(tensors).probe(leaves, *code)

    step = binding.step
    try:
        with twice_differentiable if step.energy_of is not None else contextlib.nullcontext():
            seen = probe(function, _name(step), list(binding.tensors), (x0, *code), _with_graphs(binding),
                         encodes=step.energy_of is not None)  # fmt: skip
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # one of this package's own errors, or out of memory
            raise
        if "in-place operation" in str(error):
            raise ImpureFunctionError(f"{_name(step)} changes x in place: {error} Use the out-of-place operation.") from error
        raise RuntimeError(_unfit(_name(step), x0, code, list(binding.tensors), error)) from error
    x = seen.arguments[0]
    step = binding.attach(seen.own)
    if step.energy_of is None:
        batch_dims = 1 if batch_dims is None else batch_dims
        _check_map_output(_name(step), x, seen.output)
    else:
        if batch_dims is None and isinstance(seen.output, Tensor) and seen.output.ndim == 0:
            _warn_of_lost_batch(step.energy_of, _name(step), x)
        batch_dims = _check_energy_output(_name(step), x, seen.output, batch_dims)
    if batch_dims:
        _check_batch(x, step.step_size)
    elif isinstance(step.step_size, Tensor) and step.step_size.ndim:
        raise ValueError(
            f"step_size has shape {tuple(step.step_size.shape)}, one value per sample, but the energy returns a 0-d value, "
            "which means one problem without a batch dimension."
        )
    return Examined(batch_dims, _coarser(seen.dtypes, [t.dtype for t in _tree.leaves(x)]), seen.unused)


def _coarser(seen: Iterable[torch.dtype], own: Sequence[torch.dtype]) -> torch.dtype | None:
    """The least precise dtype in ``seen``, if it is coarser than x's own; a complex one is as precise as its real part."""
    worst = _tree.least_precise(*(dtype.to_real() if dtype.is_complex else dtype for dtype in seen), *own)
    return None if worst in own else worst


def _with_graphs(binding: Binding) -> list[int]:
    """The indices of the step's tensors with a graph: attributes that were computed, perhaps by an earlier forward pass."""
    if isinstance(binding.step, ProximalStep) and binding.step.step_size is None:
        return []  # its prox is not evaluated yet
    size = binding.step.step_size
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return [k for k, t in enumerate(binding.tensors) if not wrapped(t) and t.grad_fn is not None and t is not size]


def _unfit(name: str, x0: Any, code: tuple[Any, ...], held: list[Tensor], error: RuntimeError) -> str:
    """The message for an error of PyTorch, with the shapes, dtypes and devices of all arguments."""
    kinds = {what: [_kind(t) for t in _tree.leaves(tree) if isinstance(t, Tensor)]
             for what, tree in (("x0", x0), ("the context", code), ("its own tensors", held))}  # fmt: skip
    seen = "; ".join(f"{what}: {', '.join(dict.fromkeys(found))}" for what, found in kinds.items() if found)
    return (
        f"{name} failed at x0: {error}. Seen: {seen}. Likely cause: x0, context and parameters do not agree in shape, dtype or "
        "device; make x0 from the context, as by torch.zeros_like(z) or z.new_zeros(B, n)."
    )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device}"


def _name(step: Step) -> str:
    """The name of the user's function in an error message."""
    function = step.energy_of or getattr(step, "network", None) or getattr(step, "condition", step)
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
        raise TypeError(f"{name} must return a tensor (B,), one scalar per sample, but returned {type(output).__name__}.")
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
            f"{name} returned shape {tuple(output.shape)} for x of shape {_shapes(x)}; it must return one scalar per sample, "
            "(B,) with B the leading dimension of x, or a 0-d tensor for one problem without a batch dimension (batch_dims=0). "
            "Sum over all dimensions but the first, as in .flatten(1).sum(-1)."
        )
    return expected


_warned: "weakref.WeakSet[Any]" = weakref.WeakSet()  # energies, or the code of functions


def _warn_of_lost_batch(energy: Any, name: str, x: Any) -> None:
    """Warn once that a sum over all dimensions makes a batch one problem, in which one bad sample makes all fail."""
    if all(leaf.ndim < 2 for leaf in _tree.leaves(x)):
        return
    owner = getattr(getattr(energy, "__func__", energy), "__code__", energy)
    owner = owner if isinstance(owner, Hashable) else type(owner)
    if owner in _warned:
        return
    _warned.add(owner)
    warnings.warn(
        f"{name} returned one number for x of shape {_shapes(x)}, so all of x is one problem: its samples stop together, and if "
        "one fails, all fail. For one problem per sample, return (B,), as by .flatten(1).sum(-1) or .sum(-1) in place of .sum(); "
        "if one problem is meant, pass batch_dims=0.",
        stacklevel=2,
    )


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

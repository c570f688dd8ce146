"""First derivatives that can be differentiated again, by the cheaper of PyTorch's two engines.

``torch.autograd.grad`` takes half the time of ``torch.func``, but only the latter nests under ``torch.func``'s own
transforms and dual numbers. The choice between them is made here and nowhere else.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.attention import twice_differentiable
from energynet._torch.normalization import composed


def transform_active() -> bool:
    """Whether a ``torch.func`` transform or a dual level of ``torch.autograd.forward_ad`` is active here."""
    dual = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()  # not in a Function's forward
    return torch._C._functorch.peek_interpreter_stack() is not None or dual


Function = TypeVar("Function", bound=Callable[..., Any])


def opaque(function: Function) -> Function:
    """The effect of ``torch.compiler.disable`` without importing Dynamo, which takes as long as importing PyTorch itself."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # a traced caller does not trace into this function
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP  # Dynamo traces neither this frame nor the functions that it calls
    frames.set_code_exec_strategy(call.__code__, frames._FrameExecStrategy(skip, skip))
    return functools.wraps(function)(call)  # type: ignore[return-value]


LoopRecorder = Callable[[Callable[[Any], Any], Callable[[Any], Any], Any, int | Tensor, int], Any]
"""Records a loop in a program: condition, body, carry, limit and the number of updates between two checks."""


class _Recording(threading.local):
    recorder: LoopRecorder | None = None


_recording = _Recording()


def tracing() -> bool:
    """Whether this thread records a program, on tensors without values."""
    return _recording.recorder is not None


def loop_recorder() -> LoopRecorder | None:
    """The recorder of loops, if this thread records a program."""
    return _recording.recorder


@contextlib.contextmanager
def recording_program(recorder: LoopRecorder) -> Iterator[None]:
    """A context in which `tracing` is true and the recorder receives all loops."""
    before, _recording.recorder = _recording.recorder, recorder
    try:
        yield
    finally:
        _recording.recorder = before


def readable(tensor: Tensor) -> bool:
    """Whether Python can read the values: not under ``vmap``, and not while a program is recorded."""
    return not tracing() and not any(torch._C._functorch.is_batchedtensor(t) for t in wrappers(tensor))


def wrappers(tensor: Tensor) -> list[Tensor]:
    """The tensor and all tensors inside its ``torch.func`` wrappers, outermost first."""
    found = [tensor]
    while torch._C._functorch.is_functorch_wrapped_tensor(found[-1]):
        found.append(torch._C._functorch.get_unwrapped(found[-1]))
    return found


@contextlib.contextmanager
def recording(tree: Any) -> Iterator[Any]:
    """A context with the tensors of a pytree, in which graphs can be recorded: outside inference mode, as ordinary tensors."""
    if not torch.is_inference_mode_enabled():
        yield tree
        return
    with torch.inference_mode(False), torch.no_grad():
        yield _tree.map_structure(lambda t: t.clone() if isinstance(t, Tensor) and t.is_inference() else t, tree)


def unhooked() -> contextlib.AbstractContextManager[Any]:
    """In here, hooks of the caller's see nothing of what graphs save: those that a solve makes, it uses up itself.

    An activation checkpoint counts what is saved, which must be the same when it evaluates again, and ``save_on_cpu`` would
    move it all. Where PyTorch does not say whether there are hooks, they see everything.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    return contextlib.nullcontext() if top(False) is None else torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def alive(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Saved tensors without the wrappers of finished transforms, as when the function from ``torch.func.vjp`` is called."""
    return [torch._C._functorch.unwrap_if_dead(t) for t in tensors]


@contextlib.contextmanager
def inside_jvp(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The saved tensors in a Function's jvp rule, in a context in which outer forward-mode levels stay active.

    PyTorch disables forward mode there, for its own level and, wrongly, for all outer ones: jacfwd of jacfwd would silently
    lose terms. So it is enabled again, and only the tangents of this level are removed.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield [forward_ad.unpack_dual(t).primal if t.is_floating_point() else t for t in tensors]


def is_grads_batched(tensor: Tensor) -> bool:
    """Whether the tensor belongs to PyTorch's older vmap, for which a Function has no rule.

    It is used by ``autograd.grad(is_grads_batched=True)`` and by ``autograd.functional`` with ``vectorize=True``.
    """
    return torch._C._dispatch_keys(tensor).has("Batched")


def with_grads_batched(function: Callable[..., Sequence[Tensor | None]], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Map ``function`` over the hidden dimension of such tensors by ``torch.func.vmap``, and restore that dimension."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    present: list[bool] = []

    def some(*tensors: Tensor) -> tuple[Tensor, ...]:  # vmap returns tensors only
        results = function(*tensors)
        present[:] = [r is not None for r in results]
        return tuple(r for r in results if r is not None)

    hidden = [is_grads_batched(t) for t in tensors]
    shown = [torch._remove_batch_dim(t, level, 0, 0) if yes else t for t, yes in zip(tensors, hidden)]
    found = iter(torch.func.vmap(some, in_dims=tuple(0 if yes else None for yes in hidden))(*shown))
    return [torch._add_batch_dim(next(found), 0, level) if there else None for there in present]


def differentiated_again(function: Function) -> Function:
    """The function, with attention that has second derivatives, and normalization with all derivatives if a graph is built."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with twice_differentiable, _every_order():
            return function(*args, **kwargs)

    return functools.wraps(function)(call)  # type: ignore[return-value]


def _every_order() -> contextlib.AbstractContextManager[Any]:
    return composed() if torch.is_grad_enabled() or transform_active() else contextlib.nullcontext()


@differentiated_again
def gradient_of_sum(function: Callable[[Any], Tensor], x: Any) -> Any:
    """Gradient of ``function(x).sum()`` with respect to the pytree ``x``; differentiable where a graph is being built."""
    if transform_active():
        return torch.func.grad(lambda x: function(x).sum())(x)
    if isinstance(x, Tensor):
        (gradient,) = _pull(lambda x: function(x).sum(), [x], None)
        return torch.zeros_like(x) if gradient is None else gradient
    leaves, spec = _tree.flatten(x)
    gradients = _pull(lambda *leaves: function(_tree.unflatten(leaves, spec)).sum(), leaves, None)
    return _tree.unflatten([torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients)], spec)


@differentiated_again
def value_and_gradient_of_sum(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``function(x)`` and the gradient of its sum, from one evaluation; differentiable where a graph is being built."""
    if transform_active():

        def with_value(x: Tensor) -> tuple[Tensor, Tensor]:
            value = function(x)
            return value.sum(), value

        gradient, value = torch.func.grad(with_value, has_aux=True)(x)
        return value, gradient
    values: list[Tensor] = []

    def total(x: Tensor) -> Tensor:
        values.append(function(x))
        return values[0].sum()

    (found,) = _pull(total, [x], None)
    value = values[0] if found is not None and found.requires_grad else values[0].detach()
    return value, torch.zeros_like(x) if found is None else found


def pullback(function: Callable[..., Tensor], primals: Sequence[Tensor], cotangent: Tensor) -> Sequence[Tensor | None]:
    """Vector-Jacobian products of ``function`` at ``primals``; None for each primal on which it does not depend."""
    if not torch.is_grad_enabled() and not transform_active():
        return _pull(function, primals, cotangent)
    with twice_differentiable, composed():
        if not transform_active():
            return _pull(function, primals, cotangent)
        gradients: Sequence[Tensor | None] = torch.func.vjp(function, *primals)[1](cotangent)
        return gradients


@differentiated_again
def pushforward(function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    """Jacobian-vector product as two vector-Jacobian products: a nested ``torch.func.jvp`` would break dual numbers."""

    def transposed(cotangent: Tensor) -> tuple[Tensor, ...]:  # linear in the cotangent
        gradients: tuple[Tensor, ...] = torch.func.vjp(function, *primals)[1](cotangent)
        return gradients

    output = function(*primals)
    product: Tensor = torch.func.vjp(transposed, torch.zeros_like(output))[1](tuple(tangents))[0]
    return product


def linearize(function: Callable[[Tensor], Tensor], x: Tensor, transposed: bool) -> Callable[[Tensor], Tensor]:
    """The Jacobian of ``function`` at ``x``, or its transpose: linearized once and reused at each call, without a graph."""
    with torch.enable_grad(), contextlib.nullcontext() if transposed else twice_differentiable:
        x = x.detach().requires_grad_()
        output = function(x)
        if not output.requires_grad:
            return torch.zeros_like
        if transposed:
            return lambda u: _replay(output, x, u)
        dummy = torch.zeros_like(output, requires_grad=True)
        (product,) = torch.autograd.grad(output, x, dummy, create_graph=True, allow_unused=True)
    return torch.zeros_like if product is None else lambda u: _replay(product, dummy, u)


def columns(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:  # (*batch, n) -> (n, *batch, n)
    """A linear map of all n unit vectors, by ``vmap``, or one by one if that is not supported, as for NumPy code."""
    n = like.shape[-1]
    units = _identity(n, like).reshape(n, *[1] * (like.ndim - 1), n).expand(n, *like.shape)
    try:
        found: Tensor = torch.func.vmap(product)(units)
    except RuntimeError:
        found = torch.stack([product(unit) for unit in units])
    return found


_MARK = "_energynet_identity"


def _identity(n: int, like: Tensor) -> Tensor:
    """The identity matrix, whose memory is marked for `is_identity`."""
    matrix = torch.eye(n, dtype=like.dtype, device=like.device)
    if tracing():
        setattr(wrappers(matrix)[-1].untyped_storage(), _MARK, True)
    return matrix


def is_identity(matrix: Tensor) -> bool:  # (n, m)
    """Whether this is the whole, unmodified matrix of unit vectors from `columns`.

    No other identity matrix counts: if an energy multiplies I by an A that is not finite, the product is NaN and not A.
    """
    whole = matrix.shape[0] == matrix.shape[1] and matrix.is_contiguous() and not matrix._version
    return whole and hasattr(matrix.untyped_storage(), _MARK) and matrix.untyped_storage().nbytes() == matrix.nbytes


def leaf_variables(tensor: Tensor) -> list[Tensor]:
    """The leaf tensors of a graph."""
    seen: set[Any] = set()
    stack, found = [tensor.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _replay(output: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
    (product,) = torch.autograd.grad(output, x, cotangent, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if product is None else product


def _pull(function: Callable[..., Tensor], primals: Sequence[Tensor], cotangent: Tensor | None) -> Sequence[Tensor | None]:
    grad_enabled = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut the paths by which one primal depends on another, because partial derivatives are needed.
        aliases = [p.view_as(p) if grad_enabled and p.requires_grad else p.detach().requires_grad_() for p in primals]
        output = function(*aliases)
    if not output.requires_grad:
        return [None] * len(aliases)
    # No graph is built if only the aliases require grad.
    create_graph = grad_enabled and (any(p.requires_grad for p in primals) or _others_ask(output, aliases))
    return torch.autograd.grad(output, aliases, cotangent, create_graph=create_graph, allow_unused=True)


def _others_ask(output: Tensor, aliases: Sequence[Tensor]) -> bool:
    return any(all(v is not a for a in aliases) for v in leaf_variables(output))

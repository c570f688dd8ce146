"""Evaluates the user's function once before a solve, to find captured tensors, random numbers and in-place changes.

The evaluation runs on detached, unwrapped values, outside all ``torch.func`` transforms. So every tensor in it that carries
a derivative was either captured from outside or created inside, and these can be distinguished. The derivative of a
captured tensor would be lost silently.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode

from energynet._torch import tree as _tree
from energynet._torch.autodiff import leaf_variables, wrappers

_RANDOM_OR_STATEFUL = {
    torch.nn.functional.batch_norm: "normalizes over the batch (BatchNorm in training mode), which ties the samples together",
    torch.nn.functional.instance_norm: "updates running statistics (InstanceNorm in training mode)",
    torch.nn.functional.dropout: "draws random numbers (dropout in training mode)",
    torch.nn.functional.alpha_dropout: "draws random numbers (dropout in training mode)",
    torch.nn.functional.feature_alpha_dropout: "draws random numbers (dropout in training mode)",
    torch.nn.functional.dropout1d: "draws random numbers (dropout in training mode)",
    torch.nn.functional.dropout2d: "draws random numbers (dropout in training mode)",
    torch.nn.functional.dropout3d: "draws random numbers (dropout in training mode)",
}
_SETTERS = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__ifloordiv__", "__imod__",
            "__iand__", "__ior__", "__ixor__"}  # fmt: skip
_HARMLESS = {"requires_grad_", "retain_grad_", "detach_"}


class LostGradientError(RuntimeError):
    """A derivative would be lost: that of a captured tensor that is not an input of the solve, or a part of the Hessian."""


class Untouched(Tensor):
    """Replaces a tensor with a graph that the energy or map did not use when it was examined.

    If the tensor were an input of the solve, every backward pass would go through its graph, which may have been freed.
    """

    @classmethod
    def of(cls, tensor: Tensor) -> "Untouched":
        stand_in: Untouched = Tensor._make_subclass(cls, tensor.detach())
        return stand_in

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in _tree.leaves((args, kwargs)) if isinstance(t, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(tensors[0].shape) if tensors else ()
        raise LostGradientError(
            f"A tensor of shape {shape} with a graph is an attribute of the energy or map, which uses it in "
            f"{getattr(func, '__name__', func)} now but did not use it at x0. So it is not an input of the solve, and its "
            "gradient would be lost. Pass it as context."
        )


class ImpureFunctionError(RuntimeError):
    """The energy or map is not a pure function: it is random or stateful, mixes samples, or changes its input."""


class Probed(NamedTuple):
    """The result of one evaluation."""

    own: list[Tensor]  # the plain values of the function's own tensors
    arguments: Any  # the plain values of its arguments
    output: Any  # what the function returned for them
    dtypes: frozenset[torch.dtype]  # the dtypes of intermediate results that depend on an argument that requires grad
    unused: tuple[int, ...]  # the indices of doubtful tensors that no operation used and that no graph contains


def probe(function: Callable[..., Any], name: str, own: list[Tensor], arguments: Any, doubtful: Sequence[int], *,
          encodes: bool) -> Probed:  # fmt: skip
    """Evaluate ``function(own, *arguments)`` once on plain values and observe its operations.

    ``own`` contains the function's own tensors. Those with indices in ``doubtful`` require grad here, which shows whether the
    function uses them. ``encodes``: whether it can have an encoder, as energies can and maps cannot.

    Raises:
        LostGradientError: if the function captures a tensor that carries a derivative.
        ImpureFunctionError: if it draws random numbers, uses batch statistics or changes an input in place.
    """
    grad_enabled, level = torch.is_grad_enabled(), _depth()
    random_state = torch.get_rng_state()
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        own, arguments = _tree.map_structure(plain, (own, arguments))
        for k in doubtful:
            own[k].requires_grad_()
        copies = _tree.map_structure(lambda t: t.clone() if isinstance(t, Tensor) else t, arguments)
        watch = _Watch(name, own, (arguments, copies), grad_enabled, level, encodes=encodes)
        with unchanged(name, (own, copies)), watch:
            output = function(own, *copies)
    if not torch.equal(random_state, torch.get_rng_state()):
        raise ImpureFunctionError(
            f"{name} draws random numbers, so it is not the same function at each step. Draw them outside and pass them as "
            f"context{', or draw them in Energy.encode, which runs once per solve' if encodes else ''}."
        )
    reached = {id(v) for t in _tree.leaves(output) if doubtful and isinstance(t, Tensor) for v in leaf_variables(t)}
    unused = tuple(k for k in doubtful if id(own[k]) not in reached and _storage(own[k]) not in watch.touched)
    return Probed(own, arguments, output, frozenset(watch.dtypes), unused)


@contextlib.contextmanager
def unchanged(name: str, tree: Any) -> Iterator[None]:
    """Raise ImpureFunctionError if an operation inside this context changes a tensor of the tree, by its version counter."""
    tensors = [wrappers(t)[-1] for t in _tree.leaves(tree) if isinstance(t, Tensor)]
    before = [None if t.is_inference() else t._version for t in tensors]
    yield
    for tensor, version in zip(tensors, before, strict=True):
        if version is not None and tensor._version != version:
            raise ImpureFunctionError(_CHANGED.format(name=name, what="its input", how=f"shape {tuple(tensor.shape)}"))


_CHANGED = (
    "{name} changes {what} in place ({how}). The iteration and the caller would see the changed values. Use the out-of-place "
    "operation (of an activation inplace=False), or clone first."
)


def plain(tensor: Any) -> Any:
    """The value for the first index of each vmap, without graph, tangent or ``torch.func`` wrapper; it shares memory."""
    if not isinstance(tensor, Tensor):
        return tensor
    layers = wrappers(tensor)
    tensor = layers[-1]
    for wrapper in reversed(layers[:-1]):  # each batch dimension refers to the tensor that its wrapper contains
        dim = torch._C._functorch.maybe_get_bdim(wrapper)
        tensor = tensor if dim < 0 else tensor.select(dim, 0)
    if forward_ad._current_level >= 0:
        tensor = forward_ad.unpack_dual(tensor).primal
    return tensor.detach()


def _depth() -> int:
    """The number of active ``torch.func`` transforms."""
    stack = torch._C._functorch.peek_interpreter_stack()
    return 0 if stack is None else int(stack.level())


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Suspends observation for a solve inside an energy, which has examined its own function."""
    with contextlib.ExitStack() as stack:
        while isinstance(torch.overrides._get_current_function_mode(), _Watch):
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        yield


class _Watch(TorchFunctionMode):
    def __init__(self, name: str, own: Any, arguments: Any, grad_enabled: bool, level: int, *, encodes: bool) -> None:
        super().__init__()
        self.dtypes = set[torch.dtype]()
        self.name, self.grad_enabled, self.level = name, grad_enabled, level
        self.elsewhere = "move it to Energy.encode, which runs once per solve" if encodes else (
            "apply it outside and pass the result as context"
        )  # fmt: skip
        tensors = [t for t in _tree.leaves((own, arguments)) if isinstance(t, Tensor)]
        self.own = {_storage(t) for t in _tree.leaves(own)}
        self.arguments = {_storage(t) for t in _tree.leaves(arguments) if isinstance(t, Tensor)}
        self.dual = forward_ad._current_level >= 0
        # Storages that existed before, and those allocated inside (such as that of an nn.Parameter created there).
        self.old, self.fresh = self.own | self.arguments, set[int]()
        self.touched = set[int]()
        # Tensors created inside that could be mistaken for captured ones; under a transform, all of them.
        self.made: dict[int, Tensor] = {id(t): t for t in tensors if level or t.requires_grad}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in _tree.leaves((args, kwargs)) if isinstance(t, Tensor)]
        with torch._C.DisableTorchFunction():
            captured = self._captured(tensors)
            for tensor in tensors:
                self.touched.add(storage := _storage(tensor))
                if storage not in self.fresh:
                    self.old.add(storage)
            self._check_purity(func, args, kwargs)
        try:
            output = func(*args, **kwargs)
        except Exception as error:  # a tensor of an enclosing transform may fail in many ways
            if not captured:
                raise
            raise self._lost(captured, func) from error
        with torch._C.DisableTorchFunction():
            results = [t for t in _tree.leaves(output) if isinstance(t, Tensor)]
            if captured and self._carried_on([*results, *_written(func, args, kwargs)]):
                raise self._lost(captured, func)
            self.fresh.update(storage for storage in map(_storage, results) if storage not in self.old)
            self.dtypes.update(t.dtype for t in results if t.requires_grad)
            outside = {id(t) for t, _ in captured}
            for tensor in (*tensors, *results):
                if id(tensor) not in outside and (self.level or tensor.requires_grad):
                    self.made[id(tensor)] = tensor
        return output

    def _captured(self, tensors: list[Tensor]) -> list[tuple[Tensor, str]]:
        """The tensors from outside that carry a derivative, each with a description."""
        found = [(t, self._derivative_of(t)) for t in tensors if id(t) not in self.made]
        return [(t, why) for t, why in found if why is not None]

    def _carried_on(self, results: list[Tensor]) -> bool:
        """Whether the results carry a derivative; reading a shape, comparing or ``detach`` loses nothing."""
        return any(
            t.requires_grad
            or 0 < torch._C._functorch.maybe_get_level(t) <= self.level
            or (self.dual and forward_ad.unpack_dual(t).tangent is not None)
            for t in results
        )

    def _lost(self, captured: list[tuple[Tensor, str]], func: Any) -> LostGradientError:
        tensor, why = captured[0]
        return LostGradientError(
            f"{self.name} uses a tensor of shape {tuple(tensor.shape)} from outside that {why}, in "
            f"{getattr(func, '__name__', func)}. It is not an input of the solve, so its derivative would be silently "
            "lost. Pass it as context, or make it (or its module) an attribute of an nn.Module that is the energy or "
            "network; if it is meant as a constant, detach it."
        )

    def _derivative_of(self, tensor: Tensor) -> str | None:
        layers = wrappers(tensor)
        outer = torch._C._functorch.maybe_get_level(tensor)
        # The energy may use torch.func itself. Its levels start from 1 again, so a wrapper of an active level belongs to it
        # if the wrapped tensor was created inside.
        if 0 < outer <= self.level and (outer > _depth() or not any(id(t) in self.made for t in layers)):
            return f"belongs to a torch.func transform around the solve (level {outer})"
        value = layers[-1]
        if id(value) in self.made:
            return None
        if self.dual and forward_ad.unpack_dual(value).tangent is not None:
            return "carries a tangent (forward-mode AD)"
        if self.grad_enabled and value.requires_grad and self._from_outside(value):
            return "requires grad"
        return None

    def _from_outside(self, tensor: Tensor) -> bool:
        """Whether a tensor was captured; one that left a nested ``torch.func`` call is new, so its graph has to be searched."""
        if tensor.grad_fn is None:
            return _storage(tensor) not in self.fresh
        variables = leaf_variables(tensor)
        return not variables or any(id(v) not in self.made for v in variables)

    def _check_purity(self, func: Any, args: Any, kwargs: Any) -> None:
        reason = _RANDOM_OR_STATEFUL.get(func)
        if reason is not None and _training(func, args, kwargs):
            other = " replace it (LayerNorm, GroupNorm)," if "norm" in func.__name__ else ""
            raise ImpureFunctionError(
                f"{self.name} {reason}, so it is not the same function at each step. Call .eval() on that part,{other} or "
                f"{self.elsewhere}."
            )
        name, targets = getattr(func, "__name__", ""), _written(func, args, kwargs)
        if any(_storage(t) in self.own for t in targets):
            raise ImpureFunctionError(
                f"{self.name} changes its own parameter or buffer in place ({name}, shape {tuple(targets[0].shape)}), such as a "
                "running statistic of BatchNorm in training mode. So it is not the same function at each step. Call .eval() on "
                f"that part, replace it (LayerNorm, GroupNorm), or {self.elsewhere}."
            )
        foreign = [t for t in targets if _storage(t) not in self.fresh]
        if foreign:
            what = "its input" if any(_storage(t) in self.arguments for t in foreign) else "a tensor from outside"
            how = f"{name}, shape {tuple(foreign[0].shape)}"
            raise ImpureFunctionError(_CHANGED.format(name=self.name, what=what, how=how))


def _changes_its_argument(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes into its first argument, judging by its name or by its argument ``inplace``."""
    base = name.partition(".")[0]  # without the name of an overload, as in add_.Tensor
    if base in _SETTERS or (base.endswith("_") and not base.endswith("__") and base not in _HARMLESS):
        return True
    position = _place_of_inplace(func)
    return position is not None and bool(kwargs.get("inplace", args[position] if len(args) > position else False))


@functools.cache
def _place_of_inplace(func: Any) -> int | None:
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # a function in C++ has no signature
        return None
    return names.index("inplace") if "inplace" in names else None


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes in place."""
    changed = args[:1] if _changes_its_argument(func, getattr(func, "__name__", ""), args, kwargs) else ()
    return [t for t in _tree.leaves((changed, kwargs.get("out"))) if isinstance(t, Tensor)]


def _training(func: Any, args: Any, kwargs: Any) -> bool:
    functional = torch.nn.functional
    if func is functional.instance_norm:
        return bool(kwargs.get("use_input_stats", True)) and kwargs.get("running_mean") is not None
    if func is functional.batch_norm:
        return bool(kwargs.get("training", args[5] if len(args) > 5 else False))
    position, default = (2, False) if "alpha" in func.__name__ else (2, True)
    chance = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return bool(kwargs.get("training", args[position] if len(args) > position else default)) and chance > 0


def _storage(tensor: Tensor) -> int:
    tensor = wrappers(tensor)[-1]
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)

"""Every tensor of a step as an explicit input, without ever touching the caller's modules.

`Binding.of(step)` makes a structural copy once: same classes, same attributes, the tensors shared. `Binding.attach` makes
another with given tensors in their place. Nothing is swapped in and out of a module that others may be using, so threads
cannot meet, and a gradient cannot be lost on the way.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from energynet.step import Step


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """A step and the tensors found in it.

    Args:
        step: a structural copy; parametrized weights (spectral norm, ...) stand in it as computed once, here.
        tensors: its distinct parameters, buffers and plain tensor attributes.
        mark: a number that a driver gives to steps that read the same.
    """

    step: Step
    tensors: tuple[Tensor, ...]
    mark: int | None = None

    @classmethod
    def of(cls, step: Step) -> "Binding":
        resolved = _copy(step, lambda t: t, {})
        found: dict[int, Tensor] = {}
        _copy(resolved, lambda t: found.setdefault(id(t), t), {})
        return cls(resolved, tuple(found.values()))

    def attach(self, tensors: Sequence[Tensor]) -> Step:
        """The step with these tensors in place of its own."""
        chosen = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)}
        return _copy(self.step, lambda t: chosen[id(t)], {})


def with_tensors(value: Any, chosen: Mapping[int, Tensor], shared: Iterable[nn.Module]) -> Any:
    """A structural copy with other tensors in place of those whose ids are given; the modules named stay as they are."""
    return _copy(value, lambda t: chosen.get(id(t), t), {id(module): (module, module) for module in shared})


def parts_of(value: Any) -> dict[str, Any]:
    """What a value that is no module and no tensor consists of, as far as it may hold tensors, by name."""
    if isinstance(value, types.MethodType):
        return {"self": value.__self__}
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, dict):
        return {str(k): v for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return {str(k): v for k, v in enumerate(value)}
    return dict(vars(value)) if _may_hold_tensors(value) else {}


def _copy(value: Any, tensor: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    """A structural copy with ``tensor`` applied to each tensor; what holds no tensors is shared."""
    if id(value) in memo:
        return memo[id(value)][0]
    if isinstance(value, Tensor):
        result: Any = tensor(value)
    elif isinstance(value, nn.Module):
        if isinstance(value, torch.jit.ScriptModule):
            name = getattr(value, "original_name", type(value).__name__)
            raise TypeError(
                f"{name} is scripted: its tensors cannot be bound as inputs, and their gradients would be lost. Pass the module "
                "that torch.jit.script was given."
            )
        # What torch.compile wraps around a module holds the original in a closure, out of reach: take that one.
        return _copy_module(value._modules.get("_orig_mod") or value, tensor, memo)
    elif isinstance(value, types.MethodType):
        result = types.MethodType(value.__func__, _copy(value.__self__, tensor, memo))
    elif isinstance(value, functools.partial):
        keywords = {k: _copy(v, tensor, memo) for k, v in value.keywords.items()}
        result = functools.partial(_copy(value.func, tensor, memo), *_copy(value.args, tensor, memo), **keywords)
    elif isinstance(value, dict) and value:
        result = type(value)() if type(value).__init__ is dict.__init__ or type(value) is not dict else {}
        memo[id(value)] = (result, value)
        result.update({k: _copy(v, tensor, memo) for k, v in value.items()})
    elif isinstance(value, (list, tuple)) and value:
        parts = [_copy(v, tensor, memo) for v in value]
        result = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    elif _may_hold_tensors(value):
        return _copy_attributes(value, vars(value), tensor, memo)
    else:
        return value
    memo[id(value)] = (result, value)  # the original is kept alive: ids are unique among the living only
    return result


def _may_hold_tensors(value: Any) -> bool:
    """Steps, and instances of the user's own classes that can be called: not functions, classes or libraries' objects."""
    plain = isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType))
    return isinstance(value, Step) or (not plain and callable(value) and hasattr(value, "__dict__"))


def _copy_attributes(value: Any, attributes: dict[str, Any], tensor: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    result = object.__new__(type(value))
    memo[id(value)] = (result, value)
    object.__setattr__(result, "__dict__", {k: _copy(v, tensor, memo) for k, v in attributes.items()})
    return result


def _copy_module(module: nn.Module, tensor: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> nn.Module:
    result: nn.Module = _copy_attributes(module, vars(module), tensor, memo)
    if parametrize.is_parametrized(module):
        weights = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
        result.__class__ = type(module).__bases__[0]
        result._modules.pop("parametrizations")
        vars(result).update({name: tensor(weight) for name, weight in weights.items()})
    return result

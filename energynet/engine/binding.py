"""Makes every tensor of a step an explicit input, without modifying the caller's modules.

`Binding.of(step)` makes a structural copy once: it has the same classes and attributes, and it shares the tensors.
`Binding.attach` makes another copy with given tensors in their place. Tensors are never swapped in a module that others may be
using, so threads do not interfere and no gradient is lost.

The copy also fixes the definition of the step: its functions are copied together with the variables that they capture and the
globals that they name, so that a later backward pass differentiates the problem that was solved. `SharedState` checks
everything that cannot be copied for changes.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from energynet.engine.code import unwrapped
from energynet.engine.functions import Functions, Memo
from energynet.engine.shared_state import SharedState, Survey, holds_attributes, refuse_scripted
from energynet.step import Step


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """A step and the tensors that it contains.

    Args:
        step: a structural copy, in which parametrized weights (spectral norm, ...) are computed once.
        tensors: its distinct parameters, buffers and plain tensor attributes.
        shared: everything else that the step reads, with its state when the solve was called.
        mark: a number by which a driver identifies steps that read the same state.
    """

    step: Step
    tensors: tuple[Tensor, ...]
    shared: SharedState
    mark: int | None = None

    @classmethod
    def of(cls, step: Step) -> "Binding":
        survey = Survey(step)
        resolved = _Copy(lambda t: t, Functions(survey.written))(step)
        found: dict[int, Tensor] = {}
        _Copy(lambda t: found.setdefault(id(t), t))(resolved)
        tensors = tuple(found.values())
        return cls(resolved, tensors, SharedState.of(survey, tensors))

    def attach(self, tensors: Sequence[Tensor]) -> Step:
        """The step with these tensors in place of its own; attributes that the step itself has set are kept."""
        chosen = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)}
        step: Step = _Copy(lambda t: chosen.get(id(t), t))(self.step)
        return step

    def without(self, tensors: Sequence[Tensor], stand_in: Callable[[Tensor], Tensor]) -> "Binding":
        """The same binding, with a stand-in for each of the given tensors, which the step does not use."""
        out = {id(t) for t in tensors}
        step = _Copy(lambda t: stand_in(t) if id(t) in out else t)(self.step)
        return dataclasses.replace(self, step=step, tensors=tuple(t for t in self.tensors if id(t) not in out))

    def again(self) -> "Binding":
        """The same binding for another solve, for use when only the values of tensors have changed since."""
        return dataclasses.replace(self, shared=self.shared.again())


def with_tensors(value: Any, chosen: Mapping[int, Tensor], shared: Iterable[nn.Module]) -> Any:
    """A structural copy that replaces the tensors whose ids are given, and that shares the given modules."""
    copy = _Copy(lambda t: chosen.get(id(t), t))
    copy.memo.update({id(module): (module, module) for module in shared})
    return copy(value)


def parts_of(value: Any) -> dict[str, Any]:
    """The parts of a value that may contain tensors, by name; the value is neither a module nor a tensor."""
    if isinstance(value, types.MethodType):
        return {"self": value.__self__}
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, dict):
        return {str(k): v for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return {str(k): v for k, v in enumerate(value)}
    return dict(vars(value)) if holds_attributes(value) else {}


class _Copy:
    """Makes structural copies with ``tensor`` applied to each tensor; values without tensors are shared.

    Args:
        tensor: maps a tensor to its replacement.
        functions: copies functions; None: they are shared.
    """

    def __init__(self, tensor: Callable[[Tensor], Tensor], functions: "Functions | None" = None) -> None:
        self.tensor, self.functions = tensor, functions
        self.memo: Memo = {}

    def __call__(self, value: Any) -> Any:
        if id(value) in self.memo:
            return self.memo[id(value)][0]
        if isinstance(value, (nn.Module, types.FunctionType, staticmethod)) and (inner := unwrapped(value)) is not value:
            return self(inner)
        if isinstance(value, Tensor):
            result: Any = self.tensor(value)
        elif isinstance(value, nn.Module):
            return self._module(value)
        elif isinstance(value, types.FunctionType):
            return value if self.functions is None else self.functions.copy(value, self.memo)
        elif isinstance(value, types.MethodType):
            result = types.MethodType(value.__func__, self(value.__self__))
        elif isinstance(value, functools.partial):
            keywords = {k: self(v) for k, v in value.keywords.items()}
            result = functools.partial(self(value.func), *self(value.args), **keywords)
        elif isinstance(value, dict) and value:
            result = type(value)() if type(value).__init__ is dict.__init__ or type(value) is not dict else {}
            self.memo[id(value)] = (result, value)
            result.update({k: self(v) for k, v in value.items()})
        elif isinstance(value, (list, tuple)) and value:
            parts = [self(v) for v in value]
            result = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        elif holds_attributes(value):
            return self._attributes(value)
        else:
            return value
        self.memo[id(value)] = (result, value)
        return result

    def _attributes(self, value: Any) -> Any:
        result = object.__new__(type(value))
        self.memo[id(value)] = (result, value)
        object.__setattr__(result, "__dict__", {k: self(v) for k, v in vars(value).items()})
        return result

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            refuse_scripted(module)
        result: nn.Module = self._attributes(module)
        if parametrize.is_parametrized(module):
            weights = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
            result.__class__ = type(module).__bases__[0]
            result._modules.pop("parametrizations")
            vars(result).update({name: self.tensor(weight) for name, weight in weights.items()})
        vars(result)["_compiled_call_impl"] = None  # module.compile() sets this attribute, which would call the original
        return result

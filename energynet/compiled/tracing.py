"""Compiles Python functions of tensors into programs.

A `Program` runs a function once on fake tensors and records every operation, including those from modules, autograd and
``torch.func``. Inductor compiles the recorded graph.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from energynet._torch import tree as _tree
from energynet._torch.autodiff import recording_program
from energynet.compiled.cuda_graphs import Recordings
from energynet.compiled.loops import lift, record_loop
from energynet.compiled.simplify import simplify

_OFFSET = re.compile(r" and L\['t\d+'\]\.storage_offset\(\) == 0")  # irrelevant, because a program receives addresses
CPU = "cpu"  # here loops are machine code, so no CUDA graph has to be recorded


class Program:
    """A function of tensors, compiled for certain shapes.

    Args:
        function: tensors -> a tuple of tensors, by operations that PyTorch can record.
        examples: tensors like the arguments of later calls.
        dynamic: for each of them, the dimensions whose sizes may differ between calls.
        options: Inductor's options.
        parts: the number of argument sets that are processed in parallel, by as many threads.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], examples: Sequence[Tensor],
                 dynamic: Sequence[Sequence[int]], options: dict[str, Any], parts: int = 1) -> None:  # fmt: skip
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        from energynet.compiled.inductor import compile_graph, recorded_as

        self.sizes, self.parts = [t.shape for t in examples], parts
        self._shapes = ShapeEnv()
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self._shapes)
        fakes: list[Any] = [_fake(mode, t, dims) for t, dims in zip(examples, dynamic, strict=True)]
        with _alone(), torch.no_grad(), recording_program(record_loop), ValuesUnread(), mode:
            graph = make_fx(lambda *t: list(function(*t)), recorded_as(), _allow_non_fake_inputs=True)(*fakes)
        self.captured = lift(graph)
        """Tensors that the function captures."""
        simplify(graph)
        if any(lazy(t) for t in self.captured):
            raise RuntimeError("it captures a lazily conjugated or negated tensor: take its .resolve_conj().resolve_neg()")
        guard = self._shapes.produce_guards_expression(fakes, ignore_static=False) if any(dynamic) else None
        self._guard = guard and _OFFSET.sub("", guard)
        inputs = [*fakes, *(_fake(mode, t, ()) for t in self.captured)]
        with _alone(), torch.no_grad():
            run = compile_graph(graph, inputs, options, parts)
        self._run = run if examples[0].device.type == CPU else Recordings(run)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the program was compiled for tensors of these sizes."""
        if self._guard is None:
            return [t.shape for t in tensors] == self.sizes
        return self._shapes.evaluate_guards_expression(self._guard, list(tensors))

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(self._run([*tensors, *self.captured]))

    def at_once(self, sets: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
        """The results for each set of tensors; the number of sets must be a multiple of ``parts``."""
        constants = [t.detach() for t in self.captured]  # other threads would build graphs with them
        for k in range(0, len(sets), self.parts):
            found = self._run([t for tensors in sets[k : k + self.parts] for t in (*tensors, *constants)])
            count = len(found) // self.parts
            for part in range(self.parts):
                yield tuple(found[part * count : (part + 1) * count])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """A context in which no other thread compiles, not even by ``torch.compile``, because global state is changed."""
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        yield


class ValuesUnread(TorchFunctionMode):
    """Raises an error when Python reads the values of a captured tensor, which would become constants of the program."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = args[:1] if function in _READING else _within(args) if function in _MAKING else ()
        read = (*args[1:], *kwargs.values()) if function in _SPLITTING else read
        for tensor in read:
            if type(tensor) in (Tensor, torch.nn.Parameter):
                name = getattr(function, "__name__", function)
                raise RuntimeError(f"Python reads, by {name}, the values of a tensor of shape {tuple(tensor.shape)}")
        return function(*args, **kwargs)


def _within(args: Sequence[Any]) -> list[Any]:
    """The tensors inside lists of numbers; a copy of a single tensor can be recorded."""
    return [t for a in args if isinstance(a, (list, tuple)) for t in _tree.leaves(list(a))]


_READING = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__,
    Tensor.__complex__, Tensor.__array__, torch.is_nonzero,
}  # fmt: skip
_MAKING = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_SPLITTING = {torch.tensor_split, Tensor.tensor_split}  # they may read indices from a tensor


def lazy(tensor: Tensor) -> bool:
    """Whether the tensor is lazily conjugated or negated; machine code would ignore this and read the raw values."""
    return tensor.is_conj() or tensor.is_neg()


def _fake(mode: Any, tensor: Tensor, dynamic: Sequence[int]) -> Tensor:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(tensor.ndim)]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    if tensor.storage_offset() and not lazy(tensor):  # hide that it is a part of a larger tensor
        tensor = tensor.new_empty(0).set_(tensor.untyped_storage(), 0, tensor.size(), tensor.stride())
    fake: Tensor = mode.from_tensor(tensor.detach(), symbolic_context=context)
    return fake

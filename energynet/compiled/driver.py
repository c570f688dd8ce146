"""A solve as one program of machine code, found again as long as nothing that its code reads has changed."""

import dataclasses
import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import transform_active
from energynet.compiled.changes import kind
from energynet.compiled.fingerprint import Fingerprint
from energynet.compiled.keys import task_key
from energynet.compiled.loops import written_out
from energynet.compiled.lru import NUMBERS, Recent, forget_with, lasting
from energynet.compiled.partition import Shards, divided, how_many
from energynet.compiled.tracing import Program, lazy
from energynet.engine.binding import Binding
from energynet.engine.driver import Driver
from energynet.engine.tasks import Task
from energynet.step import Step

T = TypeVar("T")


class CompilationError(RuntimeError):
    """A solve could not be compiled; the message says why, and what to do."""


class Compiled(Driver):
    """The whole solve as one program of machine code, compiled at the first call for an energy and its shapes.

    Keep the object, because the programs are its own; a copy or a pickle has none. Forward and adjoint solves, of any order
    and under ``torch.func``, are programs each. A changed batch size compiles once more, for every size from 2 (where the
    energy asks for ``x.shape[0]``: ``len(x)`` is a number of Python's, and compiled anew for each). With ``trace=True`` and
    `UnrolledAdjoint`, and where a dispatch mode of PyTorch follows each operation, Python runs the loop.

    Example:
        >>> Compiled()
        Compiled(strict=False, capacity=64, check_every=None)

    Args:
        strict: what to do where a solve cannot be compiled: raise `CompilationError`, or, by default, warn once and let
            Python run the loop.
        capacity: how many programs are kept; the one longest unused goes first.
        check_every: updates between two looks at whether any sample still runs, as of `Eager`.

    Raises:
        ValueError: if capacity < 1 or check_every < 1.
    """

    def __init__(self, *, strict: bool = False, capacity: int = 64, check_every: int | None = None) -> None:
        if capacity < 1 or (check_every is not None and check_every < 1):
            raise ValueError(f"Compiled needs capacity ≥ 1 and check_every ≥ 1 or None, got {capacity} and {check_every}.")
        self.strict, self.capacity, self.check_every = strict, capacity, check_every
        self.compilations = 0
        """How many programs have been compiled."""
        self._lock = threading.RLock()
        self._counter = itertools.count()
        self._marks: Recent[int] = Recent(capacity)  # fingerprint -> a number
        self._met: Recent[list[Tensor]] = Recent(capacity)  # of that number
        self._bound: Recent[tuple[Fingerprint, Binding, int]] = Recent(capacity)  # step -> its binding, and how many came before
        self._examined: Recent[Any] = Recent(16 * capacity)
        self._families: Recent[list[Program]] = Recent(capacity)  # function -> its programs, but for the sizes of batches
        self._exact: Recent[tuple[Program | None]] = Recent(16 * capacity)  # function and shapes -> program, if it has one
        self._own: Recent[tuple[bool, ...]] = Recent(capacity)  # function and kinds -> which tensors have one row a sample

    def bind(self, step: Step) -> Binding:
        named = [(name, part) for name, value in vars(step).items() for part in lasting(value)]
        where = (type(step), *((name, v if isinstance(v, NUMBERS) else id(v)) for name, v in named))
        with self._lock:
            if (known := self._bound.get(where)) and known[0].unchanged():
                return known[1]
            binding = Binding.of(step)
            seen = Fingerprint(_parts(step), binding.tensors)
            resolved = {id(t) for t in binding.tensors}.difference(map(id, seen.inputs))  # such as parametrized weights
            if resolved:
                seen = Fingerprint(_parts(binding.step), binding.tensors)
            changes = known[2] if known else 0
            if known and seen.key not in self._marks:
                changes += 1
                if changes == MANY:
                    _tell_of_changes(step)
            binding = dataclasses.replace(binding, mark=self._mark(seen))
            if not resolved and (where in self._bound or forget_with((v for _, v in named), self._bound, where)):
                self._bound.put(where, (seen, binding, changes))
            return binding

    def _mark(self, seen: Fingerprint) -> int:
        mark = self._marks.get(seen.key)
        if mark is None:
            mark = next(self._counter)
            self._marks.put(seen.key, mark)
        self._met.put(mark, seen.met)
        return mark

    def examined(self, binding: Binding, tensors: Any, examine: Callable[[], T]) -> T:
        if transform_active() or binding.mark is None:
            return examine()
        leaves, spec = _tree.flatten(tensors)
        kinds = (kind(t) if isinstance(t, Tensor) else Fingerprint(t).key for t in leaves)
        key = (binding.mark, torch.is_grad_enabled(), spec, *kinds, *map(kind, binding.tensors))
        with self._lock:
            known = self._examined.get(key)
        if known is None:
            known = (examine(),)
            with self._lock:
                self._examined.put(key, known)
        result: T = known[0]
        return result

    def call(self, function: Task, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        function = function.checked(self.check_every)
        if _observed(tensors):
            return function(*tensors)
        tensors = tuple(_settled(t, tensors[0].shape[:1]) for t in tensors)
        with self._lock:
            shards = self._shards(function, tensors)
            sets = [] if shards is None else shards.split(tensors)
            divided = self._program(function, sets[0], torch.get_num_threads()) if sets else None
            program = self._program(function, tensors) if divided is None else divided
        if shards is not None and divided is not None:
            return shards.joined(function, divided.at_once(sets))
        return function(*tensors) if program is None else program(tensors)

    def _shards(self, function: Task, tensors: tuple[Tensor, ...]) -> Shards | None:
        """How the batch is divided, if it pays."""
        count = how_many(tensors, function.batch_dims)
        if count == 1:
            return None
        x = tensors[0]
        kinds = ((t.shape[1:], t.shape[:1] == x.shape[:1], t.dtype) for t in tensors)
        key = (task_key(function), function.binding.mark, *kinds)
        own = self._own.get(key)
        if own is None:
            own = divided(function, tensors) or ()
            self._own.put(key, own)
        return Shards(own, count) if own else None

    def _program(self, function: Task, tensors: tuple[Tensor, ...], parts: int = 1) -> Program | None:
        key = (task_key(function), function.binding.mark, parts, _ambient(tensors[0].device), *map(kind, tensors))
        known = self._exact.get(key)
        if known is None:
            known = (self._found(function, tensors, parts),)
            self._exact.put(key, known)
        return known[0]

    def _found(self, function: Task, tensors: tuple[Tensor, ...], parts: int) -> Program | None:
        """A program for these shapes: an earlier one that serves every batch size, or a new one."""
        like = tuple((t.ndim, _order(t), t.dtype, t.device) for t in tensors)
        family = (task_key(function), function.binding.mark, parts, _ambient(tensors[0].device), like)
        programs = self._families.get(family) or []
        fitting = next((p for p in programs if p.fits(tensors)), None)
        if fitting is not None:
            return fitting
        dynamic = _changed([p.sizes for p in programs], tensors, function.batch_dims)
        program = self._compiled(function, tensors, dynamic, parts)
        if program is not None:
            self._families.put(family, [*programs, program])
        return program

    def _compiled(self, function: Task, tensors: tuple[Tensor, ...], dynamic: Sequence[Sequence[int]], parts: int
                  ) -> Program | None:  # fmt: skip
        try:
            program = Program(function, tensors, dynamic, _options(tensors[0].device, parts), parts)
            mark = function.binding.mark
            known = {_memory(t) for t in (self._met.get(mark) if mark is not None else None) or ()}
            lost = [tuple(t.shape) for t in program.captured if _memory(t) not in known and not written_out(t)]
            if lost:
                raise CompilationError(f"it uses tensors of shapes {lost} that were found in no attribute, closure or global")
        except Exception as error:  # whatever the tracer and the compiler raise
            if any(dynamic):
                return self._compiled(function, tensors, [()] * len(tensors), parts)
            if parts == 1:
                self._refuse(error)
            return None
        self.compilations += 1
        return program

    def _refuse(self, error: Exception) -> None:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        sentence = (
            f"The solve could not be compiled: {reason[0]}. Likely causes: Python that looks at values, as `if x.sum() > 0` or "
            "`.item()`, in the energy (use torch.where); a tensor out of reach (pass it as context or register it as a buffer); "
            "no C++ compiler on this machine (install g++)."
        )
        if self.strict:
            raise CompilationError(f"{sentence} Or use driver=Eager().") from error
        warnings.warn(f"{sentence} Python runs the loop instead.", stacklevel=2)

    def __repr__(self) -> str:
        return f"Compiled(strict={self.strict}, capacity={self.capacity}, check_every={self.check_every})"

    def __reduce__(self) -> Any:
        return _again, (self.strict, self.capacity, self.check_every)

    def __deepcopy__(self, memo: Any) -> "Compiled":
        return _again(self.strict, self.capacity, self.check_every)


def _observed(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody follows each operation, such as ``make_fx`` or a counter of them, or there are no numbers."""
    followed = torch._C._len_torch_dispatch_stack() > 0 or not tensors[0].numel()
    return followed or any(type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in tensors)


MANY = 8  # changes of what one energy reads, after which somebody should know


def _tell_of_changes(step: Step) -> None:
    what = _parts(step)[2]
    warnings.warn(
        f"Something that {getattr(what, '__qualname__', type(what).__qualname__)} may read has changed {MANY} times, and each "
        "time it is compiled anew. Likely causes: a counter, a cache or a growing list among the attributes, a number that is "
        "scheduled. Keep it elsewhere, or as a 0-d tensor in a buffer, whose values may change.",
        stacklevel=3,
    )


def _options(device: torch.device, parts: int) -> dict[str, Any]:
    """Of Inductor: on a CPU the loops themselves in C++, and less work than this, in elements, left to one thread."""
    reuse = {"allow_buffer_reuse": torch.torch_version.TorchVersion(torch.__version__) >= "2.13"}  # fails in loops before
    if device.type != "cpu":
        return reuse
    threads = torch.get_num_threads() if parts == 1 else 1
    return {**reuse, "cpp_wrapper": True, "cpp.min_chunk_size": 8192, "cpp.threads": threads}


def _parts(step: Step) -> tuple[Any, ...]:
    """What a step consists of; itself it is made anew at each call."""
    return type(step), tuple(vars(step)), *vars(step).values()


def _ambient(device: torch.device) -> Hashable:
    """Settings around a call that change what operations do."""
    mixed = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return mixed, torch.get_default_dtype(), torch.get_num_threads()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _settled(tensor: Tensor, rows: torch.Size) -> Tensor:
    """The tensor as numbers in memory, whose strides do not change with the size of a batch."""
    if lazy(tensor):
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_contiguous() or tensor.shape[:1] != rows or tensor.stride(0) == 0:
        return tensor
    outermost = tensor.stride(0) == max(tensor.stride()) and tensor.stride(0) * len(tensor) == tensor.numel()
    return tensor if outermost else tensor.contiguous()


def _order(tensor: Tensor) -> Hashable:
    """How the memory is laid out, but for the sizes."""
    return tensor.is_contiguous() or tensor.stride()


def _changed(earlier: Sequence[Sequence[torch.Size]], tensors: Sequence[Tensor], batch_dims: int) -> list[list[int]]:
    """For each tensor the batch dimensions whose sizes differ from those of earlier ones."""
    return [
        [d for d in range(min(t.ndim, batch_dims)) if t.shape[d] > 1 and any(sizes[k][d] != t.shape[d] for sizes in earlier)]
        for k, t in enumerate(tensors)
    ]


def _again(strict: bool, capacity: int, check_every: int | None) -> Compiled:
    return Compiled(strict=strict, capacity=capacity, check_every=check_every)

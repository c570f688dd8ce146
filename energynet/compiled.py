"""A solve as one program of machine code, found again as long as nothing that its code reads has changed."""

import dataclasses
import itertools
import threading
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from energynet import _tree
from energynet._autodiff import transform_active
from energynet._program import Program, lazy
from energynet._while import written_out
from energynet.binding import Binding
from energynet.driver import Driver
from energynet.fingerprint import Fingerprint
from energynet.pure import Pure
from energynet.shards import Shards, divided, how_many
from energynet.step import Step
from energynet.watch import kind

T = TypeVar("T")


class CompilationError(RuntimeError):
    """A solve could not be compiled; the message says why, and what to do."""


class Compiled(Driver):
    """The whole solve as one program of machine code, compiled at the first call for an energy and its shapes.

    Keep the object, because the programs are its own; a copy or a pickle has none. Forward and adjoint solves, of any order
    and under ``torch.func``, are programs each. A changed batch size compiles once more, for every size from 2. With
    ``trace=True`` and `UnrolledAdjoint` Python runs the loop.

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
        self._marks: _Recent[int] = _Recent(capacity)  # fingerprint -> a number
        self._met: _Recent[list[Tensor]] = _Recent(capacity)  # of that number
        self._bound: _Recent[tuple[Fingerprint, Binding]] = _Recent(capacity)  # step -> its binding, while it is unchanged
        self._examined: _Recent[Any] = _Recent(16 * capacity)
        self._families: _Recent[list[Program]] = _Recent(capacity)  # function -> its programs, but for the sizes of batches
        self._exact: _Recent[tuple[Program | None]] = _Recent(16 * capacity)  # function and shapes -> program, if it has one
        self._own: _Recent[tuple[bool, ...]] = _Recent(capacity)  # function -> which tensors have one row a sample, if any

    def bind(self, step: Step) -> Binding:
        named = [(name, part) for name, value in vars(step).items() for part in _named(value)]
        where = (type(step), *((name, v if isinstance(v, _NUMBERS) else id(v)) for name, v in named))
        with self._lock:
            if (known := self._bound.get(where)) and known[0].unchanged():
                return known[1]
            binding = Binding.of(step)
            seen = Fingerprint(_parts(step), binding.tensors)
            resolved = {id(t) for t in binding.tensors}.difference(map(id, seen.inputs))  # such as parametrised weights
            if resolved:
                seen = Fingerprint(_parts(binding.step), binding.tensors)
            binding = dataclasses.replace(binding, mark=self._mark(seen))
            if not resolved and (where in self._bound or _forget_with((v for _, v in named), self._bound, where)):
                self._bound.put(where, (seen, binding))
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

    def call(self, function: Pure, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        function = function.checked(self.check_every)
        tensors = tuple(t.resolve_conj().resolve_neg() if lazy(t) else t for t in tensors)
        with self._lock:
            shards = self._shards(function, tensors)
            sets = [] if shards is None else shards.split(tensors)
            divided = self._program(function, sets[0], torch.get_num_threads()) if sets else None
            program = self._program(function, tensors) if divided is None else divided
        if shards is not None and divided is not None:
            return shards.joined(function, divided.at_once(sets))
        return function(*tensors) if program is None else program(tensors)

    def _shards(self, function: Pure, tensors: tuple[Tensor, ...]) -> Shards | None:
        """How the batch is divided, if it pays."""
        count = how_many(tensors, function.batch_dims)
        if count == 1:
            return None
        key = function.key, function.binding.mark
        own = self._own.get(key)
        if own is None:
            own = divided(function, tensors) or ()
            self._own.put(key, own)
        return Shards(own, count) if own else None

    def _program(self, function: Pure, tensors: tuple[Tensor, ...], parts: int = 1) -> Program | None:
        key = (function.key, function.binding.mark, parts, _ambient(tensors[0].device), *map(kind, tensors))
        known = self._exact.get(key)
        if known is None:
            known = (self._found(function, tensors, parts),)
            self._exact.put(key, known)
        return known[0]

    def _found(self, function: Pure, tensors: tuple[Tensor, ...], parts: int) -> Program | None:
        """A program for these shapes: an earlier one that serves every batch size, or a new one."""
        like = tuple((t.ndim, _order(t), t.dtype, t.device) for t in tensors)
        family = (function.key, function.binding.mark, parts, _ambient(tensors[0].device), like)
        programs = self._families.get(family) or []
        fitting = next((p for p in programs if p.fits(tensors)), None)
        if fitting is not None:
            return fitting
        dynamic = _changed([p.sizes for p in programs], tensors, function.batch_dims)
        program = self._compiled(function, tensors, dynamic, parts)
        if program is not None:
            self._families.put(family, [*programs, program])
        return program

    def _compiled(self, function: Pure, tensors: tuple[Tensor, ...], dynamic: Sequence[Sequence[int]], parts: int
                  ) -> Program | None:  # fmt: skip
        try:
            program = Program(function, tensors, dynamic, _options(tensors[0].device, parts), parts)
            mark = function.binding.mark
            known = {id(t) for t in (self._met.get(mark) if mark is not None else None) or ()}
            lost = [tuple(t.shape) for t in program.captured if id(t) not in known and not written_out(t)]
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


class _Recent(Generic[T]):
    """A dictionary that forgets what was longest unused."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.values: OrderedDict[Hashable, T] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self.values

    def get(self, key: Hashable) -> T | None:
        value = self.values.get(key)
        if value is not None:
            self.values.move_to_end(key)
        return value

    def put(self, key: Hashable, value: T) -> None:
        self.values.pop(key, None)  # to the end of the line
        self.values[key] = value
        if len(self.values) > self.capacity:
            self.values.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        self.values.pop(key, None)


_NUMBERS = (float, int)


def _named(value: Any) -> tuple[Any, ...]:
    """What tells a value from others: of a bound method, which is another object each time, what it is made of."""
    return (value.__func__, value.__self__) if isinstance(value, types.MethodType) else (value,)


def _forget_with(values: Iterable[Any], cache: _Recent[Any], key: Hashable) -> bool:
    """Have an entry forgotten when one of the values that its key names by id is no more, since ids come again."""
    named = [v for v in values if not isinstance(v, (*_NUMBERS, type(None)))]
    try:
        for value in named:
            weakref.finalize(value, cache.forget, key).atexit = False
    except TypeError:  # it cannot tell of its end
        return False
    return True


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

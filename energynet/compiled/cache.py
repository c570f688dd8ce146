"""The cache of compiled programs in this process; a program is reused while nothing that its code reads has changed."""

import dataclasses
import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import transform_active
from energynet.compiled.announce import announced
from energynet.compiled.changes import kind
from energynet.compiled.fingerprint import Fingerprint
from energynet.compiled.keys import task_key
from energynet.compiled.loops import written_out
from energynet.compiled.lru import NUMBERS, Recent, forget_with, lasting
from energynet.compiled.partition import Shards, divided, how_many
from energynet.compiled.tracing import Program
from energynet.engine.ambient import Ambient
from energynet.engine.binding import Binding
from energynet.engine.tasks import Pull, Solve, Task
from energynet.step import Step

T = TypeVar("T")


class Failure:
    """The reason why a task has no program."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self._said = False

    def first_time(self) -> bool:
        """Whether this is the first call."""
        said, self._said = self._said, True
        return not said


class Programs:
    """The programs that drivers of equal capacity share, and the data by which they are looked up.

    Args:
        capacity: the number of programs to keep; the least recently used one is dropped first.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Delete all programs."""
        capacity = self.capacity
        with self.lock:
            self.compilations = 0
            self._counter = itertools.count()
            self._marks: Recent[int] = Recent(capacity)  # fingerprint -> mark
            self._met: Recent[list[Tensor]] = Recent(capacity)  # mark -> tensors that the fingerprint has found
            self._why: Recent[str] = Recent(capacity)  # mark -> what had changed, a sentence
            self._bound: Recent[tuple[Fingerprint, Binding, int]] = Recent(capacity)  # step -> binding, number of changes
            self._examined: Recent[Any] = Recent(16 * capacity)
            self._families: Recent[list[Program]] = Recent(capacity)  # task -> its programs for all batch sizes
            self._exact: Recent[Program | Failure] = Recent(16 * capacity)  # task and shapes -> program or failure
            self._own: Recent[tuple[bool, ...]] = Recent(capacity)  # task and kinds -> which tensors have one row per sample

    def bind(self, step: Step) -> Binding:
        """The step with its tensors as inputs, and a mark that identifies steps that read the same state."""
        named = [(name, part) for name, value in vars(step).items() for part in lasting(value)]
        where = (type(step), *((name, v if isinstance(v, NUMBERS) else id(v)) for name, v in named))
        with self.lock:
            if (known := self._bound.get(where)) and known[0].unchanged():
                return known[1].again()
            binding = Binding.of(step)
            seen = Fingerprint(_parts(step), binding.tensors, whole=False)
            resolved = {id(t) for t in binding.tensors}.difference(map(id, seen.inputs))  # such as parametrized weights
            if resolved:
                seen = Fingerprint(_parts(binding.step), binding.tensors, whole=False)
            changes, why = known[2] if known else 0, ""
            if known and seen.key not in self._marks:
                changes, why = changes + 1, "; ".join(known[0].changes()[:SHOWN])
                if changes == MANY:
                    _tell_of_changes(step, why)
            binding = dataclasses.replace(binding, mark=self._mark(seen))
            if why:
                self._why.put(binding.mark, f"What it reads has changed: {why}.")
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
        """The result of ``examine()``, cached for arguments of the same kind."""
        if transform_active() or binding.mark is None:
            return examine()
        leaves, spec = _tree.flatten(tensors)
        kinds = (kind(t) if isinstance(t, Tensor) else Fingerprint(t).key for t in leaves)
        ambient = Ambient.now(leaves[0].device.type)
        key = (binding.mark, ambient, torch.is_grad_enabled(), spec, *kinds, *map(kind, binding.tensors))
        with self.lock:
            known = self._examined.get(key)
        if known is None:
            known = (examine(),)
            with self.lock:
                self._examined.put(key, known)
        result: T = known[0]
        return result

    def shards(self, function: Task, tensors: tuple[Tensor, ...]) -> Shards | None:
        """How the batch is divided; None if dividing it does not pay."""
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

    def program(self, function: Task, tensors: tuple[Tensor, ...], parts: int = 1) -> Program | Failure:
        """The program for a task on tensors of these shapes, compiled if there is none yet."""
        key = (*_task(function, tensors, parts), *map(kind, tensors))
        known = self._exact.get(key)
        if known is None:
            known = self._found(function, tensors, parts)
            self._exact.put(key, known)
        return known

    def _found(self, function: Task, tensors: tuple[Tensor, ...], parts: int) -> Program | Failure:
        """A program for these shapes: an earlier one that serves every batch size, or a new one."""
        like = tuple((t.ndim, _order(t), t.dtype, t.device) for t in tensors)
        family = (*_task(function, tensors, parts), like)
        programs = self._families.get(family) or []
        fitting = next((p for p in programs if p.fits(tensors)), None)
        if fitting is not None:
            return fitting
        dynamic = _changed([p.sizes for p in programs], tensors, function.batch_dims)
        program = self._compiled(function, tensors, dynamic, parts)
        if isinstance(program, Program):
            self._families.put(family, [*programs, program])
        return program

    def _compiled(self, function: Task, tensors: tuple[Tensor, ...], dynamic: Sequence[Sequence[int]], parts: int
                  ) -> Program | Failure:  # fmt: skip
        mark = function.binding.mark
        try:
            with announced(_in_words(function, tensors), self._why.get(mark) or ""):
                program = Program(function, tensors, dynamic, _options(tensors[0].device, parts), parts)
            known = {_memory(t) for t in (self._met.get(mark) if mark is not None else None) or ()}
            lost = [tuple(t.shape) for t in program.captured if _memory(t) not in known and not written_out(t)]
            if lost:
                raise RuntimeError(f"it uses tensors of shapes {lost} that were found in no attribute, closure or global")
        except Exception as error:  # the tracer and the compiler may raise anything
            if any(dynamic):
                return self._compiled(function, tensors, [()] * len(tensors), parts)
            return Failure(error)
        self.compilations += 1
        return program


@functools.cache
def programs(capacity: int) -> Programs:
    """The programs in this process for drivers of this capacity."""
    return Programs(capacity)


MANY = 8  # the number of changes to the state that an energy reads, after which the user is warned
SHOWN = 3  # the number of changes that a message names


def _tell_of_changes(step: Step, why: str) -> None:
    warnings.warn(
        f"Something that {_name(step)} reads has changed {MANY} times, and each change compiles it again. The last change was: "
        f"{why}. If this is a counter, a cache or a growing list that has no influence on the energy, keep it where the "
        "energy's code does not read it; a scheduled number should be a 0-d tensor in a buffer, whose values may change.",
        stacklevel=3,
    )


def _name(step: Step) -> str:
    """The name of the energy or map that a user wrote."""
    what = _parts(step)[2]
    return str(getattr(what, "__qualname__", type(what).__qualname__))


def _in_words(function: Task, tensors: Sequence[Tensor]) -> str:
    """A description of what is compiled, for messages."""
    assert isinstance(function, (Solve, Pull))
    job = "gradient" if isinstance(function, Pull) else "solve"
    return f"the {job} of {_name(function.binding.step)} by {function.solver} for x of shape {tuple(tensors[0].shape)}"


def _task(function: Task, tensors: Sequence[Tensor], parts: int) -> tuple[Hashable, ...]:
    """The key of a program, without shapes."""
    return task_key(function), function.check_every, function.binding.mark, parts, torch.get_num_threads()


def _options(device: torch.device, parts: int) -> dict[str, Any]:
    """Inductor's options: on a CPU, loops are generated in C++, and small operations run on one thread."""
    reuse = {"allow_buffer_reuse": False}  # in loops, Inductor of torch 2.9 to 2.13 may reuse memory that is still needed
    if device.type != "cpu":
        return reuse
    threads = torch.get_num_threads() if parts == 1 else 1
    return {**reuse, "cpp_wrapper": True, "cpp.min_chunk_size": 8192, "cpp.threads": threads}


def _parts(step: Step) -> tuple[Any, ...]:
    """The parts of a step, which identify it, because the step itself is a new object at each call."""
    return type(step), tuple(vars(step)), *vars(step).values()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _order(tensor: Tensor) -> Hashable:
    """The memory layout, without the sizes."""
    return tensor.is_contiguous() or tensor.stride()


def _changed(earlier: Sequence[Sequence[torch.Size]], tensors: Sequence[Tensor], batch_dims: int) -> list[list[int]]:
    """For each tensor, the batch dimensions whose sizes differ from those of earlier programs."""
    return [
        [d for d in range(min(t.ndim, batch_dims)) if t.shape[d] > 1 and any(sizes[k][d] != t.shape[d] for sizes in earlier)]
        for k, t in enumerate(tensors)
    ]

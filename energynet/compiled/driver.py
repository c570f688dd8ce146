"""The driver that compiles a solve into one program of machine code."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from energynet._torch.numbers import check_whole
from energynet.compiled.cache import Failure, Programs, programs
from energynet.compiled.tracing import Program, lazy
from energynet.engine.binding import Binding
from energynet.engine.driver import Driver
from energynet.engine.tasks import Task
from energynet.step import Step

T = TypeVar("T")


class CompilationError(RuntimeError):
    """A solve could not be compiled; the message gives the reason and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled(Driver):
    """Runs the whole solve as one program of machine code, which is compiled at the first call for an energy and its shapes.

    Compiling takes up to a minute. Programs are cached in the process, and equal drivers share them. Forward and adjoint
    solves, of any order and under ``torch.func``, are separate programs. A new batch size compiles once more; that program
    works for every size from 2 if the energy uses ``x.shape[0]``. (``len(x)`` is a number in Python, so each size would be
    compiled separately.) Python runs the loop with ``trace=True``, with `UnrolledAdjoint`, and when a dispatch mode of
    PyTorch observes each operation.

    Example:
        >>> Compiled()
        Compiled(strict=False, capacity=64, check_every=None)

    Args:
        strict: whether to raise `CompilationError` if a solve cannot be compiled. By default it warns once, and Python runs
            the loop.
        capacity: the number of programs to keep; the least recently used one is dropped first.
        check_every: the number of updates between two checks whether any sample is still running, as for `Eager`.

    Raises:
        ValueError: if capacity < 1 or check_every < 1.
    """

    strict: bool = False
    capacity: int = 64
    check_every: int | None = None

    def __post_init__(self) -> None:
        check_whole(self, "capacity")
        check_whole(self, "check_every", optional=True)

    @property
    def compilations(self) -> int:
        """The number of programs that have been compiled for drivers of this capacity."""
        return self._programs.compilations

    def clear(self) -> None:
        """Delete the programs of all drivers of this capacity."""
        self._programs.clear()

    @property
    def _programs(self) -> Programs:
        return programs(self.capacity)

    def bind(self, step: Step) -> Binding:
        return self._programs.bind(step)

    def examined(self, binding: Binding, tensors: Any, examine: Callable[[], T]) -> T:
        return self._programs.examined(binding, tensors, examine)

    def call(self, function: Task, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        function = function.checked(self.check_every)
        if _observed(tensors):
            return function(*tensors)
        tensors = tuple(_settled(t, tensors[0].shape[:1]) for t in tensors)
        known = self._programs
        with known.lock:
            shards = known.shards(function, tensors)
            sets = [] if shards is None else shards.split(tensors)
            divided = known.program(function, sets[0], torch.get_num_threads()) if sets else None
            program = divided if isinstance(divided, Program) else self._whole(known, function, tensors)
        if shards is not None and isinstance(divided, Program):
            return shards.joined(function, divided.at_once(sets))
        return function(*tensors) if program is None else program(tensors)

    def _whole(self, known: Programs, function: Task, tensors: tuple[Tensor, ...]) -> Program | None:
        """The program for the whole batch; None, after a warning, if there is none."""
        program = known.program(function, tensors)
        if isinstance(program, Failure):
            self._refuse(program)
            return None
        return program

    def _refuse(self, failure: Failure) -> None:
        reason = str(failure.error).strip().splitlines() or [type(failure.error).__name__]
        sentence = (
            f"The solve could not be compiled: {reason[0]}. Likely causes: Python code in the energy that reads values, such as "
            "`if x.sum() > 0` or `.item()` (use torch.where); a tensor that cannot be found (pass it as context or register it "
            "as a buffer); no C++ compiler on this machine (install g++)."
        )
        if self.strict:
            raise CompilationError(f"{sentence} Or use driver=Eager().") from failure.error
        if failure.first_time():
            warnings.warn(f"{sentence} Python runs the loop instead.", stacklevel=2)


def _observed(tensors: Sequence[Tensor]) -> bool:
    """Whether each operation is observed, as by ``make_fx`` or an operation counter, or whether the tensors are empty."""
    followed = torch._C._len_torch_dispatch_stack() > 0 or not tensors[0].numel()
    return followed or any(type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in tensors)


def _settled(tensor: Tensor, rows: torch.Size) -> Tensor:
    """The tensor without lazy conjugation or negation, and with strides that do not depend on the batch size."""
    if lazy(tensor):
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_contiguous() or tensor.shape[:1] != rows or tensor.stride(0) == 0:
        return tensor
    outermost = tensor.stride(0) == max(tensor.stride()) and tensor.stride(0) * len(tensor) == tensor.numel()
    return tensor if outermost else tensor.contiguous()

"""Who runs the loop: Python, or one compiled program."""

import dataclasses
import threading
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from energynet._program import Program
from energynet.equation import Equation, Linear
from energynet.fingerprint import fingerprint
from energynet.loop import LoopState, loop
from energynet.solvers import Solver
from energynet.termination import Termination


class Driver(ABC):
    """Who runs the loop. The result is the same to rounding."""

    @abstractmethod
    def run(self, equation: Equation, solver: Solver, termination: Termination, x0: Tensor, inputs: tuple[Tensor, ...]
            ) -> LoopState:  # fmt: skip
        """Solve the equation on plain tensors, from ``x0``, ``(*batch, n)``."""


@dataclasses.dataclass(frozen=True)
class Eager(Driver):
    """Python runs the loop, operation by operation: nothing to compile, any energy.

    Example:
        >>> Eager()
        Eager()
    """

    def run(self, equation: Equation, solver: Solver, termination: Termination, x0: Tensor, inputs: tuple[Tensor, ...]
            ) -> LoopState:  # fmt: skip
        return loop(equation.problem(inputs, x0), solver, termination, x0)


class CompilationError(RuntimeError):
    """A solve could not be compiled; the message says why, and what to do."""


class Compiled(Driver):
    """The whole solve as one program of machine code, compiled at the first call for an energy and its shapes.

    Keep the object, because the programs are its own; a copy or a pickle has none. Forward and adjoint solves, of any order
    and under ``torch.func``, are programs each. With ``trace=True`` and `UnrolledAdjoint` Python runs the loop.

    Example:
        >>> Compiled()
        Compiled(strict=False, capacity=64)

    Args:
        strict: what to do where a solve cannot be compiled: raise `CompilationError`, or, by default, warn once and let
            Python run the loop.
        capacity: how many programs are kept; the one longest unused goes first.

    Raises:
        ValueError: if capacity < 1.
    """

    def __init__(self, *, strict: bool = False, capacity: int = 64) -> None:
        if capacity < 1:
            raise ValueError(f"Compiled needs capacity ≥ 1, got {capacity}.")
        self.strict, self.capacity = strict, capacity
        self.compilations = 0
        """How many programs have been compiled."""
        self._programs: OrderedDict[Hashable, Program | None] = OrderedDict()  # None: could not be compiled
        self._lock = threading.RLock()

    def run(self, equation: Equation, solver: Solver, termination: Termination, x0: Tensor, inputs: tuple[Tensor, ...]
            ) -> LoopState:  # fmt: skip
        root = equation.root if isinstance(equation, Linear) else equation
        code, met = fingerprint((equation, solver, termination), root.binding.tensors)
        key = (code, *((t.shape, t.stride(), t.dtype, t.device) for t in (x0, *inputs)))
        with self._lock:
            if key not in self._programs:
                self._programs[key] = self._compiled(equation, solver, termination, x0, inputs, met)
                if len(self._programs) > self.capacity:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(key)
            program = self._programs[key]
        if program is None:
            return Eager().run(equation, solver, termination, x0, inputs)
        x, status, steps, distance, scale = program((x0, *inputs))
        return LoopState(x, None, status, steps, distance, scale, distance, x, distance)

    def _compiled(self, equation: Equation, solver: Solver, termination: Termination, x0: Tensor, inputs: tuple[Tensor, ...],
                  met: list[Tensor]) -> Program | None:  # fmt: skip
        def solve(x0: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            state = loop(equation.problem(inputs, x0), solver, termination, x0)
            return state.x, state.status, state.steps, state.distance, state.scale

        try:
            examples = (x0, *inputs)
            program = Program(solve, examples, [()] * len(examples), {"cpp_wrapper": x0.device.type == "cpu"})
            known = {id(t) for t in met}
            lost = [tuple(t.shape) for t in program.captured if id(t) not in known and t.ndim]
            if lost:
                raise CompilationError(f"it uses tensors of shapes {lost} that were found in no attribute, closure or global")
        except Exception as error:  # whatever the tracer and the compiler raise
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
        return f"Compiled(strict={self.strict}, capacity={self.capacity})"

    def __reduce__(self) -> Any:
        return _again, (self.strict, self.capacity)

    def __deepcopy__(self, memo: Any) -> "Compiled":
        return _again(self.strict, self.capacity)


def _again(strict: bool, capacity: int) -> Compiled:
    return Compiled(strict=strict, capacity=capacity)

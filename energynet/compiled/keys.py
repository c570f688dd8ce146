"""Keys of tasks: tasks with equal keys and equal bindings share one program."""

from collections.abc import Hashable

from energynet.compiled.fingerprint import Fingerprint, content_key
from energynet.engine.equation import Equation, Linear, Root
from energynet.engine.tasks import Pull, Solve, Task


def task_key(task: Task) -> Hashable:
    """Everything that a task reads besides its arguments and the step."""
    assert isinstance(task, (Solve, Pull))
    key = type(task), equation_key(task.equation), content_key(task.solver), content_key(task.termination)
    return (*key, task.wanted) if isinstance(task, Pull) else key


def equation_key(equation: Equation) -> Hashable:
    """Everything that an equation reads besides its inputs and the step."""
    if isinstance(equation, Linear):
        return equation_key(equation.root), equation.transposed
    assert isinstance(equation, Root)
    constants = tuple(None if leaf is None else Fingerprint(leaf.value).key for leaf in equation.code.leaves)
    encoded = equation.context is not None
    return equation.layout, equation.code.spec, constants, encoded, equation.ambient, equation.precision, equation.vmaps

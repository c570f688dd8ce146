"""What contenders written in JAX share."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..harness import Call, Contender
from ..ops import jax_ops
from ..work import Problem, Task, Work


class JaxBased(Contender):
    """Everything inside one ``jax.jit``; the data are its arguments, so that nothing is computed at compile time."""

    @abstractmethod
    def solve(self, work: Work, x0: Any, inputs: Any) -> tuple[Any, Any]:
        """x*, differentiable in the inputs, and how many iterations it took."""

    def call(self, work: Work, task: Task) -> Call:
        import jax

        if (work.problem.x0.device.type == "cpu") != (jax.default_backend() == "cpu"):
            raise NotImplementedError(f"JAX computes on {jax.default_backend()} here")
        # optimistix takes a float32 problem only where float32 is the default.
        jax.config.update("jax_enable_x64", work.problem.x0.dtype == torch.float64)
        data = arrays(work.problem)
        compiled = jax.jit(self._function(work, task))
        return lambda: jax.block_until_ready(compiled(*data))

    def _function(self, work: Work, task: Task) -> Any:
        import jax

        problem, ops = work.problem, jax_ops()

        def answer(wanted: Any, x0: Any, inputs: Any) -> Any:
            inputs = list(inputs)
            for k, value in zip(problem.wanted, wanted, strict=True):
                inputs[k] = value
            return self.solve(work, x0, tuple(inputs))[0]

        def loss(wanted: Any, x0: Any, inputs: Any, targets: Any) -> Any:
            return problem.formula.loss(ops, answer(wanted, x0, inputs), *targets)

        def first(f: Any) -> Any:  # of the only wanted input
            return lambda value, *data: f((value,), *data)

        def function(x0: Any, inputs: Any, targets: Any) -> Any:
            wanted = tuple(inputs[k] for k in problem.wanted)
            if task is Task.FORWARD:
                return self.solve(work, x0, inputs)[0]
            if task is Task.GRADIENT:
                return jax.grad(loss)(wanted, x0, inputs, targets)
            if task is Task.JACOBIAN:
                return jax.jacrev(first(answer))(wanted[0], x0, inputs)
            return jax.jacrev(jax.grad(first(loss)))(wanted[0], x0, inputs, targets)

        return function

    def tensors(self, result: Any) -> tuple[Tensor, ...]:
        results = result if isinstance(result, tuple) else (result,)
        return tuple(torch.tensor(r.__array__()) for r in results)  # on the CPU

    def steps(self, work: Work, task: Task) -> str:
        import jax

        x0, inputs, _ = arrays(work.problem)
        return str(int(jax.jit(lambda x0, inputs: self.solve(work, x0, inputs)[1])(x0, inputs)))


def arrays(problem: Problem) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    """Start, inputs and targets."""
    from jax import numpy as jnp

    def array(t: Tensor) -> Any:
        return jnp.asarray(t.cpu().numpy())

    return array(problem.x0), tuple(map(array, problem.inputs)), tuple(map(array, problem.targets))


def step(work: Work, x: Any, inputs: Any) -> Any:
    """x - γ ∇E(x)."""
    import jax

    ops, formula = jax_ops(), work.problem.formula
    return x - work.step_size * jax.grad(lambda x: formula.energy(ops, x, *inputs).sum())(x)

"""A step under test, with every tensor it depends on as an explicit input, and the checks that all steps share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.tree import Layout
from energynet.engine.binding import Binding
from energynet.engine.purity import ImpureFunctionError, LostGradientError
from energynet.solution import ConvergenceError
from energynet.step import Step
from energynet.testing.measure import CheckError, check_derivatives, check_independent, copied, equal, floating, largest, replaced

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Subject:
    """Copies of a step, a point and a context, so that no check modifies objects of the caller."""

    binding: Binding
    tensors: tuple[Tensor, ...]
    x: Any
    context: tuple[Any, ...]
    batch_dims: int
    name: str

    @classmethod
    def of(cls, step: Step, x: Any, context: tuple[Any, ...], batch_dims: int, dtype: torch.dtype | None = None) -> "Subject":
        binding = Binding.of(step)
        tensors = tuple(copied(list(binding.tensors), dtype))
        name = "E" if step.energy_of is not None else "g(x)"
        return cls(binding, tensors, copied(x, dtype), copied(context, dtype), batch_dims, name)

    @property
    def batch(self) -> int:
        """The number of samples; 0 for one problem without a batch dimension."""
        return int(_tree.leaves(self.x)[0].shape[0]) if self.batch_dims else 0

    @property
    def layout(self) -> Layout:
        return Layout.of(self.x, self.batch_dims)

    @property
    def step(self) -> Step:
        return self.binding.attach(self.tensors)

    def code(self) -> tuple[Any, ...]:
        """The encoded context. `Energy.encode` may draw random numbers, which are always the same ones here."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.step.encode(*self.context)

    def flat(self, output: Any) -> Tensor:
        """The values ``(B,)`` of an energy, or the pytree of a map, as ``(B, n)``."""
        if isinstance(output, Tensor) and output.ndim == self.batch_dims:
            return output.unsqueeze(-1)
        return Layout.of(output, self.batch_dims).ravel(output)

    def value(self, x: Any, code: tuple[Any, ...]) -> Tensor:
        return self.flat(self.step.probe(x, *code))

    def optimality(self, code: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """x ``(B, n)`` -> F(x) ``(B, n)``."""
        step, layout = self.step, self.layout
        return lambda flat: layout.ravel(step.optimality(layout.unravel(flat), *code))

    def inputs(self) -> dict[str, Tensor]:
        """x, the context and the parameters, by name: the tensors with respect to which derivatives are taken."""
        named = {"x": self.x, **{f"context {k}": c for k, c in enumerate(self.context)}}
        parameters = zip(self.tensors, self.binding.tensors, strict=True)
        trained = [t for t, original in parameters if original.requires_grad]
        return floating({**named, **{f"parameter {k} of shape {tuple(t.shape)}": t for k, t in enumerate(trained)}})

    def with_inputs(self, values: Sequence[Tensor]) -> "Subject":
        tensors, x, context = replaced((self.tensors, self.x, self.context), list(self.inputs().values()), values)
        return dataclasses.replace(self, tensors=tensors, x=x, context=context)


def refuse(call: Callable[[], Result]) -> Result:
    """Run a solve and convert its errors (shapes, dtypes, captures, randomness, in-place changes, failures) to a CheckError."""
    try:
        return call()
    except (LostGradientError, ImpureFunctionError, ConvergenceError, TypeError, ValueError) as error:
        raise CheckError(str(error)) from error


def check_repeatable(subject: Subject) -> None:
    """Check that two evaluations agree, and that they do not change x and the context."""
    code = subject.code()
    given = (subject.x, code, subject.context)
    before = copied(given)
    first, second = subject.value(subject.x, code).detach(), subject.value(subject.x, code).detach()
    if not equal(given, before):
        raise CheckError(
            f"{subject.name} changed x or its context in place. The iteration and the caller would see the changed values. Use "
            "out-of-place operations, or clone first."
        )
    if not bool(torch.isfinite(first).all()):
        where = sorted({i[0] for i in torch.nonzero(~torch.isfinite(first)).tolist()})
        raise CheckError(
            f"{subject.name} is NaN or Inf for sample {where[:8]}. Likely cause: NaN in x or the context, or a point outside the "
            "domain (log or sqrt of a negative number). Check at a point where it is finite."
        )
    eps = torch.finfo(first.dtype).eps
    change = largest(first - second)
    if change > 10 * eps * largest(first):
        raise CheckError(
            f"Two evaluations of {subject.name} at the same point differ by {change:.2g}. Likely cause: it draws random numbers "
            "or keeps state between calls (a counter, a cache). Move this outside and pass the result as context, or move it to "
            "Energy.encode, which runs once per solve."
        )


def check_samples(subject: Subject) -> float | None:
    """Check that no sample's value depends on the other samples."""
    try:
        code = subject.code()
        subject.value(subject.x, code)
    except RuntimeError as error:
        raise CheckError(
            f"{subject.name} cannot be evaluated in float64: {error} Likely cause: a dtype that is fixed in the code, or a "
            "float32 tensor in a closure. Create tensors with dtype=x.dtype, and register constants as buffers of a module."
        ) from error

    def function(inputs: tuple[Any, tuple[Any, ...]]) -> Tensor:
        return subject.value(*inputs).detach()

    def moved(t: Tensor) -> Tensor:
        return t + 0.01 * torch.randn_like(t) * (1 + t.abs()) if t.is_floating_point() else t

    nearby = _tree.map_structure(moved, subject.x)  # at x = 0, a sum of z·x over the batch would not be detected
    points = [subject.x, *([nearby] if bool(torch.isfinite(function((nearby, code))).all()) else [])]
    leaks = [check_independent(function, (x, code), subject.batch, 1e-9, subject.name) for x in points]
    return None if leaks[0] is None else max(leak for leak in leaks if leak is not None)


def check_smooth(subject: Subject) -> float:
    """Check that F is differentiable in x, the context and the parameters, and that its derivatives are right."""
    layout = subject.layout
    weights = torch.randn_like(layout.ravel(subject.x))

    def projected(values: list[Tensor]) -> Tensor:
        there = subject.with_inputs(values)
        return (weights * there.optimality(there.code())(layout.ravel(there.x))).sum()

    what = "The second derivative of E" if subject.step.energy_of is not None else "The derivative of x − g(x)"
    return check_derivatives(projected, subject.inputs(), 1e-6, 1e-14, what)

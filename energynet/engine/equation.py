"""The equations that are solved: the optimality condition of a step, and the linear equations for its derivatives.

Both are immutable values on flat tensors. Each provides a `Problem` for the loop, on plain tensors, and a ``residual`` that
can be differentiated to any order.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import linearize, pullback, pushforward, value_and_gradient_of_sum
from energynet._torch.tree import Layout
from energynet.energy import evaluate
from energynet.engine.ambient import Ambient
from energynet.engine.approximations import At, jacobian, or_zero
from energynet.engine.binding import Binding
from energynet.proximal import ProximalStep
from energynet.solvers import problem as problems
from energynet.solvers.preconditioner import Preconditioner
from energynet.solvers.problem import Problem
from energynet.step import Kind, Step, per_sample


class Constant(NamedTuple):
    """A leaf of a pytree that is not a tensor."""

    value: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Arguments:
    """A pytree of arguments without its tensors."""

    spec: Any
    leaves: tuple[Constant | None, ...]  # None where a tensor goes

    @classmethod
    def of(cls, tree: Any) -> "Arguments":
        leaves, spec = _tree.flatten(tree)
        return cls(spec, tuple(None if isinstance(leaf, Tensor) else Constant(leaf) for leaf in leaves))

    @property
    def count(self) -> int:
        """How many tensors it takes."""
        return sum(leaf is None for leaf in self.leaves)

    def filled(self, tensors: Iterable[Tensor]) -> tuple[Any, ...]:
        """The arguments with these tensors."""
        given = iter(tensors)
        arguments: tuple[Any, ...] = _tree.unflatten([next(given) if c is None else c.value for c in self.leaves], self.spec)
        return arguments


@dataclasses.dataclass(frozen=True, eq=False)
class Root:
    """The equation F(x; inputs) = 0 on flat tensors, with x of shape ``(*batch, n)``.

    The inputs are the tensors of the step and those of its code. If ``encode`` makes the code from the context, the tensors of
    the context follow: F does not depend on them, but they receive a failed sample's NaN, which must not pass through the
    encoder.
    """

    binding: Binding
    layout: Layout
    code: Arguments
    context: Arguments | None  # None: the context is the code itself
    ambient: Ambient
    precision: torch.dtype | None = None
    """The precision of F where it is lower than that of x, as under autocast."""
    vmaps: tuple[tuple[tuple[int | None, ...], str], ...] = ()

    @property
    def symmetric(self) -> bool:
        return self.binding.step.symmetric

    @property
    def kind(self) -> Kind:
        return self.binding.step.kind

    @property
    def normalized(self) -> bool:
        return self.binding.step.normalized

    @property
    def batch_dims(self) -> int:
        """The number of batch dimensions: those of the caller, and one for each enclosing vmap."""
        return self.layout.batch_dims + len(self.vmaps)

    @property
    def rounding(self) -> float:
        """The rounding unit of the least precise tensor in x, or in an evaluation of F."""
        return self.layout.rounding if self.precision is None else torch.finfo(self.precision).eps

    @property
    def num_shared(self) -> int:
        """The number of leading inputs that belong to no sample: the step's own tensors."""
        return len(self.binding.tensors)

    @property
    def num_code(self) -> int:
        """The number of tensors of the code, which follow."""
        return self.code.count

    @property
    def num_context(self) -> int:
        """The number of tensors of an encoded context, which come last."""
        return 0 if self.context is None else self.context.count

    def reads(self, k: int) -> bool:
        """Whether F may depend on an input; it does not depend on a context that has been encoded."""
        return k < self.num_shared + self.num_code

    def ends(self, k: int) -> bool:
        """Whether the gradient of an input goes to the user and not through an encoder, whose weights samples share."""
        return k < self.num_shared or self.context is None or not self.reads(k)

    def mapped(self, in_dims: tuple[int | None, ...], randomness: str) -> "Root":
        """The same equation, with a new leading batch dimension in x and in the inputs with in_dim 0."""
        return dataclasses.replace(self, vmaps=(*self.vmaps, (in_dims, randomness)))

    def unmapped(self) -> "Root":
        """The equation for a single index of each vmap."""
        return dataclasses.replace(self, vmaps=())

    def lacking(self, k: int) -> tuple[int, ...]:
        """The batch dimensions that an input lacks because an enclosing vmap does not map it."""
        return tuple(len(self.vmaps) - 1 - level for level, (in_dims, _) in enumerate(self.vmaps) if in_dims[k] is None)

    def residual(self, x: Tensor, *inputs: Tensor) -> Tensor:
        return self.function(inputs)(x)

    def function(self, inputs: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        """x -> F(x), with the inputs bound once."""
        return self._mapped(self._optimality, inputs)

    def energy(self, x: Tensor, *inputs: Tensor) -> Tensor:  # (*batch)
        """The energy of a minimization; with a prox, that of the smooth part alone."""
        return self._mapped(self._value, inputs)(x)

    def problem(self, inputs: tuple[Tensor, ...], start: Tensor) -> Problem:
        """On plain tensors, for a solve that begins at ``start``, ``(*batch, n)``."""
        residual, step = self.function(inputs), self.binding.step
        step_size, dims = self.step_size(inputs, start), self.batch_dims
        if step.normalized:
            return problems.Map(residual, batch_dims=dims, step_size=1.0 if step_size is None else step_size)
        energy = self._mapped(self._energy, inputs)

        def value_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
            return value_and_gradient_of_sum(energy, x)

        def jacobian_at(x: Tensor) -> Callable[[Tensor], Tensor]:
            return jacobian(residual, x, self.symmetric)

        if self.kind is Kind.ENERGY:
            return problems.Minimization(
                residual, jacobian_at, batch_dims=dims, step_size=step_size, start=start, guessed=step.guessed,
                value_and_gradient=value_and_gradient, approximate=lambda made, x: self.approximate(made, x, inputs),
                quadratic=lambda x, made: self.quadratic(x, made, inputs),
            )  # fmt: skip
        if isinstance(step, ProximalStep):
            land = self._mapped(self._land, inputs)
            return problems.Proximal(
                residual, jacobian_at, batch_dims=dims, step_size=step_size, start=start, guessed=step.guessed,
                value_and_gradient=value_and_gradient, land=lambda x, gamma: land(torch.cat([x, gamma], -1)),
                bounded=self.kind is Kind.BOUNDED,
            )  # fmt: skip
        return problems.Condition(residual, jacobian_at, batch_dims=dims, step_size=step_size, start=start)

    def step_size(self, inputs: tuple[Tensor, ...], like: Tensor) -> float | Tensor | None:
        """γ as a float or ``(*batch, 1)``; None if it was not given."""
        step_size = self.binding.step.step_size
        return self._mapped(self._step_size, inputs)(like) if isinstance(step_size, Tensor) else step_size

    @property
    def linearized(self) -> "Root":
        """The root whose Jacobian appears in the linear equations."""
        return self

    def linearization(self, x: Tensor, inputs: tuple[Tensor, ...]) -> tuple["Root", bool, tuple[Tensor, ...]]:
        """The parts of the tangent equation at the solution x: a root, whether its Jacobian is transposed, and its inputs."""
        return self, False, (x, *inputs)

    def _mapped(self, called: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        def evaluate(step: Step, code: tuple[Any, ...], x: Tensor) -> Tensor:
            with self.ambient.evaluating():
                return called(step, code, x)

        if not self.vmaps:
            step, code = self._attach(inputs)
            return lambda x: evaluate(step, code, x)

        def function(x: Tensor, *inputs: Tensor) -> Tensor:
            return evaluate(*self._attach(inputs), x)

        for in_dims, randomness in self.vmaps:
            function = torch.func.vmap(function, in_dims=(0, *in_dims), randomness=randomness)
        return lambda x: function(x, *inputs)

    def approximate(self, made: Preconditioner, x: Tensor, inputs: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        """r -> M⁻¹ r at x, ``(*batch, n)``."""
        return self._at(x, inputs, lambda at: (at.preconditioner(made),))[0]

    def quadratic(self, x: Tensor, made: Preconditioner | None, inputs: tuple[Tensor, ...]
                  ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:  # fmt: skip
        """p -> A p and r -> M⁻¹ r of the quadratic that the energy provides at x, ``(*batch, n)``."""

        def both(at: At) -> tuple[Callable[[Tensor], Tensor], ...]:
            above, product = at.quadratic()
            return product, (lambda r: r) if made is None else at.quadratic_preconditioner(made, above, product)

        product, solve = self._at(x, inputs, both)
        return product, solve

    def _at(self, x: Tensor, inputs: tuple[Tensor, ...], make: Callable[[At], tuple[Callable[[Tensor], Tensor], ...]]
            ) -> list[Callable[[Tensor], Tensor]]:  # fmt: skip
        """Functions of vectors that are created at a point, once; under ``vmap``, which maps only tensors, at each call."""
        if not self.vmaps:
            with self.ambient.evaluating():
                made = make(At(self.layout, *self._attach(inputs), x))
            return [functools.partial(self._within, function) for function in made]
        n = x.shape[-1]

        def once(k: int) -> Callable[[Tensor], Tensor]:
            mapped = self._mapped(lambda step, code, xp: make(At(self.layout, step, code, xp[..., :n]))[k](xp[..., n:]), inputs)
            return lambda p: mapped(torch.cat([x, p.expand_as(x)], -1))

        return [once(0), once(1)]

    def _within(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with self.ambient.evaluating():
            return function(x)

    def _attach(self, inputs: tuple[Tensor, ...]) -> tuple[Step, tuple[Any, ...]]:
        step = self.binding.attach(inputs[: self.num_shared])
        return step, self.code.filled(inputs[self.num_shared :])

    def _optimality(self, step: Step, code: tuple[Any, ...], x: Tensor) -> Tensor:
        return self.layout.ravel(step.optimality(self.layout.unravel(x), *code)).to(x.dtype)

    def _value(self, step: Step, code: tuple[Any, ...], x: Tensor) -> Tensor:
        energy = step.energy_of
        assert energy is not None
        return evaluate(energy, self.layout.unravel(x), code if step.kind is Kind.ENERGY else code[1:])  # after the prox's

    def _energy(self, step: Step, code: tuple[Any, ...], x: Tensor) -> Tensor:
        value = self._value(step, code, x)
        # The value has the precision to which it is known, so that solvers do not mistake rounding for a change.
        return value if self.precision is None else value.to(self.precision)

    def _land(self, step: Step, code: tuple[Any, ...], target: Tensor) -> Tensor:  # (*batch, n + 1), the last number is γ
        assert isinstance(step, ProximalStep)
        step = dataclasses.replace(step, step_size=target[..., -1])
        return self.layout.ravel(step.land(self.layout.unravel(target[..., :-1]), *code)).to(target.dtype)

    def _step_size(self, step: Step, code: tuple[Any, ...], x: Tensor) -> Tensor:
        """γ as ``(*batch, 1)``."""
        assert step.step_size is not None
        return torch.zeros_like(x.detach().sum(-1, keepdim=True)) + per_sample(step.step_size, x.ndim)


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """The equation A(x; inputs) u = v, or Aᵀ u = v, where A = ∂F/∂x for a root; its own inputs are (v, x, \\*inputs)."""

    root: Root
    transposed: bool

    @property
    def binding(self) -> Binding:
        return self.root.binding

    @property
    def symmetric(self) -> bool:
        return self.root.symmetric

    @property
    def kind(self) -> Kind:
        return Kind.SYMMETRIC if self.symmetric else Kind.LINEAR

    @property
    def normalized(self) -> bool:
        return self.root.normalized

    @property
    def batch_dims(self) -> int:
        return self.root.batch_dims

    @property
    def rounding(self) -> float:
        return self.root.rounding

    @property
    def ambient(self) -> Ambient:
        return self.root.ambient

    @property
    def layout(self) -> Layout:
        return self.root.layout

    def reads(self, k: int) -> bool:
        return k < 2 or self.root.reads(k - 2)

    def ends(self, k: int) -> bool:
        return k >= 2 and self.root.ends(k - 2)

    def mapped(self, in_dims: tuple[int | None, ...], randomness: str) -> "Linear":
        return Linear(self.root.mapped(in_dims[2:], randomness), self.transposed)

    def lacking(self, k: int) -> tuple[int, ...]:
        return () if k < 2 else self.root.lacking(k - 2)

    def residual(self, u: Tensor, v: Tensor, x: Tensor, *inputs: Tensor) -> Tensor:
        function = self.root.function(inputs)
        if self.transposed or self.symmetric:
            return or_zero(pullback(function, [x], u)[0], x) - v
        return pushforward(function, [x], [u]) - v

    def problem(self, inputs: tuple[Tensor, ...], start: Tensor) -> problems.Linear:
        v, x, *rest = inputs
        product = linearize(self.root.function(tuple(rest)), x, transposed=self.transposed or self.symmetric)
        step_size = self.root.step_size(tuple(rest), x)
        return problems.Linear(
            lambda u: product(u) - v, lambda _: product, batch_dims=self.batch_dims, step_size=step_size, start=start, right=v,
            symmetric=self.symmetric, approximate=lambda made, _: self.root.approximate(made, x, tuple(rest)),
        )  # fmt: skip

    @property
    def linearized(self) -> Root:
        return self.root

    def linearization(self, u: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Root, bool, tuple[Tensor, ...]]:
        return self.root, self.transposed, inputs[1:]


Equation = Root | Linear

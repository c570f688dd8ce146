r"""The energy at the solution of a minimization, e(θ) = E(x*(θ), θ), and its derivatives (the envelope theorem).

At the solution ∇E(x*(θ), θ) = 0, for every θ. So the derivative of e is

    de/dθ = ∂E/∂θ (x*, θ),                                                                                       (2)

without dx*/dθ: no linear equation is solved. Equation (2) is an identity in θ, so it can be differentiated directly: its
right-hand side is evaluated at an x* that is still connected to the graph, and its derivative contains dx*/dθ. The omitted
term, ∇E dx*/dθ, vanishes together with all of its derivatives.

With a prox, ∇E is not zero. Then the energy is that of the smooth part, and it is differentiated with respect to x* as well.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from energynet._torch.autodiff import (
    alive,
    inside_jvp,
    is_grads_batched,
    opaque,
    pullback,
    pushforward,
    recording,
    with_grads_batched,
)
from energynet.engine.equation import Root
from energynet.engine.failed_samples import FailedSamples, input_kinds
from energynet.engine.purity import unwatched
from energynet.engine.shared_state import ChangedFunctionError, version
from energynet.engine.tasks import Outcome
from energynet.solution import AnswerEnergy
from energynet.step import Kind


class EnergyOf(AnswerEnergy):
    """Evaluates the energy at the solution, with gradients if the solve has recorded them.

    Args:
        root: the equation that was solved; its step has an energy.
        outcome: the result of the solve, with the solution still connected to the graph.
        inputs: the inputs of the root.
        unrolled: whether the solution is differentiated as an iterate and not as a root.
    """

    def __init__(self, root: Root, outcome: Outcome, inputs: tuple[Tensor, ...], *, unrolled: bool) -> None:
        self._root, self._outcome, self._inputs, self._unrolled = root, outcome, inputs, unrolled
        self._grad = torch.is_grad_enabled()
        self._versions = self._now()

    @opaque
    def evaluate(self) -> Tensor:
        changed = [t for t, now, then in zip(self._tensors, self._now(), self._versions, strict=True) if now != then]
        if changed:
            raise ChangedFunctionError(
                f"Solution.energy is evaluated when it is first read, and a tensor of shape {tuple(changed[0].shape)} that the "
                "solve used or returned has been changed in place since, as an optimizer step does. Read the energy before that."
            )
        with recording(self._tensors) as (x, *inputs), torch.set_grad_enabled(self._grad), unwatched(), _as_solved(self._root):
            if self._unrolled:
                return self._root.energy(x, *inputs)
            found: Tensor = _Energy.apply(self._root, x, *self._outcome[1:], *inputs)[0]
            return found

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self._outcome.value, *self._inputs

    def _now(self) -> list[Any]:
        return [version(t) for t in self._tensors]


class _Energy(torch.autograd.Function):
    """E at the solution, differentiable by equation (2) to any order and under every transform of ``torch.func``."""

    @staticmethod
    def forward(root: Root, x: Tensor, status: Tensor, error: Tensor, steps: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return root.energy(x, *inputs).clone(), input_kinds(root, Outcome(x, status, error, steps), inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        root, x, status, _, _, *tensors = inputs
        energy, kinds = output
        ctx.root, ctx.dtype = root, energy.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(kinds)
        ctx.save_for_backward(x, status, kinds, *tensors)
        ctx.save_for_forward(x, status, kinds, *tensors)

    @staticmethod
    @opaque
    def backward(ctx: Any, v: Tensor | None, _: Any) -> tuple[Any, ...]:
        x, status, kinds, *inputs = alive(ctx.saved_tensors)
        if v is None:
            return (None,) * (len(inputs) + 5)
        root, wanted = ctx.root, (ctx.needs_input_grad[1] and _moves(ctx.root), *ctx.needs_input_grad[5:])

        def gradients(v: Tensor) -> list[Tensor | None]:
            return _gradients(wanted, v, x, FailedSamples.of(root, status, kinds, tuple(inputs)))

        with _as_solved(root):
            dx, *found = with_grads_batched(gradients, [v]) if is_grads_batched(v) else gradients(v)
        return None, dx, None, None, None, *found

    @staticmethod
    @opaque
    def jvp(ctx: Any, _root: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        root, (dx, _, _, _, *rest) = ctx.root, tangents
        given = [dx if _moves(root) else None, *rest]
        with _as_solved(root), inside_jvp(ctx.saved_tensors) as (x, status, kinds, *inputs):
            samples = FailedSamples.of(root, status, kinds, tuple(inputs))
            chosen = [k for k, t in enumerate(given) if t is not None]

            def product(*present: Tensor) -> list[Tensor | None]:
                return [_along(dict(zip(chosen, present, strict=True)), x, samples, ctx.dtype)]

            present = [t for t in given if t is not None]
            batched = any(map(is_grads_batched, present))
            return (with_grads_batched(product, present) if batched else product(*present))[0], None

    @staticmethod
    def vmap(info: Any, in_dims: Any, root: Root, *tensors: Tensor) -> tuple[Any, Any]:
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[1:], strict=True)]
        for k, dim in enumerate(in_dims[1:5]):  # the outcome has one entry for each index of the vmap
            moved[k] = moved[k] if dim is not None else moved[k].expand(info.batch_size, *moved[k].shape)
        dims = tuple(None if d is None else 0 for d in in_dims[5:])
        return _Energy.apply(root.mapped(dims, info.randomness), *moved), (0, None)


_Energy.forward.__signature__ = inspect.signature(_Energy.forward)  # type: ignore[attr-defined]  # autograd reads it at each call


@contextlib.contextmanager
def _as_solved(root: Root) -> Iterator[None]:
    """A context in which the energy is that of the solve."""
    with root.ambient.solving(), root.binding.shared.unchanged():
        yield


def _moves(root: Root) -> bool:
    """Whether ∇E is not zero at the solution, so that the energy depends on it to first order."""
    return root.kind is not Kind.ENERGY


def _gradients(wanted: tuple[bool, ...], v: Tensor, x: Tensor, samples: FailedSamples) -> list[Tensor | None]:
    """The gradients of x and of the inputs that are wanted; v is ``(*batch)``."""
    if samples.all:
        return [None, *samples.nothing(wanted[1:], v)]
    v, at = samples.silence(v.unsqueeze(-1)).squeeze(-1), (samples.answer(x), *samples.inputs())
    chosen = [k for k, want in enumerate(wanted) if want]
    pulled = pullback(lambda *values: _energy(samples, at, chosen, values), [at[k] for k in chosen], v) if chosen else []
    found = dict(zip(chosen, pulled, strict=True))
    marked = (samples.mark(k, found.get(k + 1), want) for k, want in enumerate(wanted[1:]))
    return [found.get(0), *marked]


def _along(tangents: dict[int, Tensor], x: Tensor, samples: FailedSamples, dtype: torch.dtype) -> Tensor:  # (*batch)
    """The derivative along tangents of x, which has index 0, and of the inputs."""
    if samples.all or not tangents:
        return torch.zeros_like(x.sum(-1), dtype=dtype) + (torch.nan if samples.all else 0)
    at = (samples.answer(x), *samples.inputs())
    chosen = list(tangents)
    slope = pushforward(lambda *values: _energy(samples, at, chosen, values), [at[k] for k in chosen], list(tangents.values()))
    return torch.where(samples.bad, torch.nan, slope) if samples.active else slope


def _energy(samples: FailedSamples, at: tuple[Tensor, ...], chosen: list[int], values: tuple[Tensor, ...]) -> Tensor:
    full = list(at)
    for k, value in zip(chosen, values, strict=True):
        full[k] = value
    assert isinstance(samples.equation, Root)
    return samples.equation.energy(*full)

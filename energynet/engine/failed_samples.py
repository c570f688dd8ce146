"""Excludes failed samples from the gradients of inputs that all samples share.

A failed sample has no derivative. Before F is differentiated, the sample is replaced by a good one, because its NaN would reach
shared gradients even with a zero cotangent (0 · NaN = NaN). So it contributes nothing to them, and its own context gets NaN.
Which inputs belong to a single sample is a matter of definition and not of their values; see `row_inputs`. If every sample has
failed, or if samples depend on one another, no derivative exists and every gradient is NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import readable
from energynet.engine.equation import Equation, Linear, Root
from energynet.engine.row_inputs import replaceable, roles
from energynet.engine.tasks import Outcome
from energynet.solution import failed
from energynet.step import Step

SHARED, OWN, UNKNOWN, MIXED = range(4)
"""The kinds of inputs: shared by all samples, one row per sample, either of these, or coupled across samples."""


def input_kinds(equation: Equation, outcome: Outcome, inputs: tuple[Tensor, ...]) -> Tensor:
    """The kinds of the inputs, ``(len(inputs),)`` int8, if a sample failed; otherwise they are not needed, and it is empty."""
    bad = failed(outcome.status)
    kinds = _kinds(equation, outcome.value, inputs, bad) if bool(bad.any()) else []
    return torch.tensor(kinds, dtype=torch.int8, device=bad.device)


def _kinds(equation: Equation, x: Tensor, inputs: Sequence[Tensor], bad: Tensor) -> list[int]:
    if isinstance(equation, Linear):  # its own inputs are v and the point
        return [OWN, OWN, *_kinds(equation.root, inputs[1], inputs[2:], bad)]
    if bool(bad.all()) or not equation.layout.batch_dims:
        return [SHARED] * len(inputs)
    root, x, inputs, bad = _of_one_index(equation, x, inputs, bad)
    found = replaceable(root, x, inputs, ~bad)
    if found is None:
        return [MIXED] * len(inputs)
    kinds = [OWN if role else SHARED for role in found]
    read = root.num_shared + root.num_code
    return [*kinds[:read], *_context_kinds(root, inputs, found[root.num_shared : read], ~bad)]


def _of_one_index(root: Root, x: Tensor, inputs: Sequence[Tensor], bad: Tensor) -> tuple[Root, Tensor, list[Tensor], Tensor]:
    """The problem of one index of each vmap: that with the fewest failed samples."""
    inputs = list(inputs)
    for in_dims, _ in reversed(root.vmaps):
        index = int(bad.flatten(1).sum(1).argmin())
        x, bad = x[index], bad[index]
        inputs = [t if dim is None else t[index] for t, dim in zip(inputs, in_dims, strict=True)]
    return root.unmapped(), x, inputs, bad


def _context_kinds(root: Root, inputs: Sequence[Tensor], code: Sequence[bool | None], good: Tensor) -> list[int]:
    """The kinds of the context's tensors if ``encode`` makes the code from them."""
    if not root.num_context:
        return []
    held, context = inputs[: root.num_shared], inputs[-root.num_context :]
    found = encoder_roles(root, held, context, code, good)
    return [UNKNOWN] * len(context) if found is None else [OWN if role else SHARED for role in found]


def encoder_roles(root: Root, held: Sequence[Tensor], context: Sequence[Tensor], code: Sequence[bool | None], good: Tensor
                  ) -> list[bool | None] | None:  # fmt: skip
    """The roles of the context in ``encode``; None if that mixes samples, like BatchNorm, or is random, like dropout."""

    def encode(context: Sequence[Tensor]) -> list[Tensor]:
        step = root.binding.attach([t.detach().clone() for t in held])  # copies, so that running statistics do not change
        return _encoded(root, step, context)

    with torch.random.fork_rng([good.device] if good.device.type == "cuda" else []):
        return roles(encode, context, code, good)


def _encoded(root: Root, step: Step, context: Sequence[Tensor]) -> list[Tensor]:
    assert root.context is not None
    return [leaf for leaf in _tree.leaves(step.encode(*root.context.filled(context))) if isinstance(leaf, Tensor)]


def encoded_apart(root: Root, x: Tensor, inputs: tuple[Tensor, ...], bad: Tensor) -> tuple[Tensor, ...]:
    """The same inputs, but with the code of failed samples disconnected from the encoder, where 0 · NaN = NaN.

    Args:
        root: a root without vmaps, whose context is encoded.
        x: the solutions, ``(B, n)``.
        inputs: the inputs of the root.
        bad: ``(B,)`` bool, the failed samples: some, but not all.
    """
    held, code, context = inputs[: root.num_shared], inputs[root.num_shared :][: root.num_code], inputs[-root.num_context :]
    found = replaceable(root, x, inputs, ~bad)
    rows = None if found is None else found[root.num_shared :][: root.num_code]
    own = None if rows is None else encoder_roles(root, held, context, rows, ~bad)
    if rows is None or own is None:
        return inputs
    share = bad.float()
    safe = [_replaced(t, bad, share) if role else t for t, role in zip(context, own, strict=True)]
    made = _encoded(root, root.binding.step, safe)

    def apart(value: Tensor, new: Tensor) -> Tensor:
        return torch.where(bad.reshape(_aligned(bad, new)), value.detach(), new)

    return *held, *(apart(t, new) if role else new for t, new, role in zip(code, made, rows, strict=True)), *context


class FailedSamples(NamedTuple):
    """Excludes failed samples from shared gradients; does nothing if no sample failed."""

    equation: Equation
    bad: Tensor  # (*batch) bool
    kinds: list[int]  # from `input_kinds`
    values: tuple[Tensor, ...]  # the inputs

    @classmethod
    def of(cls, equation: Equation, status: Tensor, kinds: Tensor, values: tuple[Tensor, ...]) -> "FailedSamples":
        return cls(equation, failed(status), [], values).joined(failed(status), kinds)

    def joined(self, bad: Tensor, kinds: Tensor) -> "FailedSamples":
        """The union with the samples that failed in the adjoint solve, whose last inputs are these."""
        if not len(kinds):
            return self
        found = kinds.tolist()[len(kinds) - len(self.values) :]
        bad = torch.ones_like(bad) if MIXED in found else self.bad | bad
        return self._replace(bad=bad, kinds=found)

    @property
    def all(self) -> bool:
        """Whether every sample is known to have failed."""
        return bool(self.kinds) and readable(self.bad) and bool(self.bad.all())

    @property
    def active(self) -> bool:
        return bool(self.kinds) and (not readable(self.bad) or bool(self.bad.any()))

    def answer(self, y: Tensor) -> Tensor:
        """The solution, in which those of good samples replace those of failed ones."""
        return _replaced(y, self.bad, self.bad.float()) if self.active and self.bad.ndim else y

    def silence(self, u: Tensor) -> Tensor:
        return torch.where(self.bad.unsqueeze(-1), 0, u) if self.active else u

    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs, in which rows of good samples replace those that only failed samples use."""
        if not self.active:
            return self.values
        return tuple(self._safe(k, t) for k, t in enumerate(self.values))

    def _safe(self, k: int, value: Tensor) -> Tensor:
        absent = self._absent(k)
        if len(absent) == self.bad.ndim or not self.equation.reads(k):
            return value
        rows = self.bad.all(absent) if absent else self.bad
        share = self.bad.float().mean(absent) if absent else self.bad.float()  # the failed share of the samples that use a row
        return _replaced(value, rows, share)

    def mark(self, k: int, gradient: Tensor | None, wanted: bool) -> Tensor | None:
        """Set the failed samples' own rows to NaN; a shared input is NaN only if every sample failed."""
        if not self.active or not wanted:
            return gradient
        gradient = torch.zeros_like(self.values[k]) if gradient is None else gradient
        rows = self.bad.all() | self._ill(k)
        return torch.where(rows.reshape(_aligned(rows, gradient)), torch.nan, gradient)

    def _ill(self, k: int) -> Tensor:
        """The rows of an input that have no derivative."""
        absent = self._absent(k)
        if self.kinds[k] == SHARED:
            return self.bad.all(absent) if absent else self.bad
        if not self.equation.ends(k):  # NaN would reach the encoder's shared weights; the context gets it instead
            return self.bad.new_zeros(())
        return self.bad.any(absent) if absent else self.bad

    def nothing(self, wanted: Sequence[bool], v: Tensor) -> list[Tensor | None]:
        """NaN gradients for the case that every sample failed; they stay connected, so they can be differentiated again."""
        gone = torch.nan * v.sum()
        return [t + gone.to(t) if want else None for t, want in zip(self.values, wanted, strict=True)]

    def _absent(self, k: int) -> tuple[int, ...]:
        """The batch dimensions that an input lacks."""
        last = (self.bad.ndim - 1,) if self.equation.layout.batch_dims and self.kinds[k] != OWN else ()
        return (*self.equation.lacking(k), *last)


def _aligned(rows: Tensor, tensor: Tensor) -> tuple[int, ...]:
    return (*rows.shape, *[1] * (tensor.ndim - rows.ndim))


def _replaced(tensor: Tensor, rows: Tensor, share: Tensor) -> Tensor:
    """The tensor ``(*batch, ...)`` with the given rows replaced by those of good samples, if possible of the same vmap index.

    Args:
        tensor: the tensor in which rows are replaced.
        rows: the rows to replace, ``(*batch)`` bool.
        share: ``(*batch)``, the failed share of the samples that use a row, between 0 and 1.
    """
    flat = share.flatten()
    anywhere = flat.argmin()
    number = torch.arange(flat.numel(), device=flat.device).reshape(share.shape)
    nearest = number.gather(-1, share.argmin(-1, keepdim=True))
    donors = torch.where(share.amin(-1, keepdim=True) < 1, nearest, anywhere).expand(share.shape)
    rest = tensor.shape[rows.ndim :]
    good = tensor.reshape(flat.numel(), *rest).index_select(0, donors.flatten()).reshape(tensor.shape)
    return torch.where(rows.reshape(_aligned(rows, tensor)), good, tensor)

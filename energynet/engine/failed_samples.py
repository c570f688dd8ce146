"""Failed samples, kept away from what samples share.

A sample that failed has no derivative. Before F is differentiated it is replaced by a good one, because its NaN would reach
shared gradients even with a zero cotangent (0 · NaN = NaN). Its own context then gets NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from energynet._torch.autodiff import readable
from energynet.engine.equation import Equation
from energynet.engine.tasks import Outcome
from energynet.solution import Status


def separable(equation: Equation, state: Outcome, inputs: tuple[Tensor, ...]) -> Tensor:
    """``(2, len(inputs))`` bool: which inputs hold one row per sample to replace, and to mark with NaN.

    Looked at only where a sample failed; without columns otherwise. Shapes do not tell (a matrix shared by all may have as
    many rows as there are samples), so it is tried: replacing the failed samples' rows leaves the others' residuals as they are.
    """
    own = torch.zeros(2, len(inputs), dtype=torch.bool, device=state.value.device)
    failed = state.status != Status.CONVERGED
    if not bool(failed.any()):
        return own
    x = _replaced(state.value, failed, _donor(failed))
    expected = equation.residual(x, *inputs)
    for k in range(equation.num_shared, len(inputs)):
        lacking = equation.lacking(k)
        rows, good = _somewhere(failed, lacking), ~_somewhere(failed, lacking, keepdim=True).expand_as(failed)
        if not _is_per_sample(inputs[k], rows) or (lacking and not bool(good.any())):
            continue
        trial = [_replaced(t, rows, _donor(rows)) if j == k else t for j, t in enumerate(inputs)]
        is_code = k < equation.num_shared + equation.num_code
        alike = torch.equal(equation.residual(x, *trial)[good], expected[good])
        own[0, k] = is_code and alike
        own[1, k] = alike and is_code != equation.encoded
    return own


def replaced_by_good(tensor: Tensor, failed: Tensor) -> Tensor:
    """The tensor ``(*batch, ...)`` with the row of a good sample in place of the failed ones'."""
    return _replaced(tensor, failed, _donor(failed))


def _somewhere(failed: Tensor, lacking: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Whether a row of an input that lacks these dimensions belongs to a sample that failed."""
    return failed.any(lacking, keepdim) if lacking else failed


def _everywhere(failed: Tensor, lacking: tuple[int, ...]) -> Tensor:
    """Whether it belongs to samples that all failed."""
    return failed.all(lacking) if lacking else failed


def _is_per_sample(tensor: Tensor, rows: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.shape[: rows.ndim] == rows.shape


def _donor(failed: Tensor) -> Tensor:
    """The flat index ``(1,)`` of the first sample that did not fail."""
    return (~failed).reshape(-1).to(torch.int8).argmax().reshape(1)


def _replaced(tensor: Tensor, failed: Tensor, donor: Tensor) -> Tensor:
    """The tensor ``(*batch, ...)`` with the donor's row in place of the failed ones."""
    rows = tensor.reshape((failed.numel(), *tensor.shape[failed.ndim :]))
    mask = failed.reshape((*failed.shape, *[1] * (tensor.ndim - failed.ndim)))
    return torch.where(mask, rows.index_select(0, donor)[0], tensor)


class Quarantine(NamedTuple):
    """Keeps failed samples away from what samples share; does nothing where none failed."""

    failed: Tensor  # (*batch) bool
    own: Tensor  # of `separable`
    values: tuple[Tensor, ...]
    lacking: tuple[tuple[int, ...], ...]  # of each value, the dimensions of failed that it does not have

    @property
    def active(self) -> bool:
        return self.own.shape[1] > 0 and (not readable(self.failed) or bool(self.failed.any()))

    def joined(self, failed: Tensor, own: Tensor) -> "Quarantine":
        """With the samples that failed in the adjoint as well, whose last inputs are these."""
        if not own.shape[1]:
            return self
        own = own[:, own.shape[1] - len(self.values) :]
        return self._replace(failed=self.failed | failed, own=self.own | own if self.own.shape[1] else own)

    def answer(self, y: Tensor) -> Tensor:
        return _replaced(y, self.failed, _donor(self.failed)) if self.active else y

    def silence(self, u: Tensor) -> Tensor:
        return torch.where(self.failed.unsqueeze(-1), 0, u) if self.active else u

    def inputs(self) -> tuple[Tensor, ...]:
        if not self.active:
            return self.values
        return tuple(self._safe(k, t) for k, t in enumerate(self.values))

    def _safe(self, k: int, value: Tensor) -> Tensor:
        # A row that a good sample reads as well, under another index of a vmap, is no cause of NaN.
        rows = _everywhere(self.failed, self.lacking[k])
        if not _is_per_sample(value, rows):
            return value
        return torch.where(self.own[0, k], _replaced(value, rows, _donor(_somewhere(self.failed, self.lacking[k]))), value)

    def mark(self, k: int, gradient: Tensor | None, wanted: bool) -> Tensor | None:
        """NaN in the failed samples' own rows; nothing from them elsewhere."""
        if not self.active or not wanted:
            return gradient
        gradient = torch.zeros_like(self.values[k]) if gradient is None else torch.where(self.failed.all(), 0, gradient)
        rows = _somewhere(self.failed, self.lacking[k])
        if not _is_per_sample(gradient, rows):
            return gradient
        mask = rows.reshape((*rows.shape, *[1] * (gradient.ndim - rows.ndim)))
        return torch.where(mask & self.own[1, k], torch.nan, gradient)

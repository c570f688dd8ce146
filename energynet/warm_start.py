"""Solutions from earlier epochs as initial points."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet.solution import Solution


class WarmStart:
    """Stores the last solution of each sample under the sample's index, as the initial point for its next solve.

    Training changes the parameters only slightly from step to step, so the previous solution is close to the new one. If there
    is only one minimum or fixed point, the solution stays the same within the tolerance and takes fewer steps; with several
    minima, a warm start follows one of them. Calls are thread-safe, and a copy or pickle contains the same solutions.

    Example:
        >>> import torch
        >>> from energynet import FPI_GD
        >>> layer = FPI_GD(lambda x, z: 0.5 * (x - z).square().sum(-1), step_size=0.5)
        >>> cache = WarmStart()
        >>> z, index = torch.ones(2, 3), torch.tensor([7, 4])           # (B, n), the samples' indices (B,)
        >>> for epoch in range(2):
        ...     solution = layer.solve(z, x0=cache.start(index, torch.zeros_like(z)))
        ...     cache.store(index, solution)
        ...     print(solution.num_steps.tolist())
        [12, 12]
        [0, 0]

    Args:
        capacity: the largest number of samples to keep, the most recently stored ones; None: all.
        device: the device that stores the solutions, such as ``torch.device("cpu")`` to save GPU memory; None: their own.

    Raises:
        ValueError: if capacity is not a whole number ≥ 1.
    """

    def __init__(self, capacity: int | None = None, *, device: torch.device | None = None) -> None:
        if capacity is not None and not (isinstance(capacity, int) and capacity >= 1):
            raise ValueError(f"WarmStart needs a whole capacity ≥ 1 or None, got {capacity}.")
        self.capacity, self.device = capacity, device
        self._rows: OrderedDict[int, int] = OrderedDict()  # sample index -> row of the tables, the oldest entry first
        self._tables: list[Tensor] = []  # one per leaf of x, (rows, ...)
        self._lock = threading.Lock()

    def start(self, index: Tensor | Sequence[int], default: Any) -> Any:
        """The initial points: the stored solution of each sample, or the default for samples without one.

        Args:
            index: the samples' indices, ``(B,)`` integers.
            default: a tensor ``(B, ...)`` or a pytree of such.

        Returns:
            Like ``default``, with the same devices and dtypes, without a graph.

        Raises:
            ValueError: if there is not one index per sample, or if stored solutions have other shapes.
        """
        leaves, spec = _tree.flatten(default)
        numbers = _numbers(index, leaves)
        result = [leaf.detach().clone() for leaf in leaves]
        with self._lock:
            self._check(leaves)
            known = [k for k, number in enumerate(numbers) if number in self._rows]
            rows = [self._rows[numbers[k]] for k in known]
            for leaf, table in zip(result, self._tables):
                leaf[known] = table[rows].to(leaf)
        return _tree.unflatten(result, spec)

    def store(self, index: Tensor | Sequence[int], solution: Solution) -> None:
        """Store the solutions of the samples that did not fail, without their graph, in the most precise dtype so far.

        Args:
            index: the samples' indices, ``(B,)`` integers; if an index occurs twice, the later sample is stored.
            solution: the result of ``minimize``, ``fixed_point`` or a layer's ``solve`` for one batch.

        Raises:
            ValueError: if there is not one index per sample, or if stored solutions have other shapes.
        """
        leaves = _tree.leaves(solution.value)
        numbers = _numbers(index, leaves)
        positions = {n: k for k, (n, failed) in enumerate(zip(numbers, solution.failed.tolist())) if not failed}
        kept = list(positions.items())[-self.capacity :] if self.capacity else list(positions.items())
        if not kept:
            return
        with self._lock:
            self._check(leaves)
            rows = [self._row(number) for number, _ in kept]
            self._grow(leaves, max(rows) + 1)
            for table, leaf in zip(self._tables, leaves):
                table[rows] = leaf.detach()[[k for _, k in kept]].to(table)

    def state_dict(self) -> dict[str, Any]:
        """The indices ``(N,)`` and the solutions, a list of tensors ``(N, ...)``; it can be loaded with ``weights_only=True``."""
        with self._lock:
            rows = list(self._rows.values())
            numbers = torch.tensor(list(self._rows), dtype=torch.int64)
            return {"numbers": numbers, "answers": [table[rows] for table in self._tables]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the stored solutions by those of a `state_dict`; if there are too many, the first ones are omitted.

        Raises:
            ValueError: if there is not one solution per index.
        """
        numbers = state["numbers"].tolist()
        if any(len(table) != len(numbers) for table in state["answers"]):
            raise ValueError(
                f"WarmStart was given {len(numbers)} indices and solutions of shapes "
                f"{[tuple(t.shape) for t in state['answers']]}. Likely cause: a damaged or edited state. Load an unmodified "
                "result of state_dict."
            )
        first = max(0, len(numbers) - self.capacity) if self.capacity else 0
        with self._lock, torch.inference_mode(False):
            self._tables = [table[first:].to(device=self.device, copy=True) for table in state["answers"]]
            self._rows = OrderedDict((number, row) for row, number in enumerate(numbers[first:]))

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, number: int) -> bool:
        return number in self._rows

    def __repr__(self) -> str:
        return f"WarmStart(capacity={self.capacity}, device={self.device}, {len(self)} samples)"

    def __getstate__(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "device": self.device, **self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["capacity"], device=state["device"])  # type: ignore[misc]
        self.load_state_dict(state)

    def _row(self, number: int) -> int:
        """The row for a sample: its own, a new one, or that of the oldest entry; the sample becomes the newest entry."""
        row = self._rows.pop(number, None)
        if row is None:
            full = self.capacity is not None and len(self._rows) >= self.capacity
            row = self._rows.popitem(last=False)[1] if full else len(self._rows)
        self._rows[number] = row
        return row

    def _grow(self, leaves: list[Tensor], needed: int) -> None:
        """Enlarge the tables to the needed number of rows, at least doubling them, in dtypes that lose no precision."""
        dtypes = [leaf.dtype for leaf in leaves]
        if self._tables:
            dtypes = [torch.promote_types(table.dtype, dtype) for table, dtype in zip(self._tables, dtypes)]
        room = len(self._tables[0]) if self._tables else 0
        if room >= needed and dtypes == [table.dtype for table in self._tables]:
            return
        size = room if room >= needed else max(needed, 2 * room)
        size = size if self.capacity is None else min(size, self.capacity)
        with torch.inference_mode(False):  # tensors created in inference mode could not be modified outside it
            shapes = [(size, *leaf.shape[1:]) for leaf in leaves]
            devices = [self.device or leaf.device for leaf in leaves]
            tables = [torch.empty(s, dtype=d, device=where) for s, d, where in zip(shapes, dtypes, devices)]
        for table, old in zip(tables, self._tables):
            table[: len(old)] = old
        self._tables = tables

    def _check(self, leaves: list[Tensor]) -> None:
        kept = [tuple(table.shape[1:]) for table in self._tables]
        seen = [tuple(leaf.shape[1:]) for leaf in leaves]
        if kept and kept != seen:
            raise ValueError(
                f"WarmStart stores solutions of shapes {kept} per sample, but was given {seen}. Likely cause: several image "
                "sizes, or one cache for two layers. Use a WarmStart for each."
            )


def _numbers(index: Tensor | Sequence[int], leaves: list[Tensor]) -> list[int]:
    numbers = index.tolist() if isinstance(index, Tensor) else [_whole(number) for number in index]
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if not isinstance(numbers, list) or sizes != {len(numbers)} or not all(type(n) is int for n in numbers):
        shape = tuple(index.shape) if isinstance(index, Tensor) else len(numbers)
        raise ValueError(
            f"WarmStart needs one whole number per sample, got index {shape} for x of shapes {[tuple(t.shape) for t in leaves]}. "
            "Let the data set return the index together with each sample."
        )
    return numbers


def _whole(number: Any) -> int:
    """Convert a number from Python, NumPy or PyTorch to an equal int, or raise an error."""
    try:
        nested = hasattr(number, "ndim") and number.ndim > 0
        whole = None if nested or isinstance(number, bool) else int(number)
    except (TypeError, ValueError, OverflowError):  # a list, NaN, infinity
        whole = None
    if whole is None or whole != number or not -(2**63) <= whole < 2**63:
        raise ValueError(
            f"WarmStart needs whole numbers as sample indices, got {number}. Likely cause: a mask, or an index that was scaled "
            "or averaged. Let the data set return the index together with each sample."
        )
    return whole

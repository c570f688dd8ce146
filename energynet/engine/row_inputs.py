"""Determines which tensors have one row per sample.

Shapes do not suffice: a matrix that all samples share may have as many rows as there are samples. The definition is this: the
tensors S have one row per sample if the function f commutes with every selection I of samples, of any size and with repetitions,

    f(x[I], S[I], others) = f(x, S, others)[I].

This is tested at generic values, because it may hold by coincidence at the present ones (equal rows, a zero residual, a gate
that is closed). If no S is found, the samples depend on one another, or the function is undefined at the generic values. Then
the roles are unknown, and they are not guessed.

A function may also capture per-sample numbers that are not arguments, as a closure does, so that it only accepts this number of
samples. Some of its samples can be replaced nevertheless if every argument with as many rows proves to have one per sample; see
`replaceable`.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from energynet.engine.equation import Equation, Linear, Root

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Role = bool | None
"""Whether a tensor has one row per sample; None: the result does not depend on it, so it is unknown."""


def own_rows(equation: Equation, x: Tensor, inputs: tuple[Tensor, ...]) -> tuple[bool, ...] | None:
    """Which inputs have one row per row of x, so that a part of the batch can be computed separately; None if it cannot."""
    if isinstance(equation, Linear):  # its own inputs are v and the point
        own = own_rows(equation.root, inputs[1], inputs[2:])
        return None if own is None else (True, True, *own)
    if equation.vmaps:
        return tuple(dim == 0 for dim in equation.vmaps[-1][0])
    roles = root_roles(equation, x, inputs, torch.ones(len(x), dtype=torch.bool, device=x.device))
    return None if roles is None else tuple(role is True for role in roles)


def root_roles(root: Root, x: Tensor, inputs: Sequence[Tensor], good: Tensor) -> list[Role] | None:
    """The roles of the inputs of F, which is not under a vmap; None if samples depend on one another.

    Args:
        root: the equation F = 0.
        x: ``(B, n)``.
        inputs: the inputs of F.
        good: ``(B,)`` bool, the samples at whose values F can be evaluated.
    """
    read = root.num_shared + root.num_code  # F does not depend on the remaining inputs
    found = roles(lambda t: [root.residual(*t, *inputs[read:])], [x, *inputs[:read]], [True], good, fixed=[0])
    return None if found is None else [*found[1:], *[None] * (len(inputs) - read)]


def replaceable(root: Root, x: Tensor, inputs: Sequence[Tensor], good: Tensor) -> list[Role] | None:
    """`root_roles`, or else roles that only permit replacing the rows of some samples by those of others."""
    found = root_roles(root, x, inputs, good)
    if found is not None:
        return found
    read = root.num_shared + root.num_code
    own = own_by_sight(lambda t: root.residual(*t, *inputs[read:]), [x, *inputs[:read]], good)
    return None if own is None else [*(k + 1 in own for k in range(read)), *[None] * (len(inputs) - read)]


@torch.no_grad()
def own_by_sight(function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor], good: Tensor) -> list[int] | None:
    """The indices of the tensors with B rows, if each row of the result depends only on the same row of these; else None.

    Args:
        function: tensors -> a tensor with B rows.
        tensors: the values around which it is tested; the first one has B rows.
        good: ``(B,)`` bool, the samples whose rows may be used.

    Example:
        >>> import torch
        >>> mask, good = torch.tensor([0.0, 1.0, 2.0, 1.0]), torch.ones(4, dtype=torch.bool)
        >>> x, W = torch.randn(4, 3), torch.randn(3, 3)
        >>> own_by_sight(lambda t: mask[:, None] + t[0] @ t[1], (x, W), good)
        [0]
        >>> own_by_sight(lambda t: mask + t[0].mean(), (x, W), good)
    """
    same = [0, *_candidates(tensors, good, [0])]
    if not bool(good.any()):
        return None
    with warnings.catch_warnings(action="ignore"):
        trials = _trials(lambda t: [function(t)], tensors, [True], good, [0], same[1:])
        own = bool(trials) and all(_is_own([trial.role(k, odd) for trial in trials for odd in (True, False)]) for k in same)
    return same if own else None


def _is_own(roles: Sequence[Role]) -> bool:
    return True in roles and False not in roles


def _candidates(tensors: Sequence[Tensor], good: Tensor, fixed: Collection[int]) -> list[int]:
    return [k for k, t in enumerate(tensors) if k not in fixed and t.shape[:1] == good.shape]


@torch.no_grad()
def roles(function: Function, tensors: Sequence[Tensor], results: Sequence[Role], good: Tensor,
          fixed: Collection[int] = ()) -> list[Role] | None:  # fmt: skip
    """The roles of a function's arguments, given those of its results; None if it does not commute with selections of samples.

    Args:
        function: tensors -> tensors.
        tensors: the values around which it is tested.
        results: the roles of the returned tensors.
        good: ``(B,)`` bool, the samples whose rows may be used.
        fixed: the indices of arguments that are known to have one row per sample.

    Example:
        >>> import torch
        >>> x, A, b = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 4)
        >>> roles(lambda t: [t[0] @ t[1].T - t[2]], (x, A, b), [True], torch.ones(4, dtype=torch.bool), fixed=[0])
        [True, False, True]
    """
    candidates = _candidates(tensors, good, fixed)
    if not bool(good.any()):
        return None
    with warnings.catch_warnings(action="ignore"):  # such as those of a loss that broadcasts
        trials = _trials(function, tensors, results, good, fixed, candidates)
        if not trials:
            return None
        seen = {k: trials[0].role(k) for k in candidates}
        for own in _sets(seen):
            if all(trial.commutes({*fixed, *own}) for trial in trials):
                return [k in fixed or k in own or (None if seen.get(k, False) is None else False) for k in range(len(tensors))]
    return None


def _sets(seen: dict[int, Role]) -> Iterable[Collection[int]]:
    """Candidate sets of tensors with one row per sample: first those that appeared to be, with as few unused ones as possible."""
    sure, idle = ([k for k, role in seen.items() if role is wanted] for wanted in (True, None))
    expected = ((*sure, *some) for some in _subsets(idle))
    return itertools.islice(itertools.chain(expected, _subsets([*sure, *idle])), MOST_SETS)


MOST_SETS = 64


def _subsets(values: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(values, size) for size in range(len(values) + 1))


# The perturbation sizes of tensors known to have one row per sample, of those that may have, and of all others.
FAR = ((0.5, 0.5, 0.0), (0.5, 0.5, 0.5), (50.0, 50.0, 50.0))
NEAR = ((0.01, 0.01, 0.01), (0.5, 0.0, 0.0))


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A function, and its results at some values."""

    function: Function
    tensors: Sequence[Tensor]
    results: Sequence[Tensor]
    roles: Sequence[Role]  # of the results
    rows: Tensor  # the indices of the samples whose results are finite

    def commutes(self, own: Collection[int]) -> bool:
        """Whether a selection of samples gives the same results as the whole batch, if these tensors have one row per sample."""
        for half in (self.rows[::2], self.rows[1::2]):  # disjoint halves
            half = half if len(half) else self.rows
            count = self._unusual_size()
            chosen = half[torch.arange(count, device=half.device) % min(len(half), count - 1)]  # at least one of them twice
            found = _evaluated(self.function, [t[chosen] if k in own else t for k, t in enumerate(self.tensors)])
            if found is None or not all(map(self._agree, found, self.results, self.roles, itertools.repeat(chosen))):
                return False
        return True

    def role(self, k: int, odd: bool = True) -> Role:
        """The apparent role of a tensor, from the results that change with every second one of its rows."""
        some = (torch.arange(len(self.tensors[k]), device=self.rows.device) % 2 == 1) == odd
        found = _evaluated(self.function, [_moved_rows(t, some) if j == k else t for j, t in enumerate(self.tensors)])
        if found is None:
            return None
        inside, outside = (self.rows[some[self.rows] == wanted] for wanted in (True, False))
        results = list(zip(found, self.results, self.roles, strict=True))
        if any(not _close(now, before) for now, before, role in results if role is False):
            return False
        if any(not _close(now[outside], before[outside]) for now, before, role in results if role is True):
            return False
        return any(not _close(now[inside], before[inside]) for now, before, role in results if role is True) or None

    def _unusual_size(self) -> int:
        """A number of samples that is not the size of any tensor."""
        sizes = {size for t in self.tensors for size in t.shape}
        return next(count for count in itertools.count(3) if count not in sizes)

    @staticmethod
    def _agree(found: Tensor, whole: Tensor, role: Role, chosen: Tensor) -> bool:
        alone = role is not True and _close(found, whole)
        return alone or (role is not False and whole.ndim > 0 and _close(found, whole[chosen]))


def _trials(function: Function, tensors: Sequence[Tensor], results: Sequence[Role], good: Tensor, fixed: Collection[int],
            candidates: Collection[int]) -> list[_Trial]:  # fmt: skip
    """Trials at values far from the present ones, or else near them; rows of samples that are not good are replaced."""
    start = _of_good_samples(tensors, good, fixed, candidates)
    groups = [0 if k in fixed else 1 if k in candidates else 2 for k in range(len(start))]

    def trial(distances: Sequence[float]) -> _Trial | None:
        generator = torch.Generator().manual_seed(0)
        values = [_moved(t, distances[group], generator) if distances[group] else t for t, group in zip(start, groups)]
        found = _evaluated(function, values)
        rows = good.new_zeros(0) if found is None else _finite_rows(found, results, good)
        return _Trial(function, values, found, results, rows) if found is not None and len(rows) else None

    return [t for t in map(trial, FAR) if t is not None] or [t for t in map(trial, NEAR) if t is not None]


def _of_good_samples(tensors: Sequence[Tensor], good: Tensor, fixed: Collection[int],
                     candidates: Collection[int]) -> list[Tensor]:  # fmt: skip
    """The tensors with rows of good samples in place of the others, where these certainly are rows or are not finite."""
    numbers = torch.arange(len(good), device=good.device)
    donors = torch.where(good, numbers, numbers[good][numbers % int(good.sum())])

    def replaced(k: int, t: Tensor) -> Tensor:
        if k in fixed:
            return t[donors]
        if k not in candidates or not t.is_floating_point():
            return t
        finite = torch.isfinite(t).reshape(len(t), -1).all(1)
        return torch.where(finite.reshape(-1, *[1] * (t.ndim - 1)), t, t[donors])

    return [replaced(k, t) for k, t in enumerate(tensors)]


def _finite_rows(found: Sequence[Tensor], roles: Sequence[Role], good: Tensor) -> Tensor:
    """The indices of the samples whose results are finite, if the results have one row per sample."""
    finite = torch.ones_like(good)
    for t, role in zip(found, roles, strict=True):
        if role is True:
            finite = finite & (torch.isfinite(t).reshape(len(t), -1).all(1) if len(t) == len(good) else False)
    return finite.nonzero().flatten()


def _evaluated(function: Function, tensors: Sequence[Tensor]) -> Sequence[Tensor] | None:
    try:
        return function(tensors)
    except Exception:  # user code may raise anything at an unexpected shape or outside its domain
        return None


def _moved(tensor: Tensor, far: float, generator: torch.Generator) -> Tensor:
    """Values with the same signs and of similar size; zeros, which would hide their factors, become positive."""
    if tensor.dtype == torch.bool:
        return ~tensor
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
    size = tensor.abs()
    usual = size.mean()
    size = size + torch.where((usual > 0) & torch.isfinite(usual), usual, 1).to(tensor)
    return tensor + far * noise * torch.where(tensor < 0, -size, size)


def _moved_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """The tensor with other values in some of its rows."""
    other = _moved(tensor, 0.5, torch.Generator().manual_seed(1)) if tensor.is_floating_point() else tensor.roll(1, 0)
    return torch.where(rows.reshape(-1, *[1] * (tensor.ndim - 1)), other, tensor)


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree row by row, up to rounding errors."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    rows = other.abs().nan_to_num(0, 0, 0).reshape(len(other) if other.ndim else 1, -1).amax(1)
    allowed = _rounding(one) * (rows.reshape(-1, *[1] * (other.ndim - 1)) if other.ndim else rows[0])
    return bool((((one - other).abs() <= allowed) | (one == other) | (one.isnan() & other.isnan())).all())


def _rounding(tensor: Tensor) -> float:
    """The relative difference to expect between results of operations on different numbers of rows."""
    device = tensor.device.type
    unit = torch.finfo(tensor.dtype).eps
    if torch.is_autocast_enabled(device):
        unit = max(unit, torch.finfo(torch.get_autocast_dtype(device)).eps)
    if device == "cuda" and tensor.dtype == torch.float32:  # TensorFloat-32
        unit = max(unit, torch.finfo(torch.float16).eps)
    return max(torch.finfo(tensor.dtype).eps ** 0.5, 4 * unit)

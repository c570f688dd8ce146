"""The result of a solve, and the messages about failures."""

import dataclasses
import enum
import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import opaque, readable, transform_active

OnFailure = Literal["raise", "warn", "ignore"]
POLICIES = ("raise", "warn", "ignore")


class ConvergenceError(RuntimeError):
    """A solve, forward or adjoint, did not converge and ``on_failure="raise"``."""


class ConvergenceWarning(UserWarning):
    """A solve, forward or adjoint, did not converge and ``on_failure="warn"``."""


class Status(enum.IntEnum):
    """The outcome of the solve of one sample.

    Example:
        >>> import torch
        >>> torch.tensor([0, 1]) == Status.CONVERGED
        tensor([ True, False])
    """

    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2
    DIVERGED = 3
    STALLED = 4
    BUDGET = 5

    @property
    def sentence(self) -> str:
        """The description of the outcome, for messages."""
        return _SENTENCES[self]


def failed(status: Tensor) -> Tensor:
    """``(*batch)`` bool: samples without a solution, and therefore without a derivative."""
    return (status != Status.CONVERGED) & (status != Status.BUDGET)


UNSEPARATED = (
    "Samples failed and cannot be separated from the others, so every gradient is NaN. Likely cause: samples depend on one "
    "another, as through a mean over the batch, or the energy or map cannot be evaluated at other points. "
    "Let each sample depend only on its own rows, correct the failed samples, or solve without them."
)
_SENTENCES = {
    Status.CONVERGED: "converged.",
    Status.MAX_STEPS: "took all of the steps that Termination allows and did not converge.",
    Status.NONFINITE: "met NaN or Inf.",
    Status.DIVERGED: "diverged.",
    Status.STALLED: "stopped, since no step improved it further.",
    Status.BUDGET: "took the steps of its budget, which is not a failure.",
}
_ADVICE = {  # used where only the status is known
    Status.MAX_STEPS: (
        "Likely cause: slow progress, or an energy without a minimizer. Try another solver or a larger max_steps, and for an "
        "energy a ridge in x."
    ),
    Status.NONFINITE: (
        "Likely cause: NaN in the context or x0, a step that is too long, or a point outside the domain (log or sqrt of a "
        "negative number). Check the inputs of these samples; try a smaller step size."
    ),
    Status.DIVERGED: (
        "Likely cause: a step size above 2/L (L the largest curvature), a map that does not contract, or an energy without a "
        "minimizer. Try a smaller step size or none; for a map, Broyden() or DampedStep; for an energy, a ridge in x."
    ),
    Status.STALLED: (
        "Likely cause: rounding, or a point where the energy is not smooth. Try a looser tolerance, or a smooth energy."
    ),
}


@dataclasses.dataclass(frozen=True)
class Trace:
    """The history of a solve, with one row per iteration of the loop; a sample that has stopped repeats its last row.

    T is at least the number of updates of the slowest sample; it is larger if a sample stopped too early and continued later.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> trace = minimize(lambda x: (x - 3).square().sum(-1), torch.zeros(2, 1), trace=True).trace
        >>> trace.energy[0], trace.value.shape
        (tensor([9., 9.]), torch.Size([2, 2, 1]))

    Args:
        error: ``(T + 1, B)``, estimated distances to the solution, like ``Solution.error``, computed with the final scale.
        value: the iterates, like ``x0`` with a leading dimension T + 1.
        energy: ``(T + 1, B)``, for a minimization.
    """

    error: Tensor
    value: Any
    energy: Tensor | None = None


_tree.register_dataclass(Trace)


class AnswerEnergy(ABC):
    """The energy at the solution, which is evaluated when it is first read; copies share it, pickles omit it."""

    @abstractmethod
    def evaluate(self) -> Tensor:
        """``(*batch)``."""

    def __deepcopy__(self, memo: Any) -> "AnswerEnergy":
        return self

    def __reduce__(self) -> Any:
        return NoEnergy, (LEFT_BEHIND,)


class NoEnergy(AnswerEnergy):
    """A missing energy, with the reason."""

    def __init__(self, why: str) -> None:
        self.why = why

    def evaluate(self) -> Tensor:
        raise AttributeError(self.why)

    def __reduce__(self) -> Any:
        return NoEnergy, (self.why,)

    def __repr__(self) -> str:
        return "..."


NO_ENERGY = "Solution.energy was read, but a fixed point of a map has no energy: only results of minimize and FPI_GD have one."
LEFT_BEHIND = (
    "Solution.energy was read from a copy that cannot evaluate it, since the copy was made from the tensors alone, as by pickle "
    "or tree_map, before the energy was read. Read it from the original first."
)


@dataclasses.dataclass(frozen=True)
class Solution:
    """The result of a solve, with the status, error and number of steps per sample.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> solution = minimize(lambda x: (x - 3).square().sum(-1), torch.zeros(2, 1), step_size=0.5)
        >>> solution.value.flatten(), solution.converged.all()
        (tensor([3., 3.]), tensor(True))

    Args:
        value: the solution, like ``x0``, with gradients.
        status: ``(B,)`` int8; compare it with `Status`.
        error: ``(B,)``, the estimated distance of ``value`` from the solution, in units of ``x``, as `Termination` defines it.
            It carries no gradient: in a loss it is a constant, and trains nothing.
        num_steps: ``(B,)`` int32, the number of updates until the sample stopped.
        trace: the history of the solve, if requested by ``trace=True``.
    """

    value: Any
    status: Tensor
    error: Tensor
    num_steps: Tensor
    trace: Trace | None = None
    _energy: Tensor | AnswerEnergy = dataclasses.field(default=NoEnergy(LEFT_BEHIND), repr=False, compare=False, kw_only=True)

    @property
    @opaque
    def energy(self) -> Tensor:
        """``(B,)``: the energy at the solution of a minimization, with gradients like ``value``.

        Its first derivative is ∂E/∂θ at x*, which needs no adjoint solve because ∇E = 0 there (the envelope theorem). Higher
        derivatives contain dx*/dθ and are exact. With a ``prox``, this is the energy of the smooth part alone, and it is
        differentiated through x*; the result is ∂E/∂θ, too, unless the set depends on θ. With a budget or a loose tolerance,
        the error of ∂E/∂θ is of the size of the error of x. With `UnrolledAdjoint`, the energy of the iterate is
        differentiated.

        The energy is evaluated when it is first read, or when the solution leaves a transform such as ``vmap``.

        Example:
            >>> import torch
            >>> from energynet import minimize
            >>> z = torch.tensor([[3.0, 4.0]], requires_grad=True)
            >>> energy = minimize(lambda x, z: (x - z).square().sum(-1) + x.square().sum(-1), torch.zeros(1, 2), z).energy
            >>> energy.detach().round(decimals=3), torch.autograd.grad(energy.sum(), z)[0].round(decimals=3)    # ½ z², z
            (tensor([12.5000]), tensor([[3., 4.]]))

        Raises:
            AttributeError: for a fixed point of a map, which has no energy.
            ChangedFunctionError: if something that E reads was changed in place since the solve.

        Source: Milgrom and Segal (2002), Envelope theorems for arbitrary choice sets.
        """
        if isinstance(self._energy, Tensor):
            return self._energy
        found = self._energy.evaluate()
        if not transform_active():
            object.__setattr__(self, "_energy", found)
        return found

    @property
    def converged(self) -> Tensor:
        """``(B,)`` bool: whether the error is within the tolerance."""
        return self.status == Status.CONVERGED

    @property
    def status_names(self) -> list[str]:
        """The names of the samples' `Status`, in order; for one problem, a list with one element."""
        self._be_readable("status_names")
        return [Status(code).name for code in self.status.flatten().tolist()]

    @property
    def failed(self) -> Tensor:
        """``(B,)`` bool: whether the sample failed; a sample that has used up a stated budget has not failed."""
        return failed(self.status)

    def raise_for_status(self) -> "Solution":
        """Return the solution if no sample failed.

        Raises:
            ConvergenceError: with the failed samples, the likely cause and the remedy.
        """
        self._be_readable("raise_for_status")
        if bool(self.failed.any()):
            report(describe(self.status, self.error, self.num_steps), "raise")
        return self

    def _be_readable(self, name: str) -> None:
        if not readable(self.status):
            raise RuntimeError(
                f"Solution.{name} was read inside vmap, where no value can be read. Return the solution from the function, and "
                "read it outside."
            )

    def __repr__(self) -> str:
        value = _tree.map_structure(lambda t: f"Tensor{tuple(t.shape)}", self.value)
        if not readable(self.status):
            return f"Solution(value={value}, under vmap)"
        counts = {s.name: int((self.status == s).sum()) for s in Status}
        statuses = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        return f"Solution(value={value}, status=({statuses}), steps≤{int(self.num_steps.amax()) if statuses else 0})"


def _leaf(solution: Solution, name: str) -> Any:
    """A field as it leaves a transform or enters a pytree function; the energy is included only if it is known."""
    found = getattr(solution, name)
    if not isinstance(found, AnswerEnergy):
        return found
    return solution.energy if transform_active() and not isinstance(found, NoEnergy) else None


_tree.register_dataclass(Solution, _leaf)


def report(message: str, on_failure: OnFailure, consequence: str = "") -> None:
    """Raise an error or warn that samples failed; a warning also states the consequence."""
    if on_failure == "raise":
        raise ConvergenceError(message + ' (on_failure="warn" or "ignore" continues without these samples.)')
    warnings.warn(f"{message} {consequence}", ConvergenceWarning, stacklevel=2)


LEFT_OUT = (
    "These samples add nothing to shared gradients; the gradient of their own context is NaN, and so is that of every weight "
    "in front of the solve."
)
NONE_LEFT = "Every sample failed, so every gradient is NaN."
UNROLLED = "Their gradients are those of the last iterates."


def describe(status: Tensor, error: Tensor, steps: Tensor) -> str:
    """The message for a failed solve of which only the outcome is known. All tensors are ``(*batch)`` and readable."""
    parts = []
    for kind in (s for s in Status if s != Status.CONVERGED):
        ended = status == kind
        if bool(ended.any()):
            seen = f"Seen: {reached(error, steps, ended)}."
            parts.append(" ".join((f"{kind.name}: {samples(ended)} {kind.sentence}", *filter(None, [_ADVICE.get(kind)]), seen)))
    return " ".join(["The solve failed.", *parts] if bool(failed(status).any()) else parts)


def reached(error: Tensor, steps: Tensor, mask: Tensor, what: str = "estimated distance to the answer") -> str:
    """The error and the number of steps of the first sample in a mask."""
    index = first(mask)
    count, size = int(steps[index]), float(error[index])
    distance = f"{what} {size:.3g} " if math.isfinite(size) else ""
    return f"{distance}after {count} step{'' if count == 1 else 's'}"


def first(mask: Tensor) -> tuple[Tensor, ...]:
    """The index of the first sample in a mask ``(*batch)``."""
    return tuple(i[0] for i in torch.nonzero(mask, as_tuple=True)) if mask.ndim else ()


def samples(mask: Tensor) -> str:
    """The text that names the samples in a mask ``(*batch)``."""
    if mask.ndim == 0:
        return "the problem"
    where = [tuple(i) if len(i) > 1 else i[0] for i in torch.nonzero(mask).tolist()]
    named = ", ".join(map(str, where[:8])) + (", ..." if len(where) > 8 else "")
    if mask.numel() == 1:
        return "the only sample (number 0)"
    return f"{len(where)} of {mask.numel()} samples (number {named})"

"""What a solve returns, and every sentence about its failures."""

import dataclasses
import enum
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import readable

OnFailure = Literal["raise", "warn", "ignore"]
POLICIES = ("raise", "warn", "ignore")


class ConvergenceError(RuntimeError):
    """A solve, forward or adjoint, did not converge and ``on_failure="raise"``."""


class ConvergenceWarning(UserWarning):
    """A solve, forward or adjoint, did not converge and ``on_failure="warn"``."""


class Status(enum.IntEnum):
    """How the solve of one sample ended.

    Example:
        >>> import torch
        >>> torch.tensor([0, 1]) == Status.CONVERGED
        tensor([ True, False])
    """

    CONVERGED = 0
    MAX_STEPS = 1
    NONFINITE = 2
    DIVERGED = 3

    @property
    def sentence(self) -> str:
        """What happened, the likely cause, and what to try."""
        return _FORWARD[self]


_FORWARD = {
    Status.CONVERGED: "converged.",
    Status.MAX_STEPS: (
        "ran out of steps, or no step improved it further. Likely cause: the map contracts slowly, the step size is too small "
        "or so large that the iterates jump to and fro, the energy has no minimizer, or the tolerance lies below what the dtype "
        "can reach (about its rounding unit times the condition number). Try a better step size, Anderson, LBFGS, a larger "
        "max_steps, a looser tolerance or float64."
    ),
    Status.NONFINITE: (
        "met NaN or Inf. Likely cause: NaN in the context or x0, a step size that is too large, or an energy outside its "
        "domain (log or sqrt of a negative number). Look at these samples' inputs; try a smaller step size."
    ),
    Status.DIVERGED: (
        "diverged. Likely cause: the step size exceeds 2/L (L the largest curvature), the map does not contract, or the "
        "energy has no minimizer (unbounded below, or linear in x). Try a smaller step size, DampedStep, or add a term "
        "that grows in every direction of x, such as a ridge."
    ),
}
_ADJOINT = {
    Status.CONVERGED: "converged.",
    Status.MAX_STEPS: (
        "ran out of steps, so the gradient would be truncated. Likely cause: a singular or ill-conditioned problem (a flat "
        "direction at the solution), or a tolerance below what the dtype can reach. Try a ridge in x, "
        "ImplicitAdjoint(termination=Termination(rtol=..., max_steps=...)), another solver, or float64."
    ),
    Status.NONFINITE: (
        "met NaN or Inf. Likely cause: the loss's gradient is not finite at the solution, or the energy's second derivative "
        "is not (sqrt or norm at 0)."
    ),
    Status.DIVERGED: (
        "diverged. Likely cause: the Hessian at the solution is singular or indefinite (a saddle, a flat direction, an "
        "energy linear in x), or, for the backward fixed-point iteration, the map does not contract at the solution. Try a "
        "ridge in x, or another solver of the adjoint."
    ),
}


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a solve looked like from its start, turn by turn of the loop; a sample that rests repeats its row.

    T is at least the number of updates of the slowest sample, and more where one that had stopped too early went on later.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> trace = minimize(lambda x: (x - 3).square().sum(-1), torch.zeros(2, 1), trace=True).trace
        >>> trace.energy[0], trace.value.shape
        (tensor([9., 9.]), torch.Size([2, 2, 1]))

    Args:
        error: ``(T + 1, B)``, estimated distances to the answer as ``Solution.error``, by the last scale.
        value: the iterates, like ``x0`` with a leading T + 1.
        energy: ``(T + 1, B)``, of a minimization.
    """

    error: Tensor
    value: Any
    energy: Tensor | None = None


_tree.register_dataclass(Trace)


@dataclasses.dataclass(frozen=True)
class Solution:
    """The answer of a solve and how it went, sample by sample.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> solution = minimize(lambda x: (x - 3).square().sum(-1), torch.zeros(2, 1), step_size=0.5)
        >>> solution.value.flatten(), solution.converged.all()
        (tensor([3., 3.]), tensor(True))

    Args:
        value: like ``x0``; carries the gradients.
        status: ``(B,)`` int8, compare with `Status`.
        error: ``(B,)``, the estimated distance of ``value`` to the answer, as `Termination` compares it, in units of ``x``.
        num_steps: ``(B,)`` int32, updates until the sample stopped.
        trace: the steps, if they were asked for by ``trace=True``.
    """

    value: Any
    status: Tensor
    error: Tensor
    num_steps: Tensor
    trace: Trace | None = None

    @property
    def converged(self) -> Tensor:
        """``(B,)`` bool."""
        return self.status == Status.CONVERGED

    def raise_for_status(self) -> "Solution":
        """Return the solution if every sample converged.

        Raises:
            ConvergenceError: naming the samples that did not, the likely cause and what to try.
        """
        report(self.status, self.error, self.num_steps, "raise")
        return self

    def __repr__(self) -> str:
        value = _tree.map_structure(lambda t: f"Tensor{tuple(t.shape)}", self.value)
        if not readable(self.status):
            return f"Solution(value={value}, under vmap)"
        counts = {s.name: int((self.status == s).sum()) for s in Status}
        told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        return f"Solution(value={value}, status=({told}), steps≤{int(self.num_steps.amax()) if told else 0})"


_tree.register_dataclass(Solution)


def report(status: Tensor, error: Tensor, steps: Tensor, on_failure: OnFailure, adjoint: bool = False) -> None:
    """Raise, warn or keep silent about samples that did not converge. All tensors are ``(*batch)`` and readable."""
    if on_failure == "ignore" or bool((status == Status.CONVERGED).all()):
        return
    message = describe(status, error, steps, adjoint)
    if on_failure == "raise":
        raise ConvergenceError(message + ' (on_failure="warn" or "ignore" goes on without these samples.)')
    warnings.warn(message + " These samples add nothing to shared gradients; their own context gets NaN.",
                  ConvergenceWarning, stacklevel=2)  # fmt: skip


def describe(status: Tensor, error: Tensor, steps: Tensor, adjoint: bool) -> str:
    """Every failure in words: what happened, to which samples, the likely cause, what to try."""
    sentences = _ADJOINT if adjoint else _FORWARD
    measured = "residual" if adjoint else "error"
    parts = []
    for kind in (s for s in Status if s != Status.CONVERGED):
        failed = status == kind
        if bool(failed.any()):
            first = tuple(i[0] for i in torch.nonzero(failed, as_tuple=True)) if failed.ndim else ()
            parts.append(
                f"{kind.name}: {samples(failed)} {sentences[kind]} Seen: {measured} {float(error[first]):.3g} "
                f"after {int(steps[first])} step{'' if int(steps[first]) == 1 else 's'}."
            )
    return ("The adjoint solve (the gradient) failed. " if adjoint else "The solve failed. ") + " ".join(parts)


def samples(mask: Tensor) -> str:
    """The numbers of the samples in a mask ``(*batch)``, in words."""
    if mask.ndim == 0:
        return "the problem"
    where = [tuple(i) if len(i) > 1 else i[0] for i in torch.nonzero(mask).tolist()]
    named = ", ".join(map(str, where[:8])) + (", ..." if len(where) > 8 else "")
    if mask.numel() == 1:
        return "the only sample (number 0)"
    return f"{len(where)} of {mask.numel()} samples (number {named})"

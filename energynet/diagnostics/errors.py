"""How far a solution and its gradient are from the exact ones."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from energynet.engine.adjoint import ImplicitAdjoint
from energynet.engine.root_gradient import Adjoint, RootAdjoint
from energynet.solution import ConvergenceError, samples
from energynet.solve import fixed_point
from energynet.solvers import Solver
from energynet.termination import Termination, l2_norm

from .linearized import Linearized, StepLike

ANYWHERE = Termination(atol=1e30, rtol=0.0, max_steps=0)  # accepts any point as the solution


@dataclasses.dataclass(frozen=True)
class GradientError:
    """Estimates of the error of a loss gradient by its sources, with one tensor for each requested derivative.

    Example:
        >>> import torch
        >>> GradientError((torch.ones(2),), (torch.tensor([3.0, 0.0]),), (torch.tensor([0.0, 4.0]),)).bound
        tensor(10.)

    Args:
        gradient: the gradient that the given point and adjoint yield.
        forward: its error because x differs from x*; a tighter forward termination reduces it.
        adjoint: its error because the adjoint equation is solved inexactly, or approximated.
    """

    gradient: tuple[Tensor, ...]
    forward: tuple[Tensor, ...]
    adjoint: tuple[Tensor, ...]

    @property
    def bound(self) -> Tensor:
        """Twice the norm of the sum of both errors, under the assumptions of `solution_error`; 0-d."""
        return 2 * torch.stack([(f + a).norm() for f, a in zip(self.forward, self.adjoint, strict=True)]).norm()

    @property
    def relative(self) -> Tensor:
        """The bound divided by the norm of the gradient; 0-d."""
        return self.bound / torch.stack([g.norm() for g in self.gradient]).norm()


def solution_error(step: StepLike, x: Any, *context: Any, batch_dims: int = 1, solver: Solver | None = None) -> Tensor:
    """A bound on ‖x − x*‖ without knowing x*: twice the Newton step e = A⁻¹F(x).

    It lies between 1 and 2.5 times the error where h = ‖A⁻¹‖ K ‖e‖ ≤ ½ for a Lipschitz constant K of A = ∂F/∂x near x
    (Kantorovich); on a quadratic h = 0. A second Newton step with the same A estimates h as 2‖e₂‖/‖e‖ (Deuflhard). The
    effect of rounding on F is not included.

    Example:
        >>> import torch
        >>> from energynet import GradientStep
        >>> step = GradientStep(lambda x, z: (x - z).square().sum(-1))
        >>> solution_error(step, torch.tensor([[1.1]]), torch.ones(1, 1)).round(decimals=3)     # the error is 0.1
        tensor([0.2000])

    Args:
        step: an `Energy`, a map g, or a `Step`; any other energy as ``GradientStep(energy)``.
        x: the point to assess: ``(B, ...)``, a pytree of such, or a `Solution`.
        context: the step's other arguments.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem; an energy determines it itself.
        solver: solves the linear equation; default: `Picard` for maps; for energies, `Dense` with up to 50 unknowns per
            sample, which tolerates badly scaled variables, and conjugate gradients with more.

    Returns:
        ``(B,)``; infinite where there is no bound, because x is too far from x*, or because A is singular or, for an energy,
        indefinite.

    Source: Deuflhard (2004), Newton methods for nonlinear problems, sections 2.1 and 2.2.
    """
    at = Linearized.of(step, x, context, batch_dims)
    newton, failed = at.newton(at.x, solver)
    simplified, failed_again = at.newton(at.x - newton, solver)
    size = l2_norm(newton)
    # Below √ε of x, the second step consists of rounding errors, and the problem is numerically linear.
    near = size <= torch.finfo(size.dtype).eps ** 0.5 * l2_norm(at.x)
    sure = ~failed & (near | (~failed_again & (2 * l2_norm(simplified) <= 0.5 * size)))
    return torch.where(sure, 2 * size, torch.inf)


def gradient_error(
    loss: Callable[[Any], Tensor],
    step: StepLike,
    x: Any,
    *context: Any,
    wrt: Sequence[Tensor],
    adjoint: Adjoint | None = None,
    termination: Termination | None = None,
    batch_dims: int = 1,
) -> GradientError:
    """Estimate the error of d loss(x*)/d wrt that results from an inexact x* and an inexact adjoint.

    The gradient is compared with that of a tight adjoint at the same x. The latter is compared with the gradient at x − e, one
    Newton step further, whose error is of second order. The assumptions are those of `solution_error`.

    Example:
        >>> import torch
        >>> from energynet import GradientStep
        >>> z = torch.ones(1, 1, requires_grad=True)
        >>> step = GradientStep(lambda x, z: (x - z).square().sum(-1), 0.5)     # x* = z
        >>> gradient_error(lambda x: 0.5 * x.square().sum(), step, torch.tensor([[1.1]]), z, wrt=[z]).forward[0]
        tensor([[0.1000]])

    Args:
        loss: maps the solution to a scalar.
        step: an `Energy`, a map g, or a `Step`; any other energy as ``GradientStep(energy)``.
        x: the point that was used as the solution: ``(B, ...)``, a pytree of such, or a `Solution`.
        context: the step's other arguments.
        wrt: tensors that require grad, from the context or the step's parameters.
        adjoint: the adjoint whose gradients are assessed; default `ImplicitAdjoint`.
        termination: that of the forward solve, which is the adjoint's default; default `Termination`.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem; an energy determines it itself.

    Returns:
        `GradientError`, its tensors like ``wrt``.

    Raises:
        ConvergenceError: if the Newton step or an adjoint solve fails, with the reason.
        TypeError: if the adjoint differentiates the iterations, which are not available here.
        ValueError: if a tensor of ``wrt`` does not require grad.
    """
    adjoint = adjoint or ImplicitAdjoint()
    if not wrt or not all(t.requires_grad for t in wrt):
        shapes = [tuple(t.shape) for t in wrt if not t.requires_grad]
        seen = f"those of shapes {shapes} do not require grad" if wrt else "none was given"
        raise ValueError(
            f"wrt must contain the tensors whose gradient is assessed, but {seen}: pass parameters, or context after "
            "requires_grad_()."
        )
    if not isinstance(adjoint, RootAdjoint):
        raise TypeError(f"{adjoint!r} differentiates the iterations, but only their result x is known here.")
    if isinstance(adjoint, ImplicitAdjoint) and adjoint.termination is None:
        adjoint = dataclasses.replace(adjoint, termination=termination or Termination())
    at = Linearized.of(step, x, context, batch_dims)
    # Up to a hundred times tighter than the default, as far as the dtype allows.
    eps = torch.finfo(at.x.dtype).eps
    tight = Termination(rtol=max(0.01 * eps**0.5, 1000 * eps), max_steps=10_000)
    exact = ImplicitAdjoint(getattr(adjoint, "solver", None), tight)
    newton, failed = at.newton(at.x, exact.solver)
    if bool(failed.any()):
        raise ConvergenceError(f"No Newton step could be taken for {samples(failed)}: x is not a strict minimum of the energy, "
                               "or not an attracting fixed point of the map. Solve more tightly first.")  # fmt: skip
    given, solved = (_gradient(loss, at, at.x, context, wrt, a) for a in (adjoint, exact))
    corrected = _gradient(loss, at, at.x - newton, context, wrt, exact)
    return GradientError(given, _minus(solved, corrected), _minus(given, solved))


def _gradient(loss: Callable[[Any], Tensor], at: Linearized, x: Tensor, context: tuple[Any, ...], wrt: Sequence[Tensor],
              adjoint: Adjoint) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradient if x is accepted as the solution."""
    start = at.layout.unravel(x)
    with torch.enable_grad():
        taken = fixed_point(at.step, start, *context, batch_dims=at.layout.batch_dims, termination=ANYWHERE, adjoint=adjoint)
        gradients = torch.autograd.grad(loss(taken.value), wrt, allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(wrt, gradients))


def _minus(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(s - t for s, t in zip(a, b, strict=True))

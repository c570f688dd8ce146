"""The stopping criteria: all tolerances, norms and step limits of the package."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from energynet._torch.autodiff import readable
from energynet._torch.numbers import check_number, check_whole

Norm = Callable[[Tensor], Tensor]


def l2_norm(x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    """The Euclidean norm per sample."""
    return torch.linalg.vector_norm(x, dim=-1)


def max_norm(x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    """The largest magnitude per sample."""
    return x.abs().amax(-1) if x.shape[-1] else x.sum(-1)


REACHED = 4  # the smallest relative tolerance, in rounding units


@dataclasses.dataclass(frozen=True)
class Termination:
    """Tolerances and the step limit, applied to each sample.

    A sample has converged when the estimate of its distance from the solution is below ``atol + rtol·‖x‖``. The adjoint of a
    sample has converged when its residual is below ``rtol·‖v‖``, where v is the incoming gradient. The distance is estimated
    at the returned point, in the units of ``x``, from the optimality condition F:

    - for a map, ‖x − g(x)‖ / (1 − ρ), where one or two further evaluations of g give the contraction factor ρ;
    - for an energy, the length of a Newton step, ‖H⁻¹∇E‖: with up to ten unknowns from the whole Hessian; with more, by conjugate
      gradients, which continue until, given the smallest curvature that they find, little of the step can be missing, and then
      never too large. That takes a few products with the Hessian, or about √κ for a large condition number κ, as of diffusion. So
      the estimate depends neither on the scale of E nor on the step size. Curvatures and gradients below rounding errors count as
      zero, and a point with a direction of negative curvature is not a solution;
    - for any other condition, ‖F‖ divided by ‖A F‖ / ‖F‖, with A = ∂F/∂x.

    Example:
        >>> Termination(atol=0.0, rtol=1e-6, max_steps=50)
        Termination(atol=0.0, rtol=1e-06, max_steps=50, budget=None)

    Args:
        atol: the absolute tolerance, in units of ``x``; default: the larger of ‖x0‖ and ‖x‖, times ε^¾ of the dtype (float32
            6e-6, float64 2e-12), or of the least precise dtype in a pytree.
        rtol: the relative tolerance; default: √ε of the dtype (float32 3e-4, float64 1.5e-8).
        max_steps: the largest number of updates of a sample; a sample that needs more has failed.
        budget: an intended number of updates, in place of ``max_steps``. A sample that has not converged by then has not
            failed: its status is ``BUDGET``, its value is the last iterate, and its error is reported. It is differentiated as
            if it had converged, or, by `UnrolledAdjoint`, as an iterate. For an adjoint, the truncated gradient is accepted.
        products: an upper limit for the cost of the estimate for an energy of more than ten unknowns: so many products with the
            Hessian, and no search for negative curvature. With 0 the estimate uses a curvature found earlier. With few products
            it may be too small, so limit it in training, where time counts, and not at test.
        norm: a norm over the last dimension, ``(*batch, n) -> (*batch)``.
        rounding: ε, if the defaults should be those of another dtype than that of ``x``.

    A tolerance below the attainable accuracy of the dtype, a few ε of ‖x‖ or ‖v‖, is raised to it.

    Raises:
        ValueError: if a tolerance or the step limit is negative.
    """

    atol: float | None = None
    rtol: float | None = None
    max_steps: int = 1000
    budget: int | None = dataclasses.field(default=None, kw_only=True)
    products: int | None = dataclasses.field(default=None, kw_only=True, repr=False)
    norm: Norm = dataclasses.field(default=l2_norm, repr=False)
    rounding: float | None = dataclasses.field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("atol", "rtol"):
            check_number(self, name, "≥ 0 that is finite", lambda v: 0 <= v < float("inf"), optional=True)
        check_whole(self, "max_steps", least=0)
        for name in ("budget", "products"):
            check_whole(self, name, least=0, optional=True)
        check_number(self, "rounding", "in (0, 1)", lambda v: 0 < v < 1, optional=True)
        if not callable(self.norm):
            raise TypeError(f"Termination needs a function as its norm, such as max_norm, got {self.norm!r}.")

    @property
    def limit(self) -> int:
        """The number of updates after which a sample stops."""
        return self.max_steps if self.budget is None else self.budget

    def size(self, x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
        """The norm per sample, in float32 or better."""
        return self.norm(x if x.dtype == torch.float64 else x.float())

    def sure_size(self, x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
        """The norm without underflow or overflow of squares, as they occur for gradients of 10⁻²⁵ in float32."""
        size = self.size(x)
        bounds = torch.finfo(size.dtype)
        lost = ~((size > (bounds.tiny / bounds.eps) ** 0.5) & (size < torch.inf))
        if readable(lost) and lost.device.type == "cpu" and not bool(lost.any()):
            return size
        largest = max_norm(x).to(size.dtype)
        unit = torch.where(lost & (largest > 0) & torch.isfinite(largest), largest, 1)
        return torch.where(unit == 1, size, self.size(x / unit.to(x.dtype).unsqueeze(-1)) * unit)

    def tolerance(self, x: Tensor, unit: Tensor | float = 0.0) -> Tensor:  # (*batch, n), (*batch) -> (*batch)
        """``atol + rtol·‖x‖`` per sample, but at least the attainable accuracy of the dtype.

        Args:
            x: ``(*batch, n)``.
            unit: ‖x0‖, ``(*batch)``, the scale of x for the default of ``atol`` where ‖x‖ is smaller.
        """
        eps, size = torch.finfo(x.dtype).eps, self.size(x)
        atol = (self.rounding or eps) ** 0.75 * torch.clamp(size, min=unit) if self.atol is None else self.atol
        return atol + self.relative(eps) * size

    def at_precision(self, eps: float) -> "Termination":
        """The same criteria, with the defaults for a dtype with the rounding unit ``eps``."""
        return dataclasses.replace(self, rounding=self.rounding or eps)

    def relative(self, eps: float) -> float:
        """The relative tolerance for a dtype with the rounding unit ``eps``."""
        return max(REACHED * eps, (self.rounding or eps) ** 0.5 if self.rtol is None else self.rtol)

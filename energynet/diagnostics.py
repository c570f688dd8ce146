"""Measures the conditioning of a problem and its solution: contraction, curvature, errors; and describes a solve in words.

Everything is measured per sample through products with A = ∂F/∂x, where F is the optimality condition of a step g(x) =
x − γ F(x); a matrix is formed only for a few unknowns.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from energynet._torch.autodiff import linearize, readable, recording
from energynet._torch.tree import Layout
from energynet.energy import Energy, EnergyLike
from energynet.engine.adjoint import ImplicitAdjoint
from energynet.engine.binding import Binding
from energynet.engine.loop import loop
from energynet.engine.root_gradient import Adjoint, RootAdjoint
from energynet.engine.validation import check_start, examine
from energynet.linear import ConjugateGradient, Dense
from energynet.solution import ConvergenceError, Solution, Status, describe, samples
from energynet.solve import fixed_point
from energynet.solvers import Picard, Solver
from energynet.solvers.problem import Linear
from energynet.solvers.spectrum import arnoldi, normalized, ritz_values, some_direction
from energynet.step import GradientStep, Kind, Step, as_step, per_sample
from energynet.termination import Termination, l2_norm

StepLike = Step | Energy | Callable[..., Any]
"""A step, an `Energy` (taken as its gradient step), or a map g(x, \\*context). Wrap another energy in `GradientStep`."""


@dataclasses.dataclass(frozen=True)
class Curvature:
    """The extreme eigenvalues of a Hessian, and the step sizes of gradient descent that they imply, per sample.

    Example:
        >>> import torch
        >>> seen = Curvature(smallest=torch.tensor([1.0]), largest=torch.tensor([3.0]))
        >>> seen.best_step_size, seen.best_contraction
        (tensor([0.5000]), tensor([0.5000]))

    Args:
        smallest: μ, ``(B,)``; it is not positive where the energy is flat or not convex.
        largest: L, ``(B,)``.

    Source: Nesterov (2004), Introductory lectures on convex optimization, theorem 2.1.15.
    """

    smallest: Tensor
    largest: Tensor

    @property
    def condition(self) -> Tensor:
        """L/μ, ``(B,)``; infinite where the energy is not strongly convex."""
        return torch.where(self.smallest > 0, self.largest / self.smallest, torch.inf)

    @property
    def safe_step_size(self) -> Tensor:
        """1/L, ``(B,)``: with this step size the energy never rises."""
        return torch.where(self.largest > 0, 1 / self.largest, torch.inf)

    @property
    def step_size_limit(self) -> Tensor:
        """2/L, ``(B,)``: larger steps diverge."""
        return 2 * self.safe_step_size

    @property
    def best_step_size(self) -> Tensor:
        """2/(L + μ), ``(B,)``: the fastest constant step size; 1/L where the energy is not strongly convex."""
        return torch.where(self.smallest > 0, 2 / (self.largest + self.smallest), self.safe_step_size)

    @property
    def best_contraction(self) -> Tensor:
        """(L − μ)/(L + μ), ``(B,)``: the contraction factor of the best step size; infinite where no step size contracts."""
        ratio = (self.largest - self.smallest) / (self.largest + self.smallest)
        return torch.where(self.smallest > 0, ratio, torch.inf)


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


def contraction_factor(step: StepLike, x: Any, *context: Any, batch_dims: int = 1, products: int = 40) -> Tensor:
    """The spectral radius of ∂g/∂x: the asymptotic factor by which an iteration reduces a small error; it converges below 1.

    Example:
        >>> import torch
        >>> turn = torch.tensor([[0.0, -0.5], [0.5, 0.0]])     # eigenvalues ±0.5i
        >>> contraction_factor(lambda x, z: x @ turn.mT + z, torch.zeros(3, 2), torch.ones(3, 2))
        tensor([0.5000, 0.5000, 0.5000])

    Args:
        step: g, or a `Step`; an energy as ``GradientStep(energy, step_size)``.
        x: the point, usually x*: ``(B, ...)``, a pytree of such, or a `Solution`.
        context: the step's other arguments.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem; an energy determines it itself.
        products: the largest number of Jacobian products. With n or more, the result is exact; with fewer, it is a good
            estimate of the outermost eigenvalues.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: if the step has no step size, or does not return the shapes of x.

    Source: Lanczos (1950) for energies, Arnoldi (1951) for maps.
    """
    at = Linearized.of(step, x, context, batch_dims)
    start = some_direction(torch.zeros_like(at.x))
    if at.step.symmetric:
        return (1 - at.gamma * ritz_values(at.product, start, products)).abs().amax(-1)
    return arnoldi(lambda p: p - at.gamma * at.product(p), start, products).abs().amax(-1)


def curvature(energy: EnergyLike, x: Any, *context: Any, products: int = 40) -> Curvature:
    """The smallest and the largest curvature of an energy at a point, and the step sizes that they imply.

    Example:
        >>> import torch
        >>> curvature(lambda x: (torch.tensor([1.0, 4.0]) * x.square()).sum(-1), torch.ones(1, 2)).step_size_limit
        tensor([0.2500])

    Args:
        energy: E(x, \\*context) -> ``(B,)``.
        x: the point, usually x*: ``(B, ...)``, a pytree of such, or a `Solution`.
        context: the energy's other arguments.
        products: the largest number of Hessian products. With n or more, the result is exact; with fewer, L is slightly
            underestimated and μ overestimated.

    Returns:
        `Curvature`, each ``(B,)``.

    Source: Lanczos (1950).
    """
    at = Linearized.of(GradientStep(energy), x, context, 1)
    values = ritz_values(at.product, some_direction(torch.zeros_like(at.x)), products)
    return Curvature(values.amin(-1), values.amax(-1))


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


def explain(solution: Solution) -> str:
    """Describe a solve in words: the number of converged samples, the slowest one, the estimated errors, and the failures.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> print(explain(minimize(lambda x: (x - 3).square().sum(-1), torch.zeros(2, 1), step_size=0.5)))
        2 of 2 samples converged. The slowest, sample 0, took 1 step. Estimated errors lie between ..., in units of x.

    Args:
        solution: the result of `minimize`, `fixed_point` or a layer's ``solve``.

    Raises:
        ValueError: under vmap, where values cannot be read.
    """
    status, steps, error = solution.status, solution.num_steps, solution.error
    if not readable(status):
        raise ValueError("Under vmap a solution's values cannot be read. Call explain on the solution that vmap returns instead.")
    if not status.numel():
        return "There are no samples."
    most, finite = int(steps.amax()), error[torch.isfinite(error)]
    count = f"{int(solution.converged.sum())} of {status.numel()} samples" if status.ndim else "The problem"
    parts = [f"{count} {'converged' if status.ndim or solution.converged else 'did not converge'}."]
    slowest = f"The slowest, {_first(steps == most)}," if status.ndim else "It"
    parts.append(f"{slowest} took {most} step{'' if most == 1 else 's'}.")
    if len(finite):
        parts.append(f"Estimated errors lie between {float(finite.amin()):.3g} and {float(finite.amax()):.3g}, in units of x.")
    if not solution.converged.all():
        parts.append(describe(status, error, steps))
    return " ".join(parts)


def _first(mask: Tensor) -> str:
    index = torch.nonzero(mask)[0].tolist()
    return f"sample {index[0] if len(index) == 1 else tuple(index)}"


def laplace(energy: EnergyLike, x: Any, *context: Any, noise: float | Tensor = 1.0, spacing: int = 4,
            solver: Solver | None = None) -> Tensor:  # fmt: skip
    """Standard deviations of a minimizer by Laplace's approximation, which treats exp(−E/noise²) as a density.

    They are noise · √diag(H⁻¹), where H is the Hessian at x. With up to 50 unknowns, each column of H⁻¹ is computed. With more,
    one solve handles many unknowns that are far apart, namely those on a grid with the given spacing. Random signs make their
    correlations cancel on average. An image takes spacing² solves, and the error comes from correlations beyond the spacing.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> energy = lambda x, a: 0.5 * (a * x.square()).sum(-1)
        >>> a = torch.tensor([1.0, 4.0])
        >>> laplace(energy, minimize(energy, torch.ones(1, 2), a), a)
        tensor([[1.0000, 0.5000]])

    Args:
        energy: E(x, \\*context) -> ``(B,)``.
        x: the minimizer, a `Solution` or a tensor ``(B, ...)``; its last two dimensions, or its last, are the grid.
        context: the energy's other arguments.
        noise: the standard deviation that scales the density, a number or one per sample ``(B,)``: σ if E contains ½‖x − y‖².
        spacing: the spacing of the grid.
        solver: solves the linear equations; default `ConjugateGradient`, or the whole Hessian with few unknowns.

    Returns:
        Like x; NaN in samples whose equation could not be solved, or whose Hessian is not positive definite.

    Raises:
        TypeError: if x is not one tensor.
        ValueError: if the spacing is not positive.

    Source: MacKay (1992), A practical Bayesian framework for backpropagation networks; Tang and Saad (2012), A probing method
        for computing the diagonal of a matrix inverse.
    """
    value = x.value if isinstance(x, Solution) else x
    if not isinstance(value, Tensor):
        raise TypeError(f"laplace needs x to be one tensor, got {type(value).__name__}. Stack its parts into one.")
    if spacing < 1:
        raise ValueError(f"spacing must be at least 1, got {spacing}.")
    at = Linearized.of(GradientStep(energy), value, context, 1)
    colors = torch.arange(at.x.shape[-1], device=at.x.device) if at.x.shape[-1] <= FEW else _colors(value[0], spacing)
    signs = torch.randint(2, colors.shape, generator=torch.Generator().manual_seed(0)).to(at.x) * 2 - 1
    diagonal = torch.zeros_like(at.x)
    for color in range(int(colors.amax()) + 1):
        probe = torch.where(colors == color, signs, 0).expand_as(at.x)
        column, failed = at.solve(probe, solver, Termination(rtol=1e-3, max_steps=10_000))
        diagonal += torch.where(failed.unsqueeze(-1), torch.nan, probe * column)
    scale = noise.reshape(-1, 1) if isinstance(noise, Tensor) else noise
    return (scale * diagonal.sqrt()).reshape(value.shape)


def _colors(sample: Tensor, spacing: int) -> Tensor:  # -> (n,)
    """A coloring of the grid points, in which points of the same color are far apart."""
    places = [torch.arange(size, device=sample.device) % spacing for size in sample.shape[-2:]]
    grid = places[0] if len(places) == 1 else places[0][:, None] * spacing + places[1]
    return grid.expand(sample.shape).flatten()


@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """The optimality condition F of a step, and A = ∂F/∂x at one point, on flat tensors."""

    step: Step  # the caller's
    layout: Layout
    x: Tensor  # (*batch, n)
    residual: Callable[[Tensor], Tensor]  # F
    product: Callable[[Tensor], Tensor]  # p -> A p

    @classmethod
    def of(cls, step: StepLike, x: Any, context: tuple[Any, ...], batch_dims: int) -> "Linearized":
        x = x.value if isinstance(x, Solution) else x
        step = GradientStep(step) if isinstance(step, Energy) else as_step(step)
        check_start(x)
        with recording((x, context)) as (x, context), torch.no_grad():
            binding = Binding.of(step)
            code = binding.step.encode(*context)
            layout = Layout.of(x, examine(binding, x, code, None if step.energy_of is not None else batch_dims).batch_dims)
            flat = layout.ravel(x).clone()

            def residual(x: Tensor) -> Tensor:
                return layout.ravel(binding.step.optimality(layout.unravel(x), *code)).to(x.dtype)

            return cls(step, layout, flat, residual, linearize(residual, flat, transposed=step.symmetric))

    @property
    def gamma(self) -> float | Tensor:
        """The step size γ of x − γ F(x), a float, 0-d or ``(B, 1)``."""
        gamma = per_sample(self.step.step_size, self.x.ndim)
        return gamma.detach() if isinstance(gamma, Tensor) else gamma

    @property
    def _default_solver(self) -> Solver:
        """The whole Hessian for few unknowns, since conjugate gradients stop early where variables are badly scaled."""
        if not self.step.symmetric:
            return Picard()
        return Dense() if self.x.shape[-1] <= FEW else ConjugateGradient()

    def newton(self, x: Tensor, solver: Solver | None) -> tuple[Tensor, Tensor]:
        """A⁻¹F(x), with A at this point, and the samples for which it failed, ``(*batch)``."""
        with recording(x) as x, torch.no_grad():
            return self.solve(self.residual(x), solver, Termination(max_steps=10_000))

    def solve(self, right: Tensor, solver: Solver | None, termination: Termination) -> tuple[Tensor, Tensor]:
        """A⁻¹ right, and the samples for which it failed, ``(*batch)``."""
        solver = solver or self._default_solver
        solver.check(Kind.SYMMETRIC if self.step.symmetric else Kind.LINEAR)
        with torch.no_grad():
            v = normalized(right)  # the squares of a tiny F would underflow
            gamma = None if self.step.step_size is None else self.gamma
            problem = Linear(
                lambda u: self.product(u) - v, lambda _: self.product, batch_dims=self.layout.batch_dims, step_size=gamma,
                right=v, start=v, symmetric=self.step.symmetric,
            )  # fmt: skip
            state = loop(problem, solver, termination, torch.zeros_like(v))
            return state.x * l2_norm(right).to(v.dtype).unsqueeze(-1), state.status != Status.CONVERGED


FEW = 50  # the number of unknowns up to which the whole Hessian is formed for the sake of accuracy
ANYWHERE = Termination(atol=1e30, rtol=0.0, max_steps=0)  # accepts any point as the solution


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

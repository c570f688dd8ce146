"""`check_step` tests whether the solvers can iterate a map and differentiate its fixed point."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import linearize
from energynet.solve import fixed_point
from energynet.step import Step, as_step, per_sample
from energynet.termination import Termination
from energynet.testing.measure import (
    CheckError,
    Product,
    Report,
    copied,
    dominant,
    largest,
    own_random_numbers,
    spectral_radius,
    unit,
)
from energynet.testing.subject import Subject, check_repeatable, check_samples, check_smooth, refuse


@dataclasses.dataclass(frozen=True, repr=False)
class StepReport(Report):
    """The measurements of `check_step`, in float64.

    Args:
        samples: B, or 0 for one problem without a batch dimension.
        batch_leak: the largest relative change of a value when the other samples change; None if there is only one sample.
        derivative_error: the relative error of the derivatives of F with respect to x, the context and the parameters.
        asymmetry: the largest ``|⟨u, Jv⟩ − ⟨Ju, v⟩|`` for unit vectors, relative to J = ∂F/∂x.
        norm: the largest singular value of ∂g/∂x at x over all samples; below 1 the map contracts there; None without a
            step size.
        rate: the spectral radius of ∂g/∂x at x; if it is below 1 at the fixed point, `Picard` converges locally; None without
            a step size.
    """

    samples: int
    batch_leak: float | None
    derivative_error: float
    asymmetry: float
    norm: float | None
    rate: float | None


def check_step(step: Step | Callable[..., Any], x: Any, *context: Any, batch_dims: int = 1) -> StepReport:
    """Check that g(x, \\*context) is a map that can be iterated to a fixed point.

    =================================================================  ===============================================
    check                                                              content of the error message
    =================================================================  ===============================================
    structure, shapes and dtype are those of x                         both
    no tensor with a derivative in a closure                           its shape and the operation that used it
    no BatchNorm in training mode, dropout or random numbers           the operation
    x and context unchanged, values finite                             the changed tensor, the samples
    two evaluations are equal                                          the difference
    a sample does not depend on the other samples                      the samples, the change and its cause
    ``step(x)`` is x − step_size · ``optimality(x)``, so F is zero at  the difference
    fixed points and nowhere else
    derivatives of F in x, context and parameters                      both numbers, and the tensor
    F depends on x (for g(x) = x, every point is a fixed point)        that it does not
    a step that declares ∂F/∂x to be symmetric has such a ∂F/∂x        the asymmetry
    =================================================================  ===============================================

    Whether g contracts is reported and is not a failure: x is not the fixed point, and `Anderson` and `DampedStep` solve
    maps that do not contract.

    Example:
        >>> import torch
        >>> report = check_step(lambda x, z: 0.5 * x + z, torch.zeros(3, 2), torch.ones(3, 2))
        >>> round(report.norm, 6), round(report.rate, 6)
        (0.5, 0.5)
        >>> check_step(lambda x: x[:, :1], torch.zeros(3, 2))
        Traceback (most recent call last):
        ...
        energynet.testing.measure.CheckError: The map <lambda> must return the structure and shapes of x, ...

    Args:
        step: a `Step`, or a function or network g(x, \\*context) -> like x.
        x: a point, a tensor ``(B, ...)`` or a pytree of such; choose B ≥ 3, different from the sizes of other dimensions.
        context: the step's other arguments.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem.

    Returns:
        `StepReport`, with estimates of the contraction of g.

    Raises:
        CheckError: at the first check that fails.
    """
    step = as_step(step)
    with own_random_numbers():
        nothing = Termination(max_steps=0)
        here, there = copied(x), copied(context)
        refuse(lambda: fixed_point(step, here, *there, batch_dims=batch_dims, termination=nothing, on_failure="ignore"))
        mine = Subject.of(step, x, context, batch_dims)
        refuse(lambda: _check_dtype(mine))
        check_repeatable(mine)
        subject = Subject.of(step, x, context, batch_dims, torch.float64)
        leak = check_samples(subject)
        if step.step_size is not None:
            _check_optimality(subject)
        error = check_smooth(subject)
        asymmetry, norm, rate = _check_jacobian(subject)
        return StepReport(subject.batch, leak, error, asymmetry, norm, rate)


def _check_dtype(subject: Subject) -> None:
    step, code = subject.step, subject.code()
    # A condition F(x) = 0, or a gradient step of unknown size, is not a map, so F itself is checked.
    moved = step.optimality(subject.x, *code) if step.step_size is None else step(subject.x, *subject.context)
    for t, s in zip(_tree.leaves(subject.x), _tree.leaves(moved), strict=True):
        if t.dtype != s.dtype:
            raise CheckError(
                f"g(x) is {s.dtype} for x of {t.dtype}; each step would be rounded to x's. Likely cause: parameters or a "
                "constant of another dtype. Convert the network, or x0, so that both are the same."
            )


def _check_optimality(subject: Subject) -> None:
    """Check that g(x) = x − γ F(x), so that the iteration and the derivative belong to the same equation."""
    step, layout, flat = subject.step, subject.layout, subject.layout.ravel(subject.x)
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the numbers that `Subject.code` draws
        moved = layout.ravel(step(subject.x, *subject.context))
    expected = flat - per_sample(step.step_size, flat.ndim) * subject.optimality(subject.code())(flat)
    change = largest(moved - expected)
    if not change <= 1e-10 * (1 + largest(moved)):
        raise CheckError(
            f"step(x) and x − step_size · optimality(x) differ by {change:.2g}. Likely cause: a Step that overrides __call__ or "
            "step_size. The solver would find a point at which optimality is not zero, and differentiate the wrong equation; "
            "define only optimality and step_size."
        )


def _check_jacobian(subject: Subject) -> tuple[float, float | None, float | None]:
    """The asymmetry of ∂F/∂x, and the norm and spectral radius of ∂g/∂x if there is a map g."""
    step, flat = subject.step, subject.layout.ravel(subject.x)
    function = subject.optimality(subject.code())
    product, transposed = linearize(function, flat, transposed=False), linearize(function, flat, transposed=True)
    u, v = unit(torch.randn_like(flat)), unit(torch.randn_like(flat))
    size = torch.linalg.vector_norm(product(v), dim=-1)
    if bool((size <= 1e-14).all()):
        raise CheckError(
            "x − g(x) does not depend on x: every point is a fixed point, or none. Likely cause: g(x) = x + constant, or an "
            "energy linear in x. Add a term to g that makes it contract in x."
        )
    gap = ((u * product(v)).sum(-1) - (product(u) * v).sum(-1)).abs()
    asymmetry = largest(gap / torch.where(size > 0, size, 1))
    if step.symmetric and not asymmetry <= 1e-8:
        raise CheckError(
            f"The step claims a symmetric ∂F/∂x, but ⟨u, Jv⟩ and ⟨Ju, v⟩ differ by {asymmetry:.2g} of its size: conjugate "
            "gradients would give wrong gradients. Set symmetric = False, or correct the gradient."
        )
    if step.step_size is None:
        return asymmetry, None, None
    move, back = _of_map(product, step, flat), _of_map(transposed, step, flat)
    norm = dominant(lambda v: back(move(v)), flat).clamp(min=0).sqrt()
    return asymmetry, float(norm.max()), float(spectral_radius(move, flat).max())


def _of_map(product: Product, step: Step, flat: Tensor) -> Product:
    """The Jacobian of g(x) = x − γ F(x), or its transpose, given that of F."""
    step_size = per_sample(step.step_size, flat.ndim)
    return lambda v: v - step_size * product(v)

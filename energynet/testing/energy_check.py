"""`check_energy` tests whether the solvers can minimize a function and differentiate its minimizer."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from energynet._torch.autodiff import linearize
from energynet.energy import EnergyLike
from energynet.solve import minimize
from energynet.step import GradientStep
from energynet.termination import Termination
from energynet.testing.measure import (
    CheckError,
    Report,
    check_derivatives,
    copied,
    extreme_eigenvalues,
    largest,
    own_random_numbers,
    unit,
)
from energynet.testing.subject import Subject, check_repeatable, check_samples, check_smooth, refuse


@dataclasses.dataclass(frozen=True, repr=False)
class EnergyReport(Report):
    """The measurements of `check_energy`, in float64.

    Args:
        samples: B, or 0 for one problem without a batch dimension.
        batch_leak: the largest relative change of a value when the other samples change; None if there is only one sample.
        gradient_error: the relative error of ∇E compared with central differences.
        second_derivative_error: the relative error of the derivatives of ∇E with respect to x, the context and the parameters.
        asymmetry: the largest ``|⟨u, Hv⟩ − ⟨Hu, v⟩|`` for unit vectors, relative to H.
        curvature: estimates of the smallest and largest eigenvalue of the Hessian at x, over all samples.
        step_size: 2/(μ + L) for that curvature, an initial estimate of γ; None if E is not strictly convex at x.
    """

    samples: int
    batch_leak: float | None
    gradient_error: float
    second_derivative_error: float
    asymmetry: float
    curvature: tuple[float, float]
    step_size: float | None


def check_energy(energy: EnergyLike, x: Any, *context: Any) -> EnergyReport:
    """Check that E(x, \\*context) has the properties that every solver and adjoint requires.

    ==============================================================  ==================================================
    check                                                           content of the error message
    ==============================================================  ==================================================
    one floating-point scalar per sample, ``(B,)`` or 0-d           the returned shape or dtype
    no tensor with a derivative in a closure                        its shape and the operation that used it
    no BatchNorm in training mode, dropout or random numbers        the operation
    x and context unchanged, values finite                          the changed tensor, the samples
    two evaluations are equal                                       the difference
    a sample does not depend on the other samples                   the samples, the change and its cause
    ∇E agrees with central differences                              both numbers
    derivatives of ∇E in x, context and parameters                  both numbers, and the tensor
    curvature in x (an energy linear in x has no minimizer)         the samples without curvature
    the Hessian exists and agrees with differences of ∇E            the likely cause, such as a backward in NumPy
    the Hessian is symmetric                                        the asymmetry
    `Energy.evaluate` after `Energy.encode` is `Energy.forward`     the difference
    ==============================================================  ==================================================

    Derivatives are measured on a float64 copy; no object of the caller is changed, including the random generators.

    Example:
        >>> import torch
        >>> report = check_energy(lambda x, z: (x - z).square().sum(-1), torch.zeros(3, 2), torch.ones(3, 2))
        >>> [round(c, 6) for c in report.curvature]
        [2.0, 2.0]
        >>> check_energy(lambda x: x.sum(-1), torch.zeros(3, 2))
        Traceback (most recent call last):
        ...
        energynet.testing.measure.CheckError: E has no curvature in x for sample 0, 1, 2: ...

    Args:
        energy: E(x, \\*context) -> ``(B,)``.
        x: a point, a tensor ``(B, ...)`` or a pytree of such; choose B ≥ 3, different from the sizes of other dimensions.
        context: the energy's other arguments.

    Returns:
        `EnergyReport`, with an estimate of the curvature and an initial estimate of the step size.

    Raises:
        CheckError: at the first check that fails.
    """
    with own_random_numbers():
        nothing = Termination(max_steps=0)
        here, there = copied(x), copied(context)
        refuse(lambda: minimize(energy, here, *there, step_size=1.0, termination=nothing, on_failure="ignore"))
        step = GradientStep(energy, 1.0)
        batch_dims = int(Subject.of(step, x, context, 0).step.probe(copied(x), *step.encode(*copied(context))).ndim)
        check_repeatable(Subject.of(step, x, context, batch_dims))
        subject = Subject.of(step, x, context, batch_dims, torch.float64)
        leak = check_samples(subject)
        _check_forward(subject)
        slope_error = _check_gradient(subject)
        asymmetry, curvature = _check_hessian(subject)
        convex = curvature[0] > 1e-9 * curvature[1]
        return EnergyReport(
            subject.batch, leak, slope_error, check_smooth(subject), asymmetry, curvature,
            2 / (curvature[0] + curvature[1]) if convex else None,
        )  # fmt: skip


def _check_forward(subject: Subject) -> None:
    """Check that a subclass has not overridden `Energy.forward`, because the solvers call `evaluate`."""
    step = subject.step
    assert step.energy_of is not None
    value = subject.value(subject.x, subject.code())
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the numbers that `Subject.code` draws
        direct = subject.flat(step.energy_of(subject.x, *subject.context))
    change = largest(direct - value)
    if not change <= 1e-9 * largest(value):
        raise CheckError(
            f"energy(x, *context) and evaluate(x, *encode(*context)) differ by {change:.2g}. Likely cause: forward is "
            "overridden. The solvers call encode once and evaluate at each step; do not override forward."
        )


def _check_gradient(subject: Subject) -> float:
    code, layout = subject.code(), subject.layout
    weights = 1 + torch.rand_like(subject.value(subject.x, code))  # a wrong gradient must not cancel over the batch

    def total(values: list[Tensor]) -> Tensor:
        return (weights * subject.value(layout.unravel(values[0]), code)).sum()

    return check_derivatives(total, {"x": layout.ravel(subject.x)}, 1e-6, 1e-14, "The derivative of E")


def _check_hessian(subject: Subject) -> tuple[float, tuple[float, float]]:
    """The asymmetry and the extreme eigenvalues of the Hessian."""
    function, flat = subject.optimality(subject.code()), subject.layout.ravel(subject.x)
    product = linearize(function, flat, transposed=True)
    u, v = unit(torch.randn_like(flat)), unit(torch.randn_like(flat))
    flatness = _size(product(u))
    for _ in range(2):  # the Hessian of a quartic vanishes at its minimum, so it is checked at other points as well
        elsewhere = flat + torch.randn_like(flat) * (1 + flat.abs())
        flatness = torch.maximum(flatness, _size(linearize(function, elsewhere, transposed=True)(u)))
    without = flatness <= 1e-12 * _size(function(flat))
    if bool(without.any()):
        where = ", ".join(map(str, torch.nonzero(without).flatten().tolist()[:8])) if without.ndim else "(the problem)"
        raise CheckError(
            f"E has no curvature in x for sample {where}: its Hessian is zero at x and nearby. Likely cause: E is linear in x "
            "(or piecewise linear, as a ReLU network is), or does not depend on x, so it has no isolated minimizer. Add a term "
            "that grows in every direction of x, such as a ridge 0.5 * x.square().sum(-1)."
        )
    gap = ((u * product(v)).sum(-1) - (product(u) * v).sum(-1)).abs()
    size = torch.maximum(_size(product(u)), _size(product(v)))
    asymmetry = largest(gap / torch.where(size > 0, size, 1))
    if not asymmetry <= 1e-8:
        raise CheckError(
            f"The Hessian of E is not symmetric: ⟨u, Hv⟩ and ⟨Hu, v⟩ differ by {asymmetry:.2g} of its size. Likely cause: a "
            "custom autograd.Function whose backward is not its derivative. Correct it, or pass the map itself to FPI_NN."
        )
    low, high = extreme_eigenvalues(product, flat)
    return asymmetry, (float(low.min()), float(high.max()))


def _size(x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    size: Tensor = torch.linalg.vector_norm(x.detach(), dim=-1)
    return size

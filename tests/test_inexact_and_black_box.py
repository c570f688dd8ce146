"""Adjoints that are not exact and say so; black boxes that become differentiable."""

import pytest
import scipy.optimize
import torch
from problems import TIGHT, LogCosh, some_context
from torch import Tensor

from energynet import (
    LBFGS,
    Adjoint,
    Backtracking,
    BarzilaiBorwein,
    ConvergenceError,
    GradientDescent,
    ImplicitAdjoint,
    Nesterov,
    NeumannAdjoint,
    Newton,
    NewtonCG,
    OneStepAdjoint,
    Picard,
    Solver,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    gradient,
    implicit,
    minimize,
)
from energynet.solvers import FixedStep

LAST = [UnrolledAdjoint(last=300), UnrolledAdjoint(last=300, checkpoint=True), NeumannAdjoint(300), NeumannAdjoint(900, 0.5)]


ENERGY = LogCosh().requires_grad_(False)


def loss(z: Tensor, adjoint: Adjoint | None = None) -> Tensor:
    x = minimize(ENERGY, None, z, step_size=ENERGY.step_size, solver=Picard(), termination=TIGHT, adjoint=adjoint).value
    return x.sin().sum()


@pytest.mark.parametrize("adjoint", LAST, ids=repr)
def test_many_terms_are_exact_to_first_order_and_refuse_the_second(adjoint: Adjoint) -> None:
    z = some_context(requires_grad=True)
    (exact,) = torch.autograd.grad(loss(z), z)
    (found,) = torch.autograd.grad(loss(z, adjoint), z, create_graph=True)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
    with pytest.raises(RuntimeError, match="first-order approximation"):
        torch.autograd.grad(found.square().sum(), z)


@pytest.mark.parametrize("adjoint", [NeumannAdjoint(5), OneStepAdjoint(), UnrolledAdjoint(last=5)], ids=repr)
def test_inexact_adjoints_refuse_second_derivatives_under_torch_func(adjoint: Adjoint) -> None:
    z, func = some_context(), torch.func
    assert func.grad(loss)(z, adjoint).shape == z.shape
    for outer in (func.jacrev, func.jacfwd):
        for inner in (func.jacrev, func.jacfwd):
            with pytest.raises(RuntimeError, match="first-order approximation"):
                outer(inner(loss))(z, adjoint)


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_the_truncated_series(terms: int) -> None:
    z = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    x = fixed_point(lambda x, z: 0.5 * x + z, torch.zeros(1, 1, dtype=torch.float64), z, adjoint=NeumannAdjoint(terms)).value
    assert torch.autograd.grad(x.sum(), z)[0].item() == pytest.approx(2 - 0.5 ** (terms - 1))


def test_checkpoints_change_no_derivative() -> None:
    z = some_context(requires_grad=True)
    for order in (1, 2):
        found = []
        for adjoint in (UnrolledAdjoint(), UnrolledAdjoint(checkpoint=True)):
            (g,) = torch.autograd.grad(loss(z, adjoint), z, create_graph=True)
            found.append(g if order == 1 else torch.autograd.grad(g.square().sum(), z)[0])
        torch.testing.assert_close(*found, rtol=0, atol=1e-13)
    with pytest.raises(RuntimeError, match="checkpoint=False"):
        torch.func.grad(loss)(z.detach(), UnrolledAdjoint(checkpoint=True))


@pytest.mark.parametrize("solver", [Newton(), NewtonCG()], ids=repr)
def test_a_solver_that_cannot_be_unrolled_is_refused(solver: Solver) -> None:
    with pytest.raises(TypeError, match=f"cannot differentiate the updates of {type(solver).__name__}: "):
        minimize(ENERGY, None, some_context(), solver=solver, adjoint=UnrolledAdjoint())


UNROLLED = [LBFGS(memory=2), LBFGS(memory=2, search=Backtracking()), GradientDescent(), GradientDescent(BarzilaiBorwein()),
            GradientDescent(FixedStep()), Nesterov(), Picard()]  # fmt: skip


@pytest.mark.parametrize("solver", UNROLLED, ids=repr)
def test_a_converged_unrolling_has_the_derivatives_of_the_minimum(solver: Solver) -> None:
    """One sample arrives at its minimum, where the slope is exactly zero, while the others still run.

    The second derivatives arrive later than the answer.
    """
    z = torch.tensor([[1.0, 1.0], [0.3, -1.5], [2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 30.0], dtype=torch.float64)
    energy = lambda x, z: ((x - z).cosh() + weights * (x - z * z.sin()).square()).sum(-1)  # noqa: E731
    found = []
    for adjoint in (ImplicitAdjoint(), UnrolledAdjoint()):
        limit = Termination(atol=1e-11, rtol=1e-11, max_steps=2000)
        x = minimize(energy, torch.zeros_like(z), z, solver=solver, adjoint=adjoint, termination=limit).value
        (first,) = torch.autograd.grad(x.sum(), z, create_graph=True)
        found.append((x, first, *torch.autograd.grad(first.square().sum(), z)))
    for expected, got, rtol in zip(*found, (0, 0, 2e-6), strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("solver", [LBFGS(), LBFGS(search=Backtracking()), GradientDescent()], ids=repr)
def test_an_unrolled_step_on_to_the_minimum_leaves_no_nan(solver: Solver) -> None:
    """In cosh(x − z) both coordinates are alike, so that a step may hit the minimum to the last digit, where others run on."""
    z = torch.tensor([[1.0, 1.0], [0.3, -2.0]], dtype=torch.float64, requires_grad=True)
    x = minimize(lambda x, z: (x - z).cosh().sum(-1), torch.zeros_like(z), z, solver=solver, adjoint=UnrolledAdjoint()).value
    torch.testing.assert_close(torch.autograd.grad(x.sum(), z)[0], torch.ones_like(z), rtol=0, atol=1e-4)


def test_wrong_options_are_refused() -> None:
    for wrong in (lambda: NeumannAdjoint(0), lambda: NeumannAdjoint(3, 0.0), lambda: UnrolledAdjoint(last=0)):
        with pytest.raises(ValueError, match="got"):
            wrong()


# ------------------------------------------------------------------------------------------------- black boxes


def by_scipy(z: Tensor) -> Tensor:  # (3,) -> (4,)
    def slope(x: object) -> object:
        return gradient(ENERGY, torch.tensor(x)[None], z[None])[0].numpy()

    found = scipy.optimize.root(slope, [0.0] * 4, tol=1e-13)
    return torch.from_numpy(found.x)


BOX = implicit(by_scipy, lambda x, z: gradient(ENERGY, x[None], z[None])[0], symmetric=True, termination=TIGHT)
UNSYMMETRIC = implicit(by_scipy, lambda x, z: gradient(ENERGY, x[None], z[None])[0], termination=TIGHT)


@pytest.mark.parametrize("box", [BOX, UNSYMMETRIC], ids=["symmetric", "general"])
def test_black_box_has_derivatives_of_any_order_under_torch_func(box: object) -> None:
    def own(z: Tensor) -> Tensor:
        return minimize(ENERGY, None, z[None], termination=TIGHT).value.sin().sum()

    def other(z: Tensor) -> Tensor:
        return box(z).sin().sum()  # type: ignore[operator]

    z, func = some_context()[0], torch.func
    for transform in (func.grad, func.hessian, lambda f: func.jacfwd(func.jacfwd(f))):
        torch.testing.assert_close(transform(other)(z), transform(own)(z), rtol=0, atol=1e-8)
    zs = some_context()
    torch.testing.assert_close(func.vmap(func.grad(other))(zs), func.vmap(func.grad(own))(zs), rtol=0, atol=1e-8)
    assert torch.autograd.gradgradcheck(other, z.clone().requires_grad_())


def test_black_box_that_is_wrong_is_told() -> None:
    off = implicit(lambda z: z + 1.0, lambda x, z: x - z)
    with pytest.raises(ConvergenceError, match="does not meet its optimality condition"):
        off(torch.ones(3, requires_grad=True))
    with pytest.raises(TypeError, match="from_numpy"):
        implicit(lambda z: z.numpy(), lambda x, z: x - z)(torch.ones(3))
    loose = implicit(lambda z: z + 1e-3, lambda x, z: x - z, termination=Termination(atol=1e-2))
    assert loose(torch.ones(3)).shape == (3,)

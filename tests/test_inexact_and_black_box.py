"""Adjoints that are not exact and say so; black boxes that become differentiable."""

from collections.abc import Callable

import pytest
import scipy.optimize
import torch
from problems import TIGHT, LogCosh, some_context
from torch import Tensor

from energynet import (
    LBFGS,
    Adjoint,
    Anderson,
    Backtracking,
    BarzilaiBorwein,
    Broyden,
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


@pytest.mark.slow
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


@pytest.mark.parametrize("solver", [Newton(), NewtonCG(), GradientDescent()], ids=repr)
def test_a_solver_that_cannot_be_unrolled_is_refused(solver: Solver) -> None:
    with pytest.raises(TypeError, match=f"cannot differentiate the updates of {type(solver).__name__}: "):
        minimize(ENERGY, None, some_context(), solver=solver, adjoint=UnrolledAdjoint())


UNROLLED = [LBFGS(memory=2), LBFGS(memory=2, search=Backtracking()), GradientDescent(BarzilaiBorwein()),
            GradientDescent(FixedStep()), Nesterov(), Picard()]  # fmt: skip


@pytest.mark.slow
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
        gamma = None if isinstance(solver, LBFGS) else 0.01
        x = minimize(energy, torch.zeros_like(z), z, step_size=gamma, solver=solver, adjoint=adjoint, termination=limit).value
        (first,) = torch.autograd.grad(x.sum(), z, create_graph=True)
        found.append((x, first, *torch.autograd.grad(first.square().sum(), z)))
    for expected, got, rtol in zip(*found, (0, 0, 2e-6), strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("solver", [LBFGS(), LBFGS(search=Backtracking()), GradientDescent(BarzilaiBorwein())], ids=repr)
def test_an_unrolled_step_on_to_the_minimum_leaves_no_nan(solver: Solver) -> None:
    """In cosh(x − z) both coordinates are alike, so that a step may hit the minimum to the last digit, where others run on."""
    z = torch.tensor([[1.0, 1.0], [0.3, -2.0]], dtype=torch.float64, requires_grad=True)
    energy, gamma = lambda x, z: (x - z).cosh().sum(-1), None if isinstance(solver, LBFGS) else 0.5
    x = minimize(energy, torch.zeros_like(z), z, step_size=gamma, solver=solver, adjoint=UnrolledAdjoint()).value
    torch.testing.assert_close(torch.autograd.grad(x.sum(), z)[0], torch.ones_like(z), rtol=0, atol=1e-4)


TRUNCATED = [LBFGS(), LBFGS(memory=2, search=Backtracking()), GradientDescent(BarzilaiBorwein()),
             GradientDescent(FixedStep()), Nesterov(), Picard(), Anderson(3), Broyden(5)]  # fmt: skip


def difference_quotient(function: Callable[[Tensor], Tensor], z: Tensor, far: float = 1e-5) -> Tensor:
    """Of fourth order: the derivatives of a sum, coordinate by coordinate."""
    units = far * torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
    around = [[function(z + k * unit).sum() for unit in units] for k in (1, -1, 2, -2)]
    right, left, further, back = (torch.stack(row).reshape(z.shape) for row in around)
    return (8 * (right - left) - (further - back)) / (12 * far)


@pytest.mark.parametrize("steps", [1, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6))])
@pytest.mark.parametrize("gamma", [None, 0.05])
@pytest.mark.parametrize("solver", TRUNCATED, ids=repr)
def test_unrolling_is_exact_for_the_truncated_iterate_or_refused(solver: Solver, gamma: float | None, steps: int) -> None:
    weights = torch.tensor([1.0, 7.0], dtype=torch.float64)
    energy = lambda x, z: ((x - z).cosh() + weights * (x - z * z.sin()).square()).sum(-1)  # noqa: E731
    none = Termination(atol=0, rtol=0, budget=steps)

    def iterate(z: Tensor) -> Tensor:
        options = {"step_size": gamma, "solver": solver, "termination": none, "adjoint": UnrolledAdjoint()}
        return minimize(energy, torch.zeros_like(z), z, **options).value.sin()

    z = torch.tensor([[1.3, -0.7], [0.4, 2.0]], dtype=torch.float64, requires_grad=True)
    if gamma is None and not isinstance(solver, LBFGS):
        with pytest.raises(ValueError, match=r"estimated where none is given.*Pass step_size="):
            iterate(z)
        return
    (got,) = torch.autograd.grad(iterate(z).sum(), z)
    torch.testing.assert_close(got, difference_quotient(iterate, z.detach()), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("solver", [Picard(), Nesterov(), Anderson(3), Broyden(5)], ids=repr)
def test_unrolling_of_a_map_is_exact_for_the_truncated_iterate(solver: Solver) -> None:
    shrink = torch.tensor([1.0, -0.6], dtype=torch.float64)
    for steps in (1, 3, 5):
        none = Termination(atol=0, rtol=0, budget=steps)

        def iterate(z: Tensor, none: Termination = none) -> Tensor:
            step = lambda x, z: 0.5 * (x * shrink).tanh().flip(-1) + z.sin()  # noqa: E731
            options = {"solver": solver, "termination": none, "adjoint": UnrolledAdjoint()}
            return fixed_point(step, torch.zeros_like(z), z, **options).value.sin()

        z = torch.tensor([[1.3, -0.7], [0.4, 2.0]], dtype=torch.float64, requires_grad=True)
        (got,) = torch.autograd.grad(iterate(z).sum(), z)
        torch.testing.assert_close(got, difference_quotient(iterate, z.detach()), rtol=1e-7, atol=1e-8)


# ------------------------------------------------------------------------- the solver of the adjoint, where none is named


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
def test_a_map_that_does_not_contract_is_differentiated_after_a_solver_that_needs_no_contraction(solver: Solver) -> None:
    A = torch.tensor([[-1.5, 0.4, 0.1], [0.2, -2.0, 0.3], [0.5, 0.1, 1.8]], dtype=torch.float64)  # spectral radius 2.1
    b = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    matrix = A.clone().requires_grad_()
    step = lambda x, b, A: x @ A.T + b  # noqa: E731
    tight = Termination(rtol=1e-10, atol=1e-10)
    x = fixed_point(step, torch.zeros_like(b), b, matrix, solver=solver, termination=tight).value
    inverse = torch.linalg.inv(torch.eye(3, dtype=torch.float64) - A)
    torch.testing.assert_close(x, b @ inverse.T, rtol=1e-7, atol=1e-7)
    v = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 1.0]], dtype=torch.float64)
    db, dA = torch.autograd.grad(x, (b, matrix), v, create_graph=True)
    torch.testing.assert_close(db, v @ inverse, rtol=1e-7, atol=1e-7)  # (I − A)⁻ᵀ v
    torch.testing.assert_close(dA, (v @ inverse).T @ x, rtol=1e-7, atol=1e-7)
    (second,) = torch.autograd.grad(db.sum(), matrix)
    torch.testing.assert_close(second, (v @ inverse).T @ (inverse.sum(1).expand(2, 3)), rtol=1e-7, atol=1e-7)


def test_a_budget_does_not_imply_contraction() -> None:
    """After a stated number of steps of Picard the map may be anything, so GMRES differentiates it."""
    b = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    x = fixed_point(lambda x, b: -3 * x + b, torch.zeros_like(b), b, termination=Termination(budget=2)).value
    torch.testing.assert_close(torch.autograd.grad(x.sum(), b)[0], torch.full_like(b, 0.25))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_symmetric_condition_of_either_sign(sign: float) -> None:
    H = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)  # g(x) = H x + z
    exact = torch.linalg.inv(torch.eye(2, dtype=torch.float64) - H)
    solved = implicit(lambda z: exact @ z, lambda x, z: sign * (H @ x + z - x), symmetric=True)
    z = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.autograd.functional.jacobian(solved, z), exact)
    saddle = implicit(lambda z: z / torch.tensor([2.0, -3.0]), lambda x, z: torch.tensor([2.0, -3.0]) * x - z, symmetric=True)
    torch.testing.assert_close(torch.autograd.functional.jacobian(saddle, z), torch.diag(1 / torch.tensor([2.0, -3.0])).double())


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


def test_a_wrong_black_box_is_reported() -> None:
    off = implicit(lambda z: z + 1.0, lambda x, z: x - z)
    with pytest.raises(ConvergenceError, match="does not satisfy its optimality condition"):
        off(torch.ones(3, requires_grad=True))
    with pytest.raises(TypeError, match="from_numpy"):
        implicit(lambda z: z.numpy(), lambda x, z: x - z)(torch.ones(3))
    loose = implicit(lambda z: z + 1e-3, lambda x, z: x - z, termination=Termination(atol=1e-2))
    assert loose(torch.ones(3)).shape == (3,)

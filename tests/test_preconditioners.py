"""Preconditioners save steps and change neither answers nor derivatives of any order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import records
from problems import TIGHT, LogEnergy
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from energynet import (
    LBFGS,
    AdjointReport,
    Compiled,
    ConjugateGradient,
    Energy,
    HessianBlocks,
    HessianDiagonal,
    ImplicitAdjoint,
    NewtonCG,
    Solver,
    Termination,
    UnrolledAdjoint,
    implicit,
    minimize,
)

N = 20  # more unknowns than probes
SCALE = torch.logspace(-1, 2.5, N, dtype=torch.float64)[torch.randperm(N, generator=torch.Generator().manual_seed(0))]


class Chain(Energy):
    """½ Σ s (x − z)² + Σ log cosh(differences of neighbors): curvatures from 0.1 to 300, and coupled."""

    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:  # (B, N) twice
        return 0.5 * (SCALE * (x - z).square()).sum(-1) + (x[:, 1:] - x[:, :-1]).cosh().log().sum(-1)


class KnownChain(Chain):
    """It tells the diagonal of its Hessian, from a code."""

    asked = 0

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, SCALE * z

    def evaluate(self, x: Tensor, z: Tensor, scaled: Tensor) -> Tensor:  # type: ignore[override]
        return super().evaluate(x, z)

    def hessian_diagonal(self, x: Tensor, z: Tensor, scaled: Tensor) -> Tensor:
        assert z.shape == scaled.shape == x.shape
        type(self).asked += 1
        bend = (x[:, 1:] - x[:, :-1]).cosh() ** -2
        return SCALE + torch.nn.functional.pad(bend, (1, 0)) + torch.nn.functional.pad(bend, (0, 1))


def given(x: Tensor, *code: Any) -> Callable[[Tensor], Tensor]:
    """A user's own."""
    return lambda p: p / (SCALE + 1)


def context(batch: int = 3, requires_grad: bool = True) -> Tensor:
    z = torch.randn(batch, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return z.requires_grad_(requires_grad)


PAIRS = [(Chain(), given), (Chain(), HessianDiagonal()), (KnownChain(), HessianDiagonal()), (Chain(), HessianDiagonal(N))]
MAKERS = [lambda M: NewtonCG(preconditioner=M), lambda M: LBFGS(initial_inverse=M)]
IDS = ["function", "probed", "known", "whole"]


@pytest.mark.parametrize(("energy", "M"), PAIRS, ids=IDS)
@pytest.mark.parametrize("make", MAKERS, ids=["newton", "lbfgs"])
def test_same_answer_and_gradient_in_fewer_steps(energy: Energy, M: Any, make: Callable[[Any], Solver]) -> None:
    z, few, many = context(), AdjointReport(), AdjointReport()

    def solve(solver: Solver, linear: Solver, report: AdjointReport) -> tuple[Any, Tensor]:
        found = minimize(energy, torch.zeros_like(z), z, solver=solver, termination=TIGHT,
                         adjoint=ImplicitAdjoint(linear, report=report))  # fmt: skip
        return found, grad(found.value.square().sum(), z)[0]

    with_it, slope = solve(make(M), ConjugateGradient(M), few)
    without, expected = solve(make(None), ConjugateGradient(), many)
    torch.testing.assert_close(with_it.value, without.value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope, expected, rtol=1e-8, atol=1e-8)
    assert few.max_steps < 0.8 * many.max_steps
    if isinstance(make(M), LBFGS):
        assert (with_it.num_steps < 0.8 * without.num_steps).all()


@pytest.mark.parametrize("M", [lambda x, z: lambda p: p * 0.5 / z, HessianDiagonal()], ids=["function", "diagonal"])
@pytest.mark.parametrize("make", MAKERS, ids=["newton", "lbfgs"])
def test_closed_form_to_third_order(M: Any, make: Callable[[Any], Solver]) -> None:
    energy = LogEnergy()
    z = torch.tensor([[0.5, 2.0], [1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    adjoint = ImplicitAdjoint(ConjugateGradient(M))
    x = minimize(energy, torch.zeros_like(z), z, solver=make(M), termination=TIGHT, adjoint=adjoint).value
    first = grad(x.sum(), z, create_graph=True)[0]
    second = grad(first.sum(), z, create_graph=True)[0]
    third = grad(second.sum(), [z, energy.theta])
    torch.testing.assert_close(x, (z / energy.theta).log())
    torch.testing.assert_close(first, 1 / z)
    torch.testing.assert_close(second, -1 / z**2)
    torch.testing.assert_close(third[0], 2 / z**3)
    torch.testing.assert_close(third[1], torch.zeros_like(energy.theta), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("energy", "M"), PAIRS[1:3], ids=IDS[1:3])
def test_derivatives_agree_with_differences(energy: Energy, M: Any) -> None:
    def solve(z: Tensor) -> Tensor:
        x0, adjoint = torch.zeros_like(z), ImplicitAdjoint(ConjugateGradient(M))
        return minimize(energy, x0, z, solver=NewtonCG(preconditioner=M), termination=TIGHT, adjoint=adjoint).value[:, ::6]

    assert gradcheck(solve, context(1), fast_mode=True)
    assert gradgradcheck(solve, context(1), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize(("energy", "M"), PAIRS[:3], ids=IDS[:3])
def test_transforms(energy: Energy, M: Any) -> None:
    z = context(1, requires_grad=False)[0]

    def solve(z: Tensor, M: Any = M) -> Tensor:
        return minimize(energy, torch.zeros_like(z)[None], z[None], solver=NewtonCG(preconditioner=M), termination=TIGHT,
                        adjoint=ImplicitAdjoint(ConjugateGradient(M))).value[0]  # fmt: skip

    plain = torch.func.jacrev(lambda z: solve(z, None))(z)
    torch.testing.assert_close(torch.func.jacrev(solve)(z), plain, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.func.jacfwd(solve)(z), plain, rtol=1e-8, atol=1e-8)
    batch = torch.stack([z, -0.5 * z])
    torch.testing.assert_close(torch.func.vmap(solve)(batch), torch.stack([solve(z) for z in batch]), rtol=1e-9, atol=1e-9)


def test_samples_keep_to_themselves() -> None:
    z = context(3, requires_grad=False) * torch.tensor([[1.0], [3.0], [1e-3]], dtype=torch.float64)
    solver, loose = LBFGS(initial_inverse=HessianDiagonal()), Termination(rtol=1e-6)
    together = minimize(KnownChain(), torch.zeros_like(z), z, solver=solver, termination=loose)
    alone = [minimize(KnownChain(), torch.zeros_like(row), row, solver=solver, termination=loose) for row in z.split(1)]
    torch.testing.assert_close(together.value, torch.cat([a.value for a in alone]), rtol=1e-9, atol=1e-9)
    assert (together.num_steps - torch.cat([a.num_steps for a in alone])).abs().max() <= 1


def test_the_energy_is_asked_once_per_solve_and_once_per_newton_step() -> None:
    z, energy, M = context(2), KnownChain(), HessianDiagonal()
    KnownChain.asked = 0
    x = minimize(energy, torch.zeros_like(z), z, solver=LBFGS(initial_inverse=M)).value
    assert KnownChain.asked == 1
    minimize(energy, torch.zeros_like(z), z, adjoint=ImplicitAdjoint(ConjugateGradient(M))).value.sum().backward()
    assert KnownChain.asked == 2
    steps = minimize(energy, x.detach() + 0.01, z, solver=NewtonCG(preconditioner=M)).num_steps
    assert KnownChain.asked == 2 + int(steps.max())


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_one_that_is_not_positive_is_left_out(bad: float) -> None:
    z, M = context(), lambda x, z: lambda p: bad * p
    for solver in (NewtonCG(preconditioner=M), LBFGS(initial_inverse=M)):
        x = minimize(Chain(), torch.zeros_like(z), z, solver=solver, termination=Termination(rtol=1e-10, max_steps=5000),
                     adjoint=ImplicitAdjoint(ConjugateGradient(M))).value  # fmt: skip
        expected = minimize(Chain(), torch.zeros_like(z), z, solver=NewtonCG(), termination=TIGHT).value
        torch.testing.assert_close(x, expected, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(grad(x.sum(), z)[0], grad(expected.sum(), z)[0], rtol=1e-6, atol=1e-6)


def flow(u: Tensor, slope: Tensor, z: Tensor) -> Tensor:  # (B, 2, H, W), (B, 2, H, W), (B, H, W)
    """Two numbers per pixel, coupled with each other and with nothing else."""
    data = 0.5 * ((slope * u).sum(1) - z).square().sum((1, 2))
    return data + 0.005 * u.square().sum((1, 2, 3))


class KnownFlow(Energy):
    def evaluate(self, u: Tensor, slope: Tensor, z: Tensor) -> Tensor:
        return flow(u, slope, z)

    def hessian_blocks(self, u: Tensor, slope: Tensor, z: Tensor) -> Tensor:
        unit = torch.eye(2, dtype=u.dtype)[..., None, None]
        return slope.unsqueeze(1) * slope.unsqueeze(2) + 0.01 * unit


@pytest.mark.parametrize("energy", [flow, KnownFlow()], ids=["probed", "known"])
def test_blocks_solve_what_couples_two_channels_at_once(energy: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    slope = 10 * torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=generator)
    z = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    report, M = AdjointReport(), HessianBlocks(probes=2)
    x = minimize(energy, torch.zeros_like(slope), slope, z, solver=NewtonCG(preconditioner=M), termination=TIGHT,
                 adjoint=ImplicitAdjoint(ConjugateGradient(M), report=report)).value  # fmt: skip
    H = slope.unsqueeze(1) * slope.unsqueeze(2) + 0.01 * torch.eye(2, dtype=torch.float64)[..., None, None]
    expected = torch.linalg.solve(H.movedim((1, 2), (-2, -1)), (slope * z.unsqueeze(1)).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(grad((weights * x).sum(), z)[0], grad((weights * expected).sum(), z)[0], rtol=1e-8, atol=1e-8)
    assert report.max_steps <= 2  # the second for what rounding left


def test_blocks_without_a_batch() -> None:
    slope, z = torch.full((2, 3, 4), 2.0), torch.ones(3, 4)
    solver = NewtonCG(preconditioner=HessianBlocks())
    one = lambda u, slope, z: flow(u[None], slope[None], z[None])[0]  # noqa: E731
    x = minimize(one, torch.zeros_like(slope), slope, z, solver=solver, batch_dims=0).value
    torch.testing.assert_close(x, 2 / 8.01 * torch.ones_like(x), rtol=1e-3, atol=1e-3)


def test_unrolled_gradient_is_that_of_the_iterate() -> None:
    def iterate(z: Tensor) -> Tensor:
        solver = LBFGS(initial_inverse=HessianDiagonal())
        return minimize(Chain(), torch.zeros_like(z), z, solver=solver, termination=Termination(budget=3),
                        adjoint=UnrolledAdjoint()).value  # fmt: skip

    assert gradcheck(iterate, context(1), fast_mode=True, rtol=1e-3)


def test_black_box_with_a_symmetric_condition() -> None:
    condition = lambda x, z: SCALE * (x - z)  # noqa: E731
    report = AdjointReport()
    adjoint = ImplicitAdjoint(ConjugateGradient(lambda x, z: lambda p: p / SCALE), report=report)
    z = context()
    x = implicit(lambda z: z.clone(), condition, symmetric=True, adjoint=adjoint)(z)
    torch.testing.assert_close(grad(x.square().sum(), z)[0], 2 * z)
    assert report.max_steps <= 2


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"the class HessianDiagonal was passed"):
        ConjugateGradient(HessianDiagonal)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"function \(x, \*context\)"):
        NewtonCG(preconditioner=torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="initial_inverse must be"):
        LBFGS(initial_inverse=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="probes"):
        HessianDiagonal(0)
    z = context(requires_grad=False)
    with pytest.raises(TypeError, match="must return a function"):
        minimize(Chain(), torch.zeros_like(z), z, solver=NewtonCG(preconditioner=lambda x, z: SCALE))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"one tensor \(B, 2, \.\.\.\), got \(3, 20\)"):
        minimize(Chain(), torch.zeros_like(z), z, solver=NewtonCG(preconditioner=HessianBlocks()))


@records
def test_compiled() -> None:
    z, M = context(2), HessianDiagonal()

    def solve(driver: Any) -> tuple[Tensor, Tensor]:
        x = minimize(KnownChain(), torch.zeros_like(z), z, solver=LBFGS(initial_inverse=M), termination=TIGHT, driver=driver,
                     adjoint=ImplicitAdjoint(ConjugateGradient(M))).value  # fmt: skip
        return x, grad(x.square().sum(), z)[0]

    for eager, compiled in zip(solve(None), solve(Compiled(strict=True)), strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-8, atol=1e-8)

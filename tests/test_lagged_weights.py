"""Lagged weights: the energy never rises, and the answer and its derivatives are those of any solver."""

from collections.abc import Callable

import pytest
import torch
from compiling import records
from problems import TIGHT
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from energynet import (
    Compiled,
    ConjugateGradient,
    Energy,
    HessianDiagonal,
    ImplicitAdjoint,
    LaggedWeights,
    NewtonCG,
    Status,
    Termination,
    UnrolledAdjoint,
    gradient,
    minimize,
)

N = 12
ONE_STEP = Termination(budget=1)


class Quadratic:
    """½ Σ (u − z)² + ½ Σ w (differences of u)², and the diagonal of its matrix."""

    def __init__(self, z: Tensor, weight: Tensor) -> None:
        self.z, self.weight = z, weight

    def __call__(self, u: Tensor) -> Tensor:
        return 0.5 * (u - self.z).square().sum(-1) + 0.5 * (self.weight * u.diff().square()).sum(-1)

    def hessian_diagonal(self, u: Tensor) -> Tensor:
        pad = torch.nn.functional.pad
        return 1 + pad(self.weight, (1, 0)) + pad(self.weight, (0, 1))


class Convex(Energy):
    """½ Σ (x − z)² + 9 Σ √(0.3 + t²) over the differences t of neighbors."""

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:  # (B, N)
        return z, z.new_tensor(0.3)

    def evaluate(self, x: Tensor, z: Tensor, floor: Tensor) -> Tensor:
        return 0.5 * (x - z).square().sum(-1) + 9 * self.potential(x.diff().square() + floor).sum(-1)

    def majorizer(self, x: Tensor, z: Tensor, floor: Tensor) -> Callable[[Tensor], Tensor]:
        return Quadratic(z, 9 * self.weight(x.diff().square() + floor))

    def potential(self, s: Tensor) -> Tensor:
        return s.sqrt()

    def weight(self, s: Tensor) -> Tensor:  # twice its derivative
        return s.rsqrt()


class Nonconvex(Convex):
    """The potential levels off."""

    def potential(self, s: Tensor) -> Tensor:
        return s.log()

    def weight(self, s: Tensor) -> Tensor:
        return 2 / s


ENERGIES = [Convex(), Nonconvex()]
NAMES = ["convex", "nonconvex"]


def context(batch: int = 3, requires_grad: bool = False) -> Tensor:
    z = 3 * torch.randn(batch, N, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return z.requires_grad_(requires_grad)


def matrix(z: Tensor, weight: Tensor) -> Tensor:  # (N,), (N − 1,) -> (N, N)
    D = torch.eye(N, dtype=z.dtype).diff(dim=0)
    return torch.eye(N, dtype=z.dtype) + D.mT @ torch.diag(weight) @ D


@pytest.mark.parametrize("inner", [1, 3, 50])
@pytest.mark.parametrize("energy", ENERGIES, ids=NAMES)
def test_the_energy_never_rises_however_inexact_the_inner_solves(energy: Convex, inner: int) -> None:
    z = context(4)
    solver = LaggedWeights(inner, preconditioner=HessianDiagonal() if inner == 3 else None)
    found = minimize(energy, z, z, solver=solver, termination=Termination(budget=25), trace=True)
    energies = found.trace.energy
    assert (energies.diff(dim=0) <= 1e-12 * energies[0]).all()
    assert (energies[10] < energies[0]).all()


@pytest.mark.parametrize("energy", ENERGIES, ids=NAMES)
def test_a_step_solves_the_linear_equation_of_the_weights(energy: Convex) -> None:
    z = context()
    floor = energy.encode(z)[1]
    solver = LaggedWeights(accuracy=1e-12)
    x = minimize(energy, z, z, solver=solver, termination=ONE_STEP).value
    for k in range(3):
        expected = torch.linalg.solve(matrix(z[k], 9 * energy.weight(z[k].diff().square() + floor)), z[k])
        torch.testing.assert_close(x[k], expected, rtol=1e-9, atol=1e-9)


def test_answer_and_derivatives_to_third_order_are_those_of_newton() -> None:
    def results(solver: LaggedWeights | NewtonCG) -> list[Tensor]:
        z = context(2, requires_grad=True)
        adjoint = ImplicitAdjoint(ConjugateGradient(), TIGHT)
        x = minimize(Convex(), z.detach(), z, solver=solver, termination=TIGHT, adjoint=adjoint).value
        found, value = [x], x.square().sum()
        for _ in range(3):
            (slope,) = grad(value, z, create_graph=True)
            found.append(slope)
            value = slope[:, ::3].pow(3).sum()
        return found

    for lagged, newton in zip(results(LaggedWeights()), results(NewtonCG()), strict=True):
        torch.testing.assert_close(lagged, newton, rtol=1e-7, atol=1e-7)


def test_derivatives_agree_with_differences() -> None:
    def solve(z: Tensor) -> Tensor:
        return minimize(Convex(), z.detach(), z, solver=LaggedWeights(), termination=TIGHT).value[:, ::4]

    assert gradcheck(solve, context(1, requires_grad=True), fast_mode=True)
    assert gradgradcheck(solve, context(1, requires_grad=True), fast_mode=True)


def test_local_minima_of_one_that_levels_off() -> None:
    z = context(4)
    found = minimize(Nonconvex(), z, z, solver=LaggedWeights(), termination=Termination(rtol=1e-9))
    assert found.converged.all()
    slope = gradient(Nonconvex(), found.value, z)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-5)


def test_one_bad_sample_does_not_affect_others() -> None:
    z = context(4)
    z[1], z[2] = torch.nan, torch.inf
    found = minimize(Convex(), z, z, solver=LaggedWeights(), on_failure="ignore")
    assert found.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.NONFINITE, Status.CONVERGED]
    alone = minimize(Convex(), z[[0, 3]], z[[0, 3]], solver=LaggedWeights())
    torch.testing.assert_close(found.value[[0, 3]], alone.value)


def test_transforms() -> None:
    z = context(2)

    def solve(z: Tensor, solver: LaggedWeights | NewtonCG = LaggedWeights()) -> Tensor:  # noqa: B008
        return minimize(Convex(), z[None].detach(), z[None], solver=solver, termination=Termination(rtol=1e-10)).value[0]

    torch.testing.assert_close(torch.func.vmap(solve)(z), torch.stack([solve(row) for row in z]), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.func.jacrev(solve)(z[0]), torch.func.jacrev(lambda z: solve(z, NewtonCG()))(z[0]),
                               rtol=1e-6, atol=1e-6)  # fmt: skip


def test_one_problem_without_a_batch() -> None:
    class One(Convex):
        def evaluate(self, x: Tensor, z: Tensor, floor: Tensor) -> Tensor:
            return super().evaluate(x[None], z[None], floor)[0]

    z = context(1)
    x = minimize(One(), z[0], z[0], solver=LaggedWeights(preconditioner=HessianDiagonal()), batch_dims=0).value
    torch.testing.assert_close(x, minimize(Convex(), z, z, solver=LaggedWeights()).value[0], rtol=1e-6, atol=1e-6)


def test_quadratics_below_the_energy_lead_downhill_all_the_same() -> None:
    class Wrong(Convex):
        def majorizer(self, x: Tensor, z: Tensor, floor: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda u: 0.02 * Quadratic(z, 9 * self.weight(x.diff().square() + floor))(u)

    z = context()
    found = minimize(Wrong(), z, z, solver=LaggedWeights(), termination=Termination(rtol=1e-6))
    torch.testing.assert_close(found.value, minimize(Convex(), z, z, solver=NewtonCG()).value, rtol=1e-4, atol=1e-4)


def test_the_quadratic_is_asked_for_its_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    known = Quadratic.hessian_diagonal
    monkeypatch.setattr(Quadratic, "hessian_diagonal", lambda self, u: asked.append(u) or known(self, u))
    z = context()
    steps = minimize(Convex(), z, z, solver=LaggedWeights(preconditioner=HessianDiagonal())).num_steps
    assert len(asked) == int(steps.max())
    own = lambda x, z, floor: lambda p: p / (1 + x.square())  # noqa: E731  # a user's, which gets the code
    x = minimize(Convex(), z, z, solver=LaggedWeights(preconditioner=own), termination=Termination(rtol=1e-9)).value
    torch.testing.assert_close(x, minimize(Convex(), z, z, solver=NewtonCG()).value, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    plain = lambda x: x.square().sum(-1)  # noqa: E731
    with pytest.raises(TypeError, match=r"method majorizer\(x, \*code\).*lambda> has none"):
        minimize(plain, torch.ones(1, 2), solver=LaggedWeights())
    with pytest.raises(TypeError, match="cannot solve the minimum of a smooth energy within bounds"):
        from energynet.constraints import NonNegative

        minimize(Convex(), context(), context(), prox=NonNegative(), solver=LaggedWeights())
    with pytest.raises(TypeError, match="UnrolledAdjoint"):
        minimize(Convex(), context(), context(), solver=LaggedWeights(), adjoint=UnrolledAdjoint())
    for wrong in ({"inner": 0}, {"accuracy": 1.0}, {"accuracy": 0.0}):
        with pytest.raises(ValueError, match="LaggedWeights needs"):
            LaggedWeights(**wrong)  # type: ignore[arg-type]


@records
def test_compiled() -> None:
    z = context(2)
    solver = LaggedWeights(preconditioner=HessianDiagonal())
    eager, compiled = (minimize(Convex(), z, z, solver=solver, driver=driver) for driver in (None, Compiled(strict=True)))
    torch.testing.assert_close(eager.value, compiled.value, rtol=1e-7, atol=1e-7)

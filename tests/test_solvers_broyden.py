"""Broyden: the secant condition, finite termination, its safeguard, and its place among the other solvers."""

import pytest
import torch
from problems import TIGHT, Contraction, LogCosh, newton_fixed_point, newton_minimum, some_context
from torch import Tensor

from energynet import ImplicitAdjoint, Picard, Status, Termination, UnrolledAdjoint, fixed_point, minimize
from energynet.solvers.broyden import Broyden, BroydenState
from energynet.solvers.problem import Map

LIMIT = Termination(atol=1e-10, rtol=1e-10, max_steps=500)


def affine(n: int, radius: float, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    R = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return radius * R / torch.linalg.eigvals(R).abs().max(), torch.randn(batch, n, dtype=torch.float64, generator=generator)


def inverse_jacobian(state: BroydenState) -> Tensor:
    n = state.move.shape[-1]
    filled = torch.arange(state.left.shape[-2]) < state.filled
    return torch.eye(n, dtype=state.left.dtype) + (state.left * filled.unsqueeze(-1)).mT @ state.right


def test_first_step_is_the_maps_own_and_every_later_one_obeys_the_secant_condition() -> None:
    R, b = affine(6, 0.9)
    problem = Map(lambda x: x - (x @ R).sin() - b)
    x = torch.zeros(3, 6, dtype=torch.float64)
    solver, state = Broyden(), Broyden().init(problem, x)
    for k in range(5):
        new, after = solver.update(problem, x, state)
        if k == 0:
            torch.testing.assert_close(new, problem.map(x))
        change = (state.move - after.move).unsqueeze(-1)
        torch.testing.assert_close((inverse_jacobian(after) @ change).squeeze(-1), new - x, rtol=1e-9, atol=1e-10)
        x, state = new, after


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_linear_map_is_solved_in_2n_steps(n: int) -> None:
    """Gay (1979): exact after 2n steps on n unknowns, whether the map contracts or not."""
    R, b = affine(n, 0.95)
    solution = fixed_point(lambda x: x @ R + b, torch.zeros_like(b), solver=Broyden(), termination=TIGHT)
    assert (solution.num_steps <= 2 * n + 2).all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(torch.eye(n, dtype=torch.float64) - R.mT, b.mT).mT)


@pytest.mark.parametrize("memory", [1, 3, 20])
def test_a_slow_map_and_a_minimum(memory: int) -> None:
    network, z = Contraction(n=12, rate=0.95), some_context()
    x0 = torch.zeros(2, 12, dtype=torch.float64)
    got = fixed_point(network, x0, z, solver=Broyden(memory), termination=LIMIT).value
    torch.testing.assert_close(got, torch.stack([newton_fixed_point(network, x0[0], row) for row in z]))
    energy, x0 = LogCosh(), torch.zeros(2, 4, dtype=torch.float64)
    got = minimize(energy, x0, z, step_size=energy.step_size, solver=Broyden(memory), termination=LIMIT).value
    torch.testing.assert_close(got, torch.stack([newton_minimum(energy, x0[0], row) for row in z]))


def test_fewer_steps_than_picard_and_convergence_where_picard_has_none() -> None:
    R, b = affine(20, 0.95)
    step, x0 = lambda x: x @ R + b, torch.zeros_like(b)
    ours, plain = (fixed_point(step, x0, solver=s, termination=LIMIT).num_steps for s in (Broyden(50), Picard()))
    assert (3 * ours < plain).all()
    repelled = fixed_point(lambda x: 1 - 3 * x + 0.1 * x.sin(), torch.zeros(2, 3), solver=Broyden())
    assert repelled.converged.all()


def test_a_step_that_is_not_finite_is_taken_back() -> None:
    """The square root ends at 0: where a secant step leaves its domain the plain one goes on."""
    x0 = torch.tensor([[8.0], [30.0], [1e-3]], dtype=torch.float64)
    solution = fixed_point(lambda x: 0.9 * x.sqrt() * (1 + 0.05 * (9 * x).sin()), x0, solver=Broyden(), termination=LIMIT)
    assert solution.converged.all()
    problem = Map(lambda x: torch.where(x > 4, torch.nan, x - 5).expand_as(x))
    x = torch.tensor([[0.0]], dtype=torch.float64)
    memory = torch.ones(1, 3, 1, dtype=torch.float64)
    state = Broyden(3).init(problem, x)._replace(left=memory, right=memory, filled=torch.tensor([[2]], dtype=torch.int32))
    after, fresh = Broyden(3).update(problem, x, state)  # 0 + 3 · 5 lies where the map is NaN
    assert after.item() == 0 and fresh.residual.item() == -5 and fresh.filled.item() == 0


def test_samples_freeze_separately_and_do_not_see_each_other() -> None:
    network, z = Contraction(n=8, rate=0.9), some_context(5)
    x0 = torch.zeros(5, 8, dtype=torch.float64)
    x0[2] = torch.nan
    together = fixed_point(network, x0, z, solver=Broyden(4), termination=LIMIT, on_failure="ignore")
    assert together.status.tolist() == [0, 0, Status.NONFINITE, 0, 0]
    for k in (0, 1, 3, 4):
        alone = fixed_point(network, x0[k : k + 1], z[k : k + 1], solver=Broyden(4), termination=LIMIT)
        torch.testing.assert_close(together.value[k], alone.value[0], rtol=1e-12, atol=1e-12)
        assert abs(int(together.num_steps[k]) - int(alone.num_steps[0])) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    z = torch.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3)
    solution = fixed_point(lambda x, z: 0.8 * x.sin() + z, torch.zeros_like(z), z, solver=Broyden(3))
    assert solution.value.dtype == dtype
    exact = fixed_point(lambda x, z: 0.8 * x.sin() + z, torch.zeros_like(z).double(), z.double(), solver=Broyden(3)).value
    torch.testing.assert_close(solution.value.double(), exact, rtol=0, atol=10 * torch.finfo(dtype).eps ** 0.5)


def test_empty_problems_scalars_and_a_start_at_the_answer() -> None:
    for shape in ((3, 0), (0, 3)):
        assert fixed_point(torch.cos, torch.zeros(shape), solver=Broyden()).value.shape == shape
    assert fixed_point(lambda x: 0.5 * x + 0.5, torch.ones(2, 2), solver=Broyden()).num_steps.tolist() == [0, 0]
    with pytest.raises(ValueError, match="memory ≥ 1"):
        Broyden(0)


def test_derivatives_unrolled_implicit_and_under_vmap() -> None:
    def solve(z: Tensor, adjoint: object) -> Tensor:
        step = lambda x, z: 0.5 * x.sin() + z  # noqa: E731
        return fixed_point(step, torch.zeros_like(z), z, solver=Broyden(3), termination=TIGHT, adjoint=adjoint).value

    z = torch.tensor([[0.3, -0.2], [1.0, 0.4]], dtype=torch.float64, requires_grad=True)
    expected = 1 / (1 - 0.5 * solve(z, ImplicitAdjoint(Broyden())).detach().cos())
    for adjoint in (ImplicitAdjoint(), ImplicitAdjoint(Broyden()), UnrolledAdjoint()):
        (got,) = torch.autograd.grad(solve(z, adjoint).sum(), z)
        torch.testing.assert_close(got, expected, rtol=1e-6 if isinstance(adjoint, UnrolledAdjoint) else 1e-9, atol=0)
    rows = torch.func.vmap(torch.func.grad(lambda z: solve(z[None], ImplicitAdjoint(Broyden())).sum()))(z.detach())
    torch.testing.assert_close(rows, expected)

"""Linear solvers: right on every kind of matrix, honest where there is no answer, each sample by itself."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TIGHT, Contraction, EncodedLogCosh, LogCosh, LogEnergy, newton_fixed_point, newton_minimum, some_context
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from energynet import (
    FPI_GD,
    FPI_NN,
    AdjointReport,
    Anderson,
    ConjugateGradient,
    ConvergenceError,
    ImplicitAdjoint,
    Picard,
    Status,
    Termination,
    fixed_point,
    implicit,
    minimize,
)
from energynet.engine.loop import LoopState, loop
from energynet.linear import GMRES, MINRES, BiCGSTAB, Dense
from energynet.solution import OnFailure
from energynet.solvers import Solver
from energynet.solvers.broyden import Broyden
from energynet.solvers.problem import Linear

ANY = [GMRES(40), BiCGSTAB(), Dense()]
SYMMETRIC = [ConjugateGradient(), MINRES(), *ANY]
KRYLOV = [MINRES(), GMRES(20), BiCGSTAB()]


def run(solver: Solver, A: Tensor, v: Tensor, rtol: float = 1e-10, max_steps: int = 2000, symmetric: bool = False,
        observe: Callable[[LoopState], None] | None = None) -> LoopState:  # fmt: skip
    product = lambda u: (A @ u.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    problem = Linear(lambda u: product(u) - v, lambda _: product, batch_dims=v.ndim - 1, step_size=1.0, start=v, right=v,
                     symmetric=symmetric)  # fmt: skip
    return loop(problem, solver, Termination(rtol=rtol, max_steps=max_steps), torch.zeros_like(v), observe)


def error(A: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """‖A u − v‖ / ‖v‖ of each sample."""
    return ((A @ u.unsqueeze(-1)).squeeze(-1) - v).norm(dim=-1) / v.norm(dim=-1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(*shape: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(*shape, shape[-1], seed=seed))[0]


def spectrum(kappas: tuple[float, ...], n: int) -> Tensor:
    exponents = torch.linspace(0, -1, n, dtype=torch.float64)
    return torch.tensor(kappas, dtype=torch.float64)[:, None] ** exponents


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    Q = rotation(*values.shape, seed=seed)
    return Q @ torch.diag_embed(values) @ Q.mT


def with_singular_values(values: Tensor, seed: int = 0) -> Tensor:
    return rotation(*values.shape, seed=seed) @ torch.diag_embed(values) @ rotation(*values.shape, seed=seed + 1)


def check(solver: Solver, A: Tensor, v: Tensor, accuracy: float, symmetric: bool = False) -> LoopState:
    state = run(solver, A, v, symmetric=symmetric)
    assert (state.status == Status.CONVERGED).all(), (state.status, state.steps)
    assert (error(A, state.x, v) <= 1e-10).all()
    torch.testing.assert_close(state.x, torch.linalg.solve(A, v), rtol=0, atol=accuracy * float(state.x.norm()))
    return state


KAPPAS = (1.0, 10.0, 1e3, 1e6)
SINGULAR = torch.cat([torch.zeros(2, dtype=torch.float64), torch.linspace(1, 3, 10, dtype=torch.float64)])
ALTERNATING = (-1.0) ** torch.arange(20)


@pytest.mark.parametrize("solver", SYMMETRIC, ids=str)
def test_positive_definite_matrices_of_mixed_condition_in_one_batch(solver: Solver) -> None:
    A, v = with_eigenvalues(spectrum(KAPPAS, 20)), normal(4, 20)
    state = check(solver, A, v, 1e-4, symmetric=True)
    for k in range(4):  # each sample is frozen where it would have stopped alone
        alone = run(solver, A[k : k + 1], v[k : k + 1], symmetric=True)
        assert abs(int(alone.steps[0]) - int(state.steps[k])) <= 1 + 0.1 * int(state.steps[k])
        torch.testing.assert_close(alone.x[0], state.x[k], rtol=1e-3, atol=1e-8)
    if not isinstance(solver, Dense):
        assert state.steps[0] == 1 and state.steps[3] >= state.steps[1] > 9


@pytest.mark.parametrize("solver", [MINRES(), GMRES(40), BiCGSTAB()], ids=str)
def test_indefinite_matrices(solver: Solver) -> None:
    check(solver, with_eigenvalues(spectrum(KAPPAS[1:], 20) * ALTERNATING), normal(3, 20), 1e-4, symmetric=True)


@pytest.mark.parametrize("solver", ANY, ids=str)
def test_general_matrices(solver: Solver) -> None:
    near = with_singular_values(spectrum((10.0, 1e3), 20)) + 1.5 * torch.eye(20, dtype=torch.float64)
    check(solver, near, normal(2, 20), 1e-9)
    if not isinstance(solver, BiCGSTAB):  # eigenvalues all around zero are beyond it
        check(solver, with_singular_values(spectrum(KAPPAS, 20)), normal(4, 20), 1e-4)


@pytest.mark.parametrize("solver", [GMRES(), Dense()], ids=str)
def test_skew_symmetric_matrices_and_a_cyclic_shift(solver: Solver) -> None:
    A = with_singular_values(spectrum((10.0, 1e3), 20))
    check(solver, A - A.mT, normal(2, 20), 1e-8)
    shift = torch.eye(20, dtype=torch.float64).roll(1, 0)  # GMRES sees no progress before the last step
    state = check(solver, shift[None], torch.eye(20, dtype=torch.float64)[:1], 1e-14)
    assert state.steps.tolist() == [20 if isinstance(solver, GMRES) else 1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_scaling_of_variables_is_not_singularity(symmetric: bool) -> None:
    scales = torch.tensor([1.0, 1e-6, 1.0], dtype=torch.float64)
    A = scales[:, None] * with_eigenvalues(spectrum((10.0,), 3)) * scales
    assert run(Dense(), A, normal(1, 3), symmetric=symmetric).status.tolist() == [Status.CONVERGED]
    tiny = torch.diag(torch.tensor([1.0, 1e-30], dtype=torch.float64))[None]
    assert run(Dense(), tiny, normal(1, 2), symmetric=symmetric).status.tolist() == [Status.CONVERGED]


def test_iterative_refinement_compensates_pivot_growth() -> None:
    A = torch.eye(30, dtype=torch.float64) - torch.ones(30, 30, dtype=torch.float64).tril(-1)  # Wilkinson's: growth 2²⁹
    A[:, -1] = 1
    v = normal(1, 30)
    state = run(Dense(), A[None], v)
    assert state.status.tolist() == [Status.CONVERGED]
    assert (error(A[None], state.x, v) <= 1e-14).all()  # torch.linalg.solve leaves 1e-8


def test_dense_sees_a_singular_matrix_where_there_is_a_solution_too() -> None:
    A = with_singular_values(SINGULAR.expand(20, -1))
    v = (A @ normal(20, 12).unsqueeze(-1)).squeeze(-1)
    assert (run(Dense(), A, v, rtol=1e-6, symmetric=False).status == Status.DIVERGED).all()


def test_dense_solves_for_what_a_semidefinite_matrix_reaches_and_for_nothing_else() -> None:
    A = with_eigenvalues(SINGULAR.expand(20, -1))
    v = (A @ normal(20, 12).unsqueeze(-1)).squeeze(-1)
    state = run(Dense(), A, v, rtol=1e-6, symmetric=True)
    assert (state.status == Status.CONVERGED).all() and (error(A, state.x, v) <= 1e-6).all()
    assert (run(Dense(), A, normal(20, 12), rtol=1e-6, symmetric=True).status == Status.DIVERGED).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("solver", [*SYMMETRIC, Broyden()], ids=str)
def test_an_update_keeps_shapes_and_dtypes(solver: Solver, dtype: torch.dtype) -> None:
    v = normal(2, 3, 4).to(dtype)
    problem = Linear(lambda u: 2 * u - v, lambda _: lambda p: 2 * p, step_size=0.3, start=v, right=v, symmetric=True)
    before = solver.init(problem, torch.zeros_like(v))
    assert before.residual.dtype == (torch.promote_types(dtype, torch.float32) if solver in KRYLOV else before.residual.dtype)
    x, after = solver.update(problem, torch.zeros_like(v), before)
    for old, new in zip((v, *before), (x, *after), strict=True):
        assert old.shape == new.shape and old.dtype == new.dtype and old.shape[:2] == (2, 3)


def test_bicgstab_stops_at_skew_symmetry_and_begins_again_after_a_breakdown() -> None:
    A = with_singular_values(spectrum((10.0,), 6))
    state = run(BiCGSTAB(), A - A.mT, normal(1, 6))
    assert state.status.tolist() == [Status.DIVERGED] and state.steps.tolist() == [2]
    # vᵀA v = 0, so that the first step divides by zero.
    shift = torch.eye(5, dtype=torch.float64).roll(1, 0)[None]
    check(BiCGSTAB(), shift + 0.1 * shift @ shift, torch.eye(5, dtype=torch.float64)[:1], 1e-8)


def residual_history(solver: Solver, A: Tensor, v: Tensor, symmetric: bool = False) -> Tensor:
    seen: list[Tensor] = []
    run(solver, A, v, rtol=1e-12, max_steps=60, symmetric=symmetric, observe=lambda s: seen.append(s.inner.residual.norm(dim=-1)))
    return torch.stack(seen)  # (steps, batch)


def krylov_minimum(A: Tensor, v: Tensor, k: int) -> Tensor:
    """min ‖A u − v‖ over span(v, A v, ..., Aᵏ⁻¹ v) by dense least squares."""
    basis = [v / v.norm()]
    for _ in range(k - 1):
        w = A @ basis[-1]
        for _ in range(2):
            for b in basis:
                w = w - (b @ w) * b
        basis.append(w / w.norm())
    K = A @ torch.stack(basis, -1)
    return (K @ torch.linalg.lstsq(K, v[:, None]).solution - v[:, None]).norm()


@pytest.mark.parametrize("solver", [GMRES(40), MINRES()], ids=str)
def test_residuals_are_the_least_of_the_krylov_space(solver: Solver) -> None:
    symmetric = isinstance(solver, MINRES)
    values = spectrum((5.0, 50.0), 12)
    A = with_eigenvalues(values * ALTERNATING[:12]) if symmetric else with_singular_values(values)
    v = normal(2, 12)
    seen = residual_history(solver, A, v, symmetric)
    for k in range(1, 11):
        for sample in range(2):
            torch.testing.assert_close(seen[k, sample], krylov_minimum(A[sample], v[sample], k), rtol=1e-7, atol=0)


def test_gmres_keeps_its_images_orthogonal_and_its_residual_true() -> None:
    A, v = with_eigenvalues(spectrum((1e6,), 30)), normal(1, 30)
    seen: list[LoopState] = []
    run(GMRES(40), A, v, max_steps=25, observe=seen.append)
    last = seen[25]
    Q = last.inner.images[0, : int(last.inner.filled)]
    torch.testing.assert_close(Q @ Q.mT, torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-14)
    drift = (A @ last.x.unsqueeze(-1)).squeeze(-1) - v - last.inner.residual
    assert float(drift.norm() / v.norm()) <= 5e-11  # here 2e-11, and 1.4e-10 without the residuals among the directions


def test_restarted_residuals_are_those_of_scipy() -> None:
    from scipy.sparse.linalg import gmres

    matrices = [with_singular_values(spectrum((20.0,), 15))[0] + torch.eye(15, dtype=torch.float64), None]
    matrices[1] = matrices[0] - matrices[0].mT  # skew-symmetric: every second step stagnates
    for A in matrices:
        v = normal(15)
        ours = residual_history(GMRES(4), A[None], v[None])[:, 0] / v.norm()
        theirs: list[float] = []
        gmres(A.numpy(), v.numpy(), restart=4, maxiter=15, rtol=1e-12, callback=theirs.append, callback_type="pr_norm")
        count = sum(norm > 1e-8 for norm in theirs)
        assert count >= 10
        torch.testing.assert_close(ours[1 : count + 1], torch.tensor(theirs[:count], dtype=torch.float64), rtol=1e-6, atol=0)


def test_steps_are_about_those_of_scipy() -> None:
    from scipy.sparse import linalg

    A, v = with_eigenvalues(spectrum((100.0,), 40)), normal(1, 40)
    for solver, theirs in ((MINRES(), linalg.minres), (ConjugateGradient(), linalg.cg), (BiCGSTAB(), linalg.bicgstab)):
        count: list[None] = []
        theirs(A[0].numpy(), v[0].numpy(), rtol=1e-8, callback=lambda _, count=count: count.append(None))
        steps = int(run(solver, A, v, rtol=1e-8, symmetric=True).steps[0])
        assert abs(steps - len(count)) <= 3 + 0.2 * len(count), (solver, steps, len(count))


@pytest.mark.parametrize("solver", [ConjugateGradient(), *KRYLOV, GMRES(5), Dense()], ids=str)
def test_a_singular_equation_without_solution_is_reported(solver: Solver) -> None:
    A = with_eigenvalues(torch.stack([SINGULAR, SINGULAR + 1]))
    state = run(solver, A, normal(2, 12), symmetric=True)
    assert state.status.tolist() == [Status.DIVERGED, Status.CONVERGED]
    assert state.steps[0] < 1000
    null = run(solver, torch.diag(SINGULAR[1:4])[None], torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), symmetric=True)
    assert null.status.tolist() == [Status.DIVERGED] and null.steps[0] <= 2  # A v = 0: no zeros for an answer


def test_gmres_stops_before_rounding_leads_it_along_the_null_space() -> None:
    values = torch.cat([torch.zeros(2, dtype=torch.float64), torch.linspace(1, 3, 28, dtype=torch.float64)])
    state = run(GMRES(40), with_eigenvalues(values[None]), normal(1, 30))
    assert state.status.tolist() == [Status.DIVERGED] and state.steps[0] < 30


@pytest.mark.parametrize("solver", [ConjugateGradient(), *KRYLOV], ids=str)
def test_singular_with_a_solution_is_solved(solver: Solver) -> None:
    A = with_eigenvalues(SINGULAR[None])
    v = (A @ normal(1, 12).unsqueeze(-1)).squeeze(-1)
    state = run(solver, A, v, symmetric=True)
    assert state.status.tolist() == [Status.CONVERGED]
    assert (error(A, state.x, v) <= 1e-10).all()
    torch.testing.assert_close(state.x, (torch.linalg.pinv(A) @ v.unsqueeze(-1)).squeeze(-1))  # the shortest one


@pytest.mark.parametrize("solver", [GMRES(), BiCGSTAB(), Dense()], ids=str)
@pytest.mark.parametrize("row", range(4))
def test_a_nilpotent_shift_has_no_answer_in_its_krylov_space(solver: Solver, row: int) -> None:
    shift = torch.diag(torch.ones(3, dtype=torch.float64), 1)[None]
    status = run(solver, shift, torch.eye(4, dtype=torch.float64)[row : row + 1], max_steps=100).status.item()
    assert status == Status.DIVERGED or (isinstance(solver, BiCGSTAB) and status == Status.MAX_STEPS)


def test_general_singular_matrices_in_gmres() -> None:
    A = with_singular_values(SINGULAR[None])
    state = run(GMRES(), A, normal(1, 12))
    assert state.status.tolist() == [Status.DIVERGED] and state.steps[0] <= 12
    assert run(GMRES(), A, (A @ normal(1, 12).unsqueeze(-1)).squeeze(-1)).status.tolist() == [Status.CONVERGED]
    assert run(GMRES(3), torch.eye(6, dtype=torch.float64).roll(1, 0)[None], torch.eye(6, dtype=torch.float64)[:1]).steps[0] == 3


@pytest.mark.parametrize("solver", [ConjugateGradient(), Dense()], ids=str)
def test_indefinite_matrices_are_no_minimum(solver: Solver) -> None:
    A = with_eigenvalues(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, -3.0]], dtype=torch.float64))
    state = run(solver, A, normal(2, 3), symmetric=True)
    assert state.status.tolist() == [Status.CONVERGED, Status.DIVERGED]


@pytest.mark.parametrize("solver", SYMMETRIC, ids=str)
def test_sizes_one_and_zero_and_a_zero_right_hand_side(solver: Solver) -> None:
    four, v = torch.full((2, 1, 1), 4.0, dtype=torch.float64), torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    one = run(solver, four, v, symmetric=True)
    assert one.x.tolist() == [[0.5], [0.0]] and one.steps.tolist() == [1, 0]
    for batch, n in ((3, 0), (0, 3), (0, 0)):
        empty = run(solver, torch.zeros(batch, n, n), torch.zeros(batch, n), symmetric=True)
        assert empty.x.shape == (batch, n) and (empty.status == Status.CONVERGED).all()
        problem = Linear(lambda u: u, lambda _: lambda p: p, start=(v := torch.zeros(batch, n)), right=v, symmetric=True)
        x, _ = solver.update(problem, torch.zeros(batch, n), solver.init(problem, torch.zeros(batch, n)))
        assert x.shape == (batch, n)


@pytest.mark.parametrize("solver", SYMMETRIC, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_affects_only_its_own_sample(solver: Solver, bad: float) -> None:
    A = with_eigenvalues(spectrum((10.0, 10.0), 5))
    A[0, 1, 2] = A[0, 2, 1] = bad
    state = run(solver, A, normal(2, 5), symmetric=True)
    assert state.status[0] in (Status.NONFINITE, Status.DIVERGED) and state.status[1] == Status.CONVERGED


@pytest.mark.parametrize("solver", SYMMETRIC, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=str)
def test_low_precision(solver: Solver, dtype: torch.dtype, rtol: float) -> None:
    A, v = with_eigenvalues(spectrum((3.0, 10.0), 8)).to(dtype), normal(2, 8).to(dtype)
    state = run(solver, A, v, rtol=rtol, max_steps=100, symmetric=True)
    assert state.x.dtype == dtype and (state.status == Status.CONVERGED).all()
    assert (error(A.double(), state.x.double(), v.double()) <= 1.5 * rtol).all()


@pytest.mark.parametrize("solver", SYMMETRIC, ids=str)
def test_several_batch_dimensions(solver: Solver) -> None:
    A, v = with_eigenvalues(spectrum(KAPPAS[:3], 6)).expand(2, 3, 6, 6), normal(2, 3, 6)
    torch.testing.assert_close(run(solver, A, v, symmetric=True).x, torch.linalg.solve(A, v))


@pytest.mark.parametrize("solver", SYMMETRIC, ids=str)
def test_vmap_of_a_gradient(solver: Solver) -> None:
    energy = LogCosh()
    z = some_context(4).reshape(2, 2, 3)
    layer = FPI_GD(energy, energy.step_size, termination=TIGHT, adjoint=ImplicitAdjoint(solver))
    derivative = torch.func.grad(lambda z: layer(z).sin().sum())
    torch.testing.assert_close(torch.func.vmap(derivative)(z), torch.stack([derivative(row) for row in z]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.floats(0.0, 6.0), st.integers(0, 10**6), st.integers(0, len(SYMMETRIC) - 1), st.booleans())
def test_the_residual_claimed_is_the_true_one(n: int, exponent: float, seed: int, which: int, definite: bool) -> None:
    values = spectrum((10**exponent,), n)
    A, v = (with_eigenvalues if definite else with_singular_values)(values, seed), normal(1, n, seed=seed)
    solver = SYMMETRIC[which] if definite else ANY[which % len(ANY)]
    state = run(solver, A, v, max_steps=300, symmetric=definite)
    if state.status.item() in (Status.CONVERGED, Status.MAX_STEPS):
        torch.testing.assert_close(state.error / v.norm(), error(A, state.x, v), rtol=1e-3, atol=1e-14)
    assert state.status.item() != Status.CONVERGED or float(error(A, state.x, v)) <= 1.0001e-10
    if not isinstance(solver, BiCGSTAB):
        assert state.status.item() == Status.CONVERGED


# Adjoints

FOR_MAPS = [*ANY, Picard(), Anderson(), Broyden()]
FOR_ENERGIES = [ConjugateGradient(), MINRES(), *FOR_MAPS]


def close(got: Tensor, expected: Tensor, what: object, tolerance: float = 1e-8) -> None:
    relative = float((got.detach() - expected.detach()).norm() / expected.detach().norm())
    assert relative <= tolerance, f"{what}: relative error {relative:.1e}"


def two_orders(solve: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradient of a loss in every argument, and that of a fixed combination of those."""
    value = solve(*arguments)
    first = grad((value**3 + value.sin()).sum(), arguments, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    weighed = sum((torch.randn(g.shape, dtype=g.dtype, generator=generator) * g).sum() for g in first)
    return [*first, *grad(weighed, arguments)]


def bound(module: nn.Module, prefix: str, call: Callable[[nn.Module], Callable[..., Tensor]]) -> Callable[..., Tensor]:
    names = [f"{prefix}{name}" for name, _ in module.named_parameters()]
    return lambda z, *values: functional_call(call(module), dict(zip(names, values, strict=True)), (z,))


@pytest.mark.parametrize("energy", [LogCosh(), EncodedLogCosh(), LogEnergy()], ids=["plain", "encoded", "log"])
def test_all_exact_adjoints_of_an_energy_agree(energy: nn.Module) -> None:
    z = (some_context() if isinstance(energy, LogCosh) else some_context().abs() + 0.3).requires_grad_()
    arguments = (z, *energy.parameters())
    names = [name for name, _ in energy.named_parameters()]

    def reference(z: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        at = lambda x, z: functional_call(energy, named, (x, z))  # noqa: E731
        return torch.stack([newton_minimum(at, energy.start(z)[0].detach(), row) for row in z])

    expected = two_orders(reference, arguments)
    for solver in FOR_ENERGIES:
        adjoint = ImplicitAdjoint(solver)
        step_size = getattr(energy, "step_size", 0.3)
        layer = lambda e, adjoint=adjoint: FPI_GD(e, step_size, termination=TIGHT, adjoint=adjoint)  # noqa: B023, E731
        for got, want in zip(two_orders(bound(energy, "energy.", layer), arguments), expected, strict=True):
            close(got, want, solver)


def test_all_exact_adjoints_of_a_map_agree() -> None:
    network = Contraction()
    arguments = (some_context(requires_grad=True), *network.parameters())
    names = [name for name, _ in network.named_parameters()]

    def reference(z: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        at = lambda x, z: functional_call(network, named, (x, z))  # noqa: E731
        return torch.stack([newton_fixed_point(at, torch.zeros(4, dtype=torch.float64), row) for row in z])

    expected = two_orders(reference, arguments)
    for solver in FOR_MAPS:
        start = lambda z: z.new_zeros(z.shape[0], 4)  # noqa: E731
        layer = lambda m, solver=solver: FPI_NN(m, start=start, termination=TIGHT, adjoint=ImplicitAdjoint(solver))  # noqa: B023, E731
        for got, want in zip(two_orders(bound(network, "network.", layer), arguments), expected, strict=True):
            close(got, want, solver)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [MINRES(), GMRES(), BiCGSTAB(), Dense(), Broyden()], ids=str)
def test_gradcheck_and_gradgradcheck(solver: Solver) -> None:
    z = some_context(1)[:, :2].abs().add(0.5).requires_grad_()
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    adjoint = ImplicitAdjoint(solver)

    def minimum(z: Tensor, theta: Tensor) -> Tensor:
        energy = lambda x, z, theta: (theta * x.exp() - z * x).sum(-1) + 0.1 * x.sum(-1).square()  # noqa: E731
        return minimize(energy, torch.zeros_like(z), z, theta, step_size=0.4, termination=TIGHT, adjoint=adjoint).value

    def point(z: Tensor, theta: Tensor) -> Tensor:
        step = lambda x, z, theta: theta * x.roll(1, -1).sin() + z  # noqa: E731
        return fixed_point(step, torch.zeros_like(z), z, theta, termination=TIGHT, adjoint=adjoint).value

    for solve in (minimum,) if isinstance(solver, MINRES) else (minimum, point):
        assert torch.autograd.gradcheck(solve, (z, theta), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(solve, (z, theta), check_fwd_over_rev=True)


@pytest.mark.parametrize("solver", FOR_ENERGIES, ids=str)
def test_every_adjoint_solver_to_third_order(solver: Solver) -> None:
    z = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    layer = FPI_GD(LogEnergy(0.7), 0.4, termination=TIGHT, adjoint=ImplicitAdjoint(solver))  # x* = log(z / θ)
    value = layer(z)
    for expected in (1 / z, -1 / z**2, 2 / z**3):
        (value,) = grad(value.sum(), z, create_graph=True)
        close(value, expected, solver)


def test_a_linear_solver_refuses_what_it_cannot_solve() -> None:
    z = torch.ones(1, 1)
    with pytest.raises(TypeError, match=r"MINRES cannot solve a linear equation with a general matrix.*GMRES"):
        fixed_point(lambda x, z: 0.5 * x + z, z, z, adjoint=ImplicitAdjoint(MINRES()))
    for solver in (MINRES(), GMRES(), BiCGSTAB(), Dense()):
        with pytest.raises(TypeError, match=f"{type(solver).__name__} cannot solve the minimum"):
            minimize(lambda x: x.square().sum(-1), z, step_size=0.1, solver=solver)
    with pytest.raises(ValueError, match="restart ≥ 1"):
        GMRES(0)


def weighted(x: Tensor, z: Tensor, weights: Tensor) -> Tensor:
    return 0.5 * (weights * x.square()).sum(-1) + (x * z).sum(-1)


@pytest.mark.parametrize("solver", [ConjugateGradient(), MINRES(), GMRES(), BiCGSTAB(), Dense()], ids=str)
def test_a_flat_direction_is_reported_with_its_sample(solver: Solver) -> None:
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    z = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    x = minimize(weighted, torch.zeros_like(z), z, weights, step_size=0.4, adjoint=ImplicitAdjoint(solver)).value
    with pytest.raises(ConvergenceError, match=r"DIVERGED: 1 of 3 samples \(number 1\).*singular or indefinite"):
        x.sum().backward()


@pytest.mark.parametrize("solver", FOR_ENERGIES, ids=str)
@pytest.mark.parametrize("slope", [1.0, 0.25])  # with 1, vᵀu = vᵀH⁻¹v = 0 tells nothing
def test_a_saddle_is_reported_with_its_sample(solver: Solver, slope: float) -> None:
    weights = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    z = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    few = Termination(budget=20)  # without a budget the saddle is left, and the solve itself fails
    x = minimize(weighted, torch.zeros_like(z), z, weights, step_size=0.4, termination=few, adjoint=ImplicitAdjoint(solver)).value
    torch.testing.assert_close(x[1], torch.tensor([-1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-4)
    with pytest.raises(ConvergenceError, match=r"DIVERGED: 1 of 2 samples \(number 1\).*singular or indefinite"):
        (x[:, 0] + slope * x[:, 1]).sum().backward()


WITHOUT_NEWS = (Picard, Anderson, Broyden)  # these notice a singular equation by their limit of steps only
PATIENT = [pytest.param(s, marks=pytest.mark.slow) if isinstance(s, WITHOUT_NEWS) else s for s in FOR_ENERGIES]


@pytest.mark.parametrize("solver", PATIENT, ids=str)
def test_a_singular_hessian_is_reported_with_its_sample(solver: Solver) -> None:
    z = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    flat = torch.tensor([False, True, False])

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return torch.where(flat, 0.25 * (x - z).pow(4).sum(-1), 0.5 * (x - z).square().sum(-1))

    def answer(policy: OnFailure) -> Tensor:
        return minimize(energy, z.detach().clone(), z, step_size=0.4, adjoint=ImplicitAdjoint(solver), on_failure=policy).value

    with pytest.raises(ConvergenceError, match=r"1 of 3 samples \(number 1\).*singular"):
        answer("raise").sum().backward()
    (gradient,) = grad(answer("ignore").sum(), z)
    assert gradient[1].isnan().all()
    torch.testing.assert_close(gradient[[0, 2]], torch.ones(2, 2, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", [MINRES(), GMRES(), BiCGSTAB()], ids=str)
def test_at_a_saddle_the_derivative_of_the_stationary_point(solver: Solver) -> None:
    weights = torch.tensor([3.0, -0.5], dtype=torch.float64)
    point = implicit(lambda z: -z / weights, lambda x, z: weights * x + z, symmetric=True, adjoint=ImplicitAdjoint(solver))
    torch.testing.assert_close(torch.func.jacrev(point)(torch.ones(2, dtype=torch.float64)), torch.diag(-1 / weights))


def test_krylov_spaces_need_fewer_products_than_the_backward_iteration() -> None:
    network, z = Contraction(n=30, rate=0.9), some_context(8, requires_grad=True)
    steps = {}
    for solver in (Picard(), GMRES(), BiCGSTAB()):
        report = AdjointReport()
        adjoint = ImplicitAdjoint(solver, Termination(rtol=1e-10), report)
        x = FPI_NN(network, start=lambda z: z.new_zeros(z.shape[0], 30), termination=TIGHT, adjoint=adjoint)(z)
        x.sum().backward()
        steps[type(solver)] = int(report.records[0].num_steps.max())
    assert steps[GMRES] < steps[Picard]

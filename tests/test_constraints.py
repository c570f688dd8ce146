"""Constraints and terms that are not smooth: every proximal map by its definition, its derivatives, and in a solve."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TIGHT
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from energynet import (
    FPI_GD,
    Adjoint,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    Energy,
    ImplicitAdjoint,
    LostGradientError,
    Picard,
    Solution,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    minimize,
)
from energynet.constraints import L1, Affine, Box, CappedSimplex, GroupL2, L2Ball, NonNegative, Prox, Simplex, TotalVariation
from energynet.linear import GMRES
from energynet.proximal import ProximalStep
from energynet.solution import Status
from energynet.solvers import Nesterov, Solver
from energynet.solvers.problem import Map
from energynet.step import DampedStep, GradientStep, Kind

B, N = 3, 4
EXACT = Termination(atol=4e-15, rtol=1e-14, max_steps=20_000)  # of a prox that is itself a solve


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    error = (got - expected).detach().norm() / expected.detach().norm().clamp_min(1.0)
    assert error <= tolerance, f"error {float(error):.2e}"


def neighbors(x: Tensor, dims: int) -> list[Tensor]:
    return [x.diff(dim=d) for d in range(-dims, 0)]


def isotropic_variation(x: Tensor) -> Tensor:  # (B, H, W)
    dx = torch.cat((x.diff(dim=-2), 0 * x[:, :1]), -2)
    dy = torch.cat((x.diff(dim=-1), 0 * x[..., :1]), -1)
    return torch.hypot(dx, dy).sum((-1, -2))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A prox, the term h whose prox it is (where it is finite), and its tensors as a function of which it can be made."""

    name: str
    make: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    term: Callable[[Tensor], Tensor] = lambda u: u.new_zeros(u.shape[0])  # (B, ...) -> (B,)
    violation: Callable[[Tensor], Tensor] = lambda u: u.new_zeros(u.shape[0])
    shape: tuple[int, ...] = (B, N)

    @property
    def prox(self) -> Any:
        return self.make(*self.tensors)

    def __str__(self) -> str:
        return self.name


A, RIGHT = randn(2, N, seed=1), randn(2, seed=2)
LOW, HIGH = tensor(-0.5, -0.2, 0.0, 0.3), tensor(0.4, 0.1, 0.8, 0.9)
CASES = [
    Case("box", Box, (LOW, HIGH), violation=lambda u: torch.maximum(LOW - u, u - HIGH).relu().amax(-1)),
    Case("lower", lambda low: Box(lower=low), (LOW,), violation=lambda u: (LOW - u).relu().amax(-1)),
    Case("upper", lambda high: Box(upper=high), (HIGH,), violation=lambda u: (u - HIGH).relu().amax(-1)),
    Case("nonnegative", NonNegative, (), violation=lambda u: (-u).relu().amax(-1)),
    Case("simplex", Simplex, (tensor(0.5, 1.0, 2.0),),
         violation=lambda u: (-u).relu().amax(-1) + (u.sum(-1) - tensor(0.5, 1.0, 2.0)).abs()),
    Case("capped simplex", CappedSimplex, (HIGH, tensor(0.5, 1.0, 2.0)),
         violation=lambda u: torch.maximum(-u, u - HIGH).relu().amax(-1) + (u.sum(-1) - tensor(0.5, 1.0, 2.0)).abs()),
    Case("ball", L2Ball, (tensor(0.3, 1.0, 2.0), LOW),
         violation=lambda u: ((u - LOW).norm(dim=-1) - tensor(0.3, 1.0, 2.0)).relu()),
    Case("l1", L1, (tensor(0.1, 0.2, 0.3, 0.4),), term=lambda u: (u.abs() * tensor(0.1, 0.2, 0.3, 0.4)).sum(-1)),
    Case("group", GroupL2, (tensor(0.3, 0.9),), term=lambda u: (u.norm(dim=-1) * tensor(0.3, 0.9)).sum(-1), shape=(B, 2, 3)),
    Case("affine", Affine, (A, RIGHT), violation=lambda u: (u @ A.mT - RIGHT).norm(dim=-1)),
    Case("variation", lambda w: TotalVariation(w, termination=EXACT), (tensor(0.3),),
         term=lambda u: 0.3 * neighbors(u, 1)[0].abs().sum(-1)),
    Case("images", lambda w: TotalVariation(w, dims=2, termination=EXACT), (tensor(0.2),),
         term=lambda u: 0.2 * isotropic_variation(u), shape=(B, 2, 3)),
    Case("anisotropic", lambda w: TotalVariation(w, dims=2, isotropic=False, termination=EXACT), (tensor(0.2),),
         term=lambda u: 0.2 * sum(d.abs().flatten(1).sum(-1) for d in neighbors(u, 2)), shape=(B, 2, 3)),
]  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES, ids=str)
DIRECT, NESTED = CASES[:10], CASES[10:]
PATIENT = {"l1", "lower", "nonnegative", "group"}  # a solve within these takes many steps
SLOW_WHERE_NESTED = pytest.mark.parametrize(
    "case", [*DIRECT, *(pytest.param(c, marks=pytest.mark.slow) for c in NESTED)], ids=str
)


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(-1)


# ------------------------------------------------------------------------------------------------- by definition


@SLOW_WHERE_NESTED
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1.0, 10.0]), gamma=st.floats(0.1, 3.0))
def test_the_prox_is_what_its_definition_says(case: Case, seed: int, scale: float, gamma: float) -> None:
    """p = prox(x): feasible, and h(u) ≥ h(p) + ⟨x − p, u − p⟩ / γ for all feasible u. Firmly nonexpansive."""
    x, other = scale * randn(*case.shape, seed=seed), scale * randn(*case.shape, seed=seed + 1)
    p, u = case.prox(x, gamma), case.prox(other, gamma)
    assert (case.violation(p) <= 1e-13 * (1 + scale)).all()
    for near in (u, p + 0.01 * (u - p)):
        gap = case.term(near) - case.term(p) - inner(x - p, near - p) / gamma
        assert (gap >= -1e-11 * (1 + scale**2)).all(), gap
    assert (inner(p - u, x - other) - inner(p - u, p - u) >= -1e-11 * (1 + scale**2)).all()


@EACH
def test_a_projection_is_idempotent_and_a_zero_step_changes_nothing(case: Case) -> None:
    x = randn(*case.shape)
    if case.term is Case.__dataclass_fields__["term"].default:
        close(case.prox(case.prox(x, 1.0), 1.0), case.prox(x, 1.0), 1e-14)
    else:
        close(case.prox(x, torch.zeros(B, dtype=torch.float64)), x, 1e-15)


@pytest.mark.filterwarnings("ignore")
def test_the_prox_as_cvxpy_finds_it() -> None:
    cp = pytest.importorskip("cvxpy")
    case = {c.name: c for c in CASES}
    low, high, weights, a, b = (t.numpy() for t in (LOW, HIGH, tensor(0.1, 0.2, 0.3, 0.4), A, RIGHT))
    zero = cp.Constant(0)
    for seed in range(3):
        z = 2 * randn(1, N, seed=seed)
        u = cp.Variable(N)
        for prox, term, limits in [
            (case["box"].prox, zero, [u >= low, u <= high]),
            (Simplex(0.7), zero, [u >= 0, cp.sum(u) == 0.7]),
            (CappedSimplex(tensor(0.4, 0.1, 0.8, 0.9), 1.1), zero, [u >= 0, u <= high, cp.sum(u) == 1.1]),
            (L2Ball(0.7, LOW), zero, [cp.norm(u - low) <= 0.7]),
            (case["l1"].prox, weights @ cp.abs(u), []),
            (GroupL2(0.9), 0.9 * cp.norm(u), []),
            (case["affine"].prox, zero, [a @ u == b]),
            (TotalVariation(0.3), 0.3 * cp.norm1(cp.diff(u)), []),
        ]:
            problem = cp.Problem(cp.Minimize(1.5 * term + 0.5 * cp.sum_squares(u - z[0].numpy())), limits)
            problem.solve(solver="CLARABEL", tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
            close(prox(z, 1.5)[0], torch.from_numpy(u.value), 1e-6)


def test_closed_forms() -> None:
    x = tensor(-2.0, -0.1, 0.5, 3.0)[None]
    close(Box(0.0, 1.0)(x, 1.0), tensor(0, 0, 0.5, 1)[None], 0)
    close(NonNegative()(x, 1.0), tensor(0, 0, 0.5, 3)[None], 0)
    close(L1(2.0)(x, 0.25), tensor(-1.5, 0, 0, 2.5)[None], 0)
    close(L2Ball(2.0, 1.0)(tensor(4.0, 5.0)[None], 1.0), tensor(1 + 1.2, 1 + 1.6)[None], 1e-15)
    close(GroupL2(2.5)(tensor(3.0, 4.0)[None], 1.0), tensor(1.5, 2.0)[None], 1e-15)
    close(Simplex(1.0)(x, 1.0), tensor(0, 0, 0, 1)[None], 0)
    close(Affine(torch.ones(1, 4).double(), tensor(1.0))(x, 1.0), x - (1.4 - 1) / 4, 1e-15)


def test_inactive_cap_and_cap_with_a_single_feasible_point() -> None:
    x = 3 * randn(5, N)
    for radius in (0.0, 0.3, 2.0):
        for upper in (torch.inf, 1e300, max(radius, 1.0)):
            close(CappedSimplex(upper, radius)(x, 1.0), Simplex(radius)(x, 1.0), 1e-15)
    full = CappedSimplex(HIGH, HIGH.sum())(x, 1.0)
    close(full, HIGH.expand_as(x), 1e-15)
    spread = CappedSimplex(0.5)(tensor(1e20, 0.3, 0.1)[None], 1.0)
    close(spread, tensor(0.5, 0.35, 0.15)[None], 1e-15)
    assert CappedSimplex(0.5)(x.half(), 1.0).dtype == torch.float16


def test_the_capped_simplex_against_bisection() -> None:
    """Ties, bounds of zero, and sums that are exactly that of some bounds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64, generator=generator)
    x[::3] = (2 * x[::3]).round()
    upper = torch.rand(500, 6, dtype=torch.float64, generator=generator)
    upper[::2, 0], upper[::4] = 0.0, 0.5
    radius = upper.sum(-1) * torch.rand(500, dtype=torch.float64, generator=generator)
    radius[::4] = torch.where(torch.arange(125) % 2 == 0, 1.5, 0.0).double()
    low, high = (x - upper).amin(-1) - 1, x.amax(-1) + 1
    for _ in range(60):
        middle = (low + high) / 2
        above = torch.minimum((x - middle[:, None]).clamp_min(0), upper).sum(-1) > radius
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    found = CappedSimplex(upper, radius)(x, 1.0)
    close(found, torch.minimum((x - high[:, None]).clamp_min(0), upper), 1e-14 * 500**0.5)
    assert (found >= 0).all() and (found <= upper).all()
    assert ((found.sum(-1) - radius).abs() <= 1e-15).all()


@pytest.mark.parametrize("x", [tensor(1e20, 0.0), tensor(1e200, -1e200), tensor(1e-200, 1e-200), tensor(0.0, 0.0)], ids=str)
def test_extreme_numbers(x: Tensor) -> None:
    close(Simplex()(x, 1.0).sum(), tensor(1.0)[0], 1e-15)
    assert L2Ball()(x, 1.0).norm() <= 1 + 1e-15
    close(L2Ball(2 * x.abs().max())(x, 1.0), x, 0)
    close(GroupL2(1e-300)(x, 1.0), x, 1e-15)


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert torch.equal(L2Ball(2.0)(x, 1.0), torch.ones_like(x))
    assert Box(torch.zeros(4, dtype=torch.float64), 1.0)(x, 1.0).dtype == torch.float16


@EACH
def test_nan_is_not_hidden(case: Case) -> None:
    x = randn(*case.shape)
    x[1] = torch.nan
    result = case.prox(x, 1.0).flatten(1)
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


# ------------------------------------------------------------------------------------------------- derivatives


def with_parts(case: Case) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The prox as a function of x, the step size of each sample, and its own tensors."""
    inputs = (randn(*case.shape, seed=7), 0.7 + 0.1 * torch.arange(B, dtype=torch.float64), *case.tensors)
    return lambda x, gamma, *parts: case.make(*parts)(x, gamma), tuple(t.clone().requires_grad_() for t in inputs)


@pytest.mark.parametrize("case", DIRECT, ids=str)
def test_derivatives_to_second_order(case: Case) -> None:
    function, inputs = with_parts(case)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", NESTED, ids=str)
def test_derivatives_of_total_variation(case: Case) -> None:
    function, inputs = with_parts(dataclasses.replace(case, shape=(B, 2, 2) if case.shape[2:] else (B, 3)))
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("case", DIRECT, ids=str)
def test_the_transforms_of_torch_func(case: Case) -> None:
    x, prox = randn(*case.shape, seed=3), case.prox
    rows = torch.stack([prox(row, 1.0) for row in torch.stack((x, 2 * x, -x))])
    close(torch.func.vmap(lambda x: prox(x, 1.0))(torch.stack((x, 2 * x, -x))), rows, 1e-15)
    reverse = torch.func.jacrev(lambda x: prox(x, 1.0))(x)
    close(torch.func.jacfwd(lambda x: prox(x, 1.0))(x), reverse, 1e-14)
    hessian = torch.func.hessian(lambda x: prox(x, 1.0).square().sum())(x)
    close(hessian, torch.func.jacrev(torch.func.jacrev(lambda x: prox(x, 1.0).square().sum()))(x), 1e-13)
    assert reverse.isfinite().all() and reverse.any()


def test_total_variation_under_torch_func() -> None:
    x, prox = randn(2, 3), TotalVariation(0.3, termination=EXACT)
    reverse = torch.func.jacrev(lambda x: prox(x, 1.0))(x)
    close(torch.func.jacfwd(lambda x: prox(x, 1.0))(x), reverse, 1e-12)
    close(torch.func.vmap(lambda x: prox(x[None], 1.0)[0])(x), prox(x, 1.0), 1e-14)


@pytest.mark.parametrize("prox", [L2Ball(1.0), L2Ball(0.0), GroupL2(0.5), GroupL2(0.0), L1(0.0), L1(0.5), Simplex(0.0)], ids=repr)
def test_no_nan_at_zero_to_second_order(prox: Prox) -> None:
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (first,) = grad(prox(x, 1.0).exp().sum(), x, create_graph=True)
    (second,) = grad(first.square().sum() + 0 * x.sum(), x)
    assert first.isfinite().all() and second.isfinite().all()
    assert torch.func.hessian(lambda x: prox(x, 1.0).exp().sum())(x.detach()).isfinite().all()


@pytest.mark.parametrize("prox", [L2Ball(1.0), L1(0.0), GroupL2(0.0), Box(0.0, 1.0), NonNegative()], ids=repr)
def test_where_a_term_does_nothing_the_derivative_is_the_identity(prox: Prox) -> None:
    x = torch.zeros(1, 3, dtype=torch.float64)
    close(torch.func.jacrev(lambda x: prox(x, 1.0))(x).reshape(3, 3), torch.eye(3).double(), 0)


def test_a_kink_of_the_simplex_has_the_derivative_of_one_side() -> None:
    """Σ x = r on either side, so that Σ dx = dr; with r = 0 there is one side only."""
    for z, radius in ((tensor(1.0, 0.0), 1.0), (tensor(0.3, -2.0), 0.0), (tensor(0.5, 0.5), 0.0), (tensor(2.0, 1.0, 1.0), 1.0)):
        r = tensor(radius).requires_grad_()
        rate = torch.func.jacrev(lambda r, z=z: Simplex(r)(z[None], 1.0)[0])(r).sum()
        close(rate, torch.ones_like(rate), 1e-15)
        x = torch.func.jacrev(lambda z, r=r: Simplex(r)(z[None], 1.0)[0].sum())(z)
        close(x, torch.zeros_like(x), 1e-15)


# ------------------------------------------------------------------------------------------------- per sample, pytrees, errors


@pytest.mark.parametrize(
    "prox",
    [Box(0.0, 1.0), NonNegative(), Simplex(0.0), CappedSimplex(1.0, 0.0), L2Ball(), L1(0.1), GroupL2(0.1), TotalVariation(0.1)],
    ids=repr,
)
def test_empty_samples_and_empty_batches(prox: Prox) -> None:
    for shape in ((2, 0), (0, 3), (0, 0)):
        assert prox(torch.zeros(shape), 1.0).shape == shape
        assert minimize(lambda x: x.square().sum(-1), torch.zeros(shape), prox=prox).value.shape == shape


def test_empty_sets_and_empty_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Simplex.*\(2, 0\), so the set is empty"):
        Simplex()(torch.zeros(2, 0), 1.0)
    with pytest.raises(ValueError, match=r"dims=2.*\(4,\)"):
        TotalVariation(0.1, dims=2)(torch.zeros(4), 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_affine_keeps_a_low_precision(dtype: torch.dtype) -> None:
    plane = Affine(torch.ones(1, 4), torch.ones(1))  # no factorization in half precision exists
    z = torch.linspace(-1, 1, 12).reshape(3, 4)
    x = minimize(lambda x, z: (x - z).square().sum(-1), torch.zeros(3, 4, dtype=dtype), z.to(dtype), prox=plane).value
    assert x.dtype == dtype
    torch.testing.assert_close(x.float(), plane(z, 1.0), rtol=0, atol=0.05)


def test_per_sample_bounds_and_step_sizes_are_those_of_each_sample_alone() -> None:
    x, gamma, weight = randn(B, N), tensor(0.1, 0.5, 1.0), tensor(0.3, 0.6, 0.9)
    for name, prox in {
        "l1": lambda i: L1(weight[i].unsqueeze(-1)),
        "box": lambda i: Box(-weight[i].unsqueeze(-1), weight[i].unsqueeze(-1)),
        "ball": lambda i: L2Ball(weight[i]),
        "simplex": lambda i: Simplex(weight[i]),
        "capped": lambda i: CappedSimplex(0.1 + weight[i].unsqueeze(-1), weight[i]),
        "group": lambda i: GroupL2(weight[i]),
        "variation": lambda i: TotalVariation(weight[i], termination=EXACT),
        "affine": lambda i: Affine(randn(B, 2, N)[i], randn(B, 2)[i]),
    }.items():
        together = prox(slice(None))(x, gamma)
        alone = torch.cat([prox(slice(i, i + 1))(x[i : i + 1], gamma[i : i + 1]) for i in range(B)])
        assert torch.allclose(together, alone, rtol=0, atol=1e-14), name


def test_pytrees_share_a_bound_or_have_their_own() -> None:
    x = {"a": randn(B, N), "b": randn(B, 2, 2)}
    shared = L1(0.2)(x, tensor(0.1, 0.5, 1.0))
    close(shared["b"][2], L1(0.2)(x["b"][2:], 1.0)[0], 1e-15)
    own = Box({"a": -1.0, "b": None}, {"a": 1.0, "b": torch.zeros(2, 2).double()})(x, 1.0)
    close(own["a"], x["a"].clamp(-1, 1), 0)
    close(own["b"], x["b"].clamp(max=0), 0)
    with pytest.raises(ValueError, match="lower ≤ upper"):
        Box(0.0, {"a": 1.0, "b": -1.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(1.0, 0.0), "got lower 1.0 with upper 0.0"),
        (lambda: Box(tensor(0.0, 2.0), tensor(1.0, 1.0)), "got lower 2.0 with upper 1.0"),
        (lambda: Box(float("nan"), 1.0), "lower ≤ upper"),
        (lambda: Simplex(-1.0), "Simplex needs radius ≥ 0, got -1.0"),
        (lambda: CappedSimplex(-1.0), "CappedSimplex needs upper ≥ 0, got -1.0"),
        (lambda: CappedSimplex(1.0, -1.0), "CappedSimplex needs radius ≥ 0, got -1.0"),
        (lambda: CappedSimplex(0.2)(randn(3, 4), 1.0), r"a sum of 1, but the upper bounds sum to 0.8 \(sample 0\)"),
        (lambda: CappedSimplex(tensor(1.0, 0.1)[:, None], 0.5)(randn(2, 4), 1.0), r"sum of 0.5.* sum to 0.4 \(sample 1\)"),
        (lambda: L2Ball(tensor(1.0, -2.0)), "L2Ball needs radius ≥ 0, got -2.0"),
        (lambda: L1(-0.5), "L1 needs weight ≥ 0, got -0.5"),
        (lambda: GroupL2(float("nan")), "GroupL2 needs weight ≥ 0, got nan"),
        (lambda: TotalVariation(-1.0), "TotalVariation needs weight ≥ 0"),
        (lambda: TotalVariation(1.0, dims=0), "dims ≥ 1, got 0"),
        (lambda: Affine(randn(3, 2), randn(3)), r"m ≤ n .* got \(3, 2\) and \(3,\)"),
        (lambda: Affine(randn(2, 3), randn(3)), r"got \(2, 3\) and \(3,\)"),
        (lambda: Affine(torch.ones(2, 3), torch.ones(2)).encode(), "linearly independent rows; one of the 2"),
    ],
)
def test_values_that_make_no_sense(make: Callable[[], Prox], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unreadable_values_under_vmap_raise_no_error() -> None:
    out = torch.func.vmap(lambda low, x: Box(low, 1.0)(x, 1.0))(tensor(0.0, 2.0), tensor(-1.0, 0.5))
    assert out.tolist() == [0.0, 1.0]


# ------------------------------------------------------------------------------------------------- in a solve


def quadratic(x: Tensor, z: Tensor) -> Tensor:  # (B, ...), (B, ...): Hessian diagonal plus a coupling, in [1, 5.2]
    flat, target = x.flatten(1), z.flatten(1)
    n = flat.shape[1]
    scales = torch.linspace(1, 4, n, dtype=x.dtype)
    return 0.5 * (scales * (flat - target).square()).sum(-1) + 0.1 * (flat.sum(-1) / n**0.5 * 2).square()


def solve(case: Case, z: Tensor, *parts: Tensor, solver: Solver | None = None, adjoint: Adjoint | None = None,
          gamma: Any = 0.3, policy: Any = "raise", termination: Termination = TIGHT) -> Solution:  # fmt: skip
    step = ProximalStep(quadratic, gamma, case.make(*parts))
    adjoint = adjoint or ImplicitAdjoint(Anderson(), TIGHT)
    return fixed_point(step, torch.zeros_like(z), z, batch_dims=None, solver=solver or Nesterov(), termination=termination,
                       adjoint=adjoint, on_failure=policy)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "solver"),
    [
        *((case, solver) for case in DIRECT for solver in (Picard(), Anderson(), Nesterov(), Nesterov(restart=False))),
        *(pytest.param(case, Anderson(), marks=pytest.mark.slow) for case in NESTED),
        pytest.param(NESTED[1], Nesterov(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_answer_is_the_minimum_whatever_the_solver(case: Case, solver: Solver) -> None:
    """⟨∇E(x*), u − x*⟩ + h(u) − h(x*) ≥ 0 for all feasible u."""
    z = 1.5 * randn(*case.shape, seed=4)
    x = solve(case, z, *case.tensors, solver=solver).value
    slope = torch.func.grad(lambda x: quadratic(x, z).sum())(x)
    assert (case.violation(x) <= 1e-11).all()
    for seed in range(20):
        u = case.prox(x + 0.3 * randn(*case.shape, seed=seed), 1.0)
        assert (inner(slope, u - x) + case.term(u) - case.term(x) >= -1e-10).all()


@SLOW_WHERE_NESTED
def test_gradients_agree_between_adjoints_and_with_unrolling(case: Case) -> None:
    z = (1.5 * randn(*case.shape, seed=4)).requires_grad_()
    parts = tuple(t.clone().requires_grad_() for t in case.tensors)
    weight = randn(*case.shape, seed=5)
    results, adjoints = [], [ImplicitAdjoint(Anderson(), TIGHT), ImplicitAdjoint(GMRES(), TIGHT)]
    if case not in NESTED:  # where each step is a solve of its own
        adjoints += [ImplicitAdjoint(Picard(), TIGHT), UnrolledAdjoint()]
    for adjoint in adjoints:
        solver = Picard() if isinstance(adjoint, UnrolledAdjoint) else Nesterov()
        x = solve(case, z, *parts, adjoint=adjoint, solver=solver).value
        results.append(grad((weight * x.sin()).sum(), (z, *parts), allow_unused=True))
    for got in results[1:]:
        for g, expected in zip(got, results[0], strict=True):
            assert g is not None and expected is not None
            close(g, expected, 1e-9)


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c.name in PATIENT else c for c in DIRECT], ids=str)
def test_derivatives_of_a_solve_to_second_order(case: Case) -> None:
    z = 1.5 * randn(*case.shape, seed=4)
    inputs = tuple(t.clone().requires_grad_() for t in (z, *case.tensors))
    run = lambda z, *parts: solve(case, z, *parts, adjoint=ImplicitAdjoint(GMRES(), TIGHT)).value  # noqa: E731
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("case", DIRECT, ids=str)
def test_a_solve_under_torch_func(case: Case) -> None:
    z = 1.5 * randn(*case.shape, seed=4)
    reverse = torch.func.jacrev(lambda z: solve(case, z, *case.tensors).value)(z)
    close(torch.func.jacfwd(lambda z: solve(case, z, *case.tensors).value)(z), reverse, 1e-9)
    both = torch.func.vmap(lambda z: solve(case, z, *case.tensors).value)(torch.stack((z, -z)))
    close(both[1], solve(case, -z, *case.tensors).value, 1e-11)


def test_gradients_of_a_captured_bound_and_of_one_that_is_an_input_are_the_same() -> None:
    z, weight = randn(B, N, seed=4).requires_grad_(), tensor(0.1, 0.2, 0.3, 0.4).requires_grad_()

    class Weighted(Prox):
        def encode(self, z: Tensor, weight: Tensor) -> Any:
            return weight.exp().log()  # one tensor for a tuple of one

        def __call__(self, x: Any, step_size: Any, weight: Any) -> Any:
            return L1(weight)(x, step_size)

    step = ProximalStep(lambda x, z, weight: quadratic(x, z), 0.3, Weighted())
    coded = fixed_point(step, torch.zeros_like(z), z, weight, termination=TIGHT, adjoint=ImplicitAdjoint(GMRES(), TIGHT)).value
    own = solve(CASES[7], z, weight).value
    for got, expected in zip(grad(coded.sum(), (z, weight)), grad(own.sum(), (z, weight)), strict=True):
        close(got, expected)


def test_affine_is_factorized_once_and_gradients_reach_its_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the solution of the dense KKT system, to second order."""
    factorize, calls = torch.linalg.qr, []
    monkeypatch.setattr(torch.linalg, "qr", lambda a: calls.append(a.shape) or factorize(a))
    z, matrix, right = (t.clone().requires_grad_() for t in (randn(B, N, seed=4), A, RIGHT))

    def dense(z: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
        hessian = torch.diag(torch.linspace(1, 4, N, dtype=torch.float64)) + 0.2
        top = torch.cat((hessian, matrix.mT), 1)
        kkt = torch.cat((top, torch.cat((matrix, torch.zeros(2, 2).double()), 1)))
        b = torch.cat((torch.linspace(1, 4, N, dtype=torch.float64) * z, right.expand(B, 2)), 1)
        return torch.linalg.solve(kkt, b.mT).mT[:, :N]

    results = []
    for f in (lambda *parts: solve(CASES[9], *parts).value, dense):
        first = grad(f(z, matrix, right).sin().sum(), (z, matrix, right), create_graph=True)
        results.append((*first, *grad(sum(g.square().sum() for g in first), (z, matrix, right))))
    assert calls == [(N, 2)]
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-9)


def test_a_user_prox_and_a_pytree() -> None:
    z = randn(B, N, seed=4).requires_grad_()

    def energy(x: dict[str, Tensor], z: Tensor) -> Tensor:
        return 0.5 * (x["a"] - z).square().sum(-1) + 0.5 * (x["b"] - x["a"] - 1).square().sum(-1)

    def prox(x: dict[str, Tensor], step_size: float) -> dict[str, Tensor]:
        return {"a": NonNegative()(x["a"], step_size), "b": x["b"].clamp(max=0.5)}

    start = {"a": torch.zeros(B, N).double(), "b": torch.zeros(B, N).double()}
    x = fixed_point(ProximalStep(energy, 0.5, prox), start, z, termination=TIGHT, solver=Nesterov(),
                    adjoint=ImplicitAdjoint(Anderson(), TIGHT)).value  # fmt: skip
    both = ((z - 0.5) / 2).relu()  # b ≤ ½ is always active: a minimizes (a − z)² + (a + ½)²
    close(x["a"], both)
    close(x["b"], torch.full((B, N), 0.5).double())
    close(grad(x["a"].sum(), z)[0], 0.5 * (z > 0.5))


def test_step_sizes_and_damping_do_not_change_the_answer_or_its_gradient() -> None:
    z, case = (1.5 * randn(B, N, seed=4)).requires_grad_(), CASES[0]
    expected = solve(case, z, *case.tensors).value
    slope = grad(expected.sin().sum(), z)[0]
    gamma = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    for size in (0.05, gamma, tensor(0.1, 0.2, 0.3)):
        x = solve(case, z, *case.tensors, gamma=size).value
        close(x, expected, 1e-11)
        close(grad(x.sin().sum(), z, retain_graph=True)[0], slope, 1e-9)
    assert grad(solve(case, z, *case.tensors, gamma=gamma).value.sum(), gamma)[0].abs() < 1e-9
    damped = DampedStep(ProximalStep(quadratic, 0.3, case.prox), 0.5)
    x = fixed_point(damped, torch.zeros_like(z), z, termination=TIGHT, adjoint=ImplicitAdjoint(Anderson(), TIGHT)).value
    close(x, expected, 1e-11)


def test_one_problem_without_a_batch_dimension() -> None:
    z = randn(N)
    step = ProximalStep(lambda x, z: (x - z).square().sum(), 0.4, Simplex())
    x = fixed_point(step, torch.zeros(N).double(), z, batch_dims=0, termination=TIGHT).value
    close(x, Simplex()(z, 1.0), 1e-11)


def test_answers_keep_bounds_and_zeros_under_nesterov() -> None:
    z = 1.5 * randn(B, N, seed=4)
    x = solve(CASES[3], z, termination=Termination()).value
    assert (x >= -1e-300).all() and (x.abs() < 1e-300).any()


def test_the_step_says_what_it_is() -> None:
    step = ProximalStep(quadratic, 0.3, NonNegative())
    assert step.kind is Kind.BOUNDED and ProximalStep(quadratic, 0.3, Simplex()).kind is Kind.MAP
    assert not step.symmetric and not step.normalized and step.energy_of is quadratic
    x, z = randn(B, N), randn(B, N, seed=1)
    free = ProximalStep(quadratic, 1e-3, lambda x, step_size: x).optimality(x, (), z)
    close(free, GradientStep(quadratic).optimality(x, z), 1e-12)  # the step size is divided out


# ------------------------------------------------------------------------------------------------- what is no prox


@pytest.mark.parametrize(
    ("prox", "remedy"),
    [
        ((0.0, 1.0), r"got \(0.0, 1.0\). Did you mean Box\(0.0, 1.0\)\?"),
        ([torch.zeros(3), torch.ones(3)], r"Did you mean Box\(lower, upper\)\?"),
        (0, r"got 0. A lower bound is Box\(lower\), or NonNegative\(\)"),
        (torch.zeros(3, 4), r"got a tensor of shape \(3, 4\). A lower bound is Box\(lower\)"),
        (Box, r"got the class Box. Did you mean Box\(...\)\?"),
        ("box", r"got 'box'. Ready-made ones are in energynet.constraints"),
    ],
    ids=str,
)
def test_a_wrong_prox_names_what_was_meant(prox: Any, remedy: str) -> None:
    for call in (
        lambda: minimize(quadratic, torch.zeros(B, N), randn(B, N), prox=prox),
        lambda: FPI_GD(quadratic, prox=prox),
        lambda: FPI_GD(quadratic, 0.1, prox=prox),
        lambda: ProximalStep(quadratic, 0.1, prox),
    ):
        with pytest.raises(TypeError, match=f"prox must be .*{remedy}"):
            call()


# ------------------------------------------------------------------------------------------------- failures


def test_a_tiny_step_size_cannot_fake_convergence() -> None:
    case, z = CASES[0], 1.5 * randn(B, N, seed=4)
    few = Termination(max_steps=50)
    for solver in (Picard(), Nesterov()):
        solution = solve(case, z, *case.tensors, gamma=1e-9, solver=solver, termination=few, policy="ignore")
        assert (solution.status == Status.MAX_STEPS).all() and (solution.error > 0.01).all()


def test_scaling_the_energy_does_not_change_the_residual() -> None:
    z = 1.5 * randn(B, N, seed=4)
    few = Termination(atol=0.0, rtol=0.0, max_steps=7)
    seen = []
    for c in (1.0, 1e6):
        step = ProximalStep(lambda x, z, c=c: c * quadratic(x, z), 0.1 / c, Box(LOW, HIGH))
        seen.append(fixed_point(step, torch.ones_like(z), z, termination=few, solver=Picard(), on_failure="ignore").error)
    close(seen[0], seen[1], 1e-6)


def test_without_a_step_size() -> None:
    step = ProximalStep(quadratic, None, NonNegative())
    with pytest.raises(ValueError, match="step_size"):
        step.optimality(randn(B, N), (), randn(B, N))
    with pytest.raises(ValueError, match="step_size"):
        step(randn(B, N), randn(B, N))


def test_a_bound_larger_than_x_or_a_prox_of_the_wrong_shape() -> None:
    for prox in (Box(torch.zeros(2, B, N).double()), lambda x, step_size: x[:, :2], lambda x, step_size: (x, x)):
        with pytest.raises(ValueError, match=r"shapes of x, \[\(3, 4\)\], but returned \[\("):
            fixed_point(ProximalStep(quadratic, 0.3, prox), torch.zeros(B, N).double(), randn(B, N))


def test_a_prox_that_captures_a_derivative() -> None:
    weight = tensor(0.1, 0.2, 0.3, 0.4).requires_grad_()
    with pytest.raises(LostGradientError, match="from outside that requires grad"):
        step = ProximalStep(quadratic, 0.3, lambda x, step_size: x - weight)
        fixed_point(step, torch.zeros(B, N).double(), randn(B, N))


def test_a_step_size_that_is_too_large_diverges_or_runs_out_of_steps() -> None:
    with pytest.raises(ConvergenceError):
        solve(CASES[7], randn(B, N), *CASES[7].tensors, gamma=2.0, solver=Picard(), termination=Termination())


def test_one_bad_sample_does_not_spoil_the_others() -> None:
    case, z = CASES[0], (1.5 * randn(B, N, seed=4)).requires_grad_()
    bad = torch.where(torch.arange(B)[:, None] == 1, torch.nan, z)
    parts = tuple(t.clone().requires_grad_() for t in case.tensors)
    with pytest.warns(ConvergenceWarning, match="1 of 3 samples"):
        solution = solve(case, bad, *parts, policy="warn")
    good = [0, 2]
    close(solution.value[good], solve(case, z, *parts).value[good], 1e-11)
    shared = grad(solution.value[good].sum(), parts)
    expected = grad(solve(case, z, *parts).value[good].sum(), parts)
    for got, e in zip(shared, expected, strict=True):
        close(got, e, 1e-10)


def test_total_variation_that_does_not_converge_is_nan() -> None:
    result = TotalVariation(10.0, termination=Termination(max_steps=2))(torch.stack((randn(20), torch.zeros(20).double())), 1.0)
    assert result[0].isnan().all() and not result[1].any()


# ------------------------------------------------------------------------------------------------- Nesterov


def valley(x: Tensor, z: Tensor) -> Tensor:  # condition 300
    return 0.5 * (torch.logspace(-2.5, 0, N, dtype=x.dtype) * (x - z).square()).sum(-1)


@pytest.mark.slow
def test_nesterov_is_faster_than_descent_and_restarting_than_not() -> None:
    z = randn(B, N)
    steps = []
    for solver in (Picard(), Nesterov(restart=False), Nesterov()):
        solution = minimize(valley, torch.zeros(B, N).double(), z, step_size=1.0, solver=solver,
                            termination=Termination(atol=1e-6, rtol=0.0, max_steps=30_000))  # fmt: skip
        close(solution.value, z, 1e-5)
        steps.append(int(solution.num_steps.amax()))
    assert steps[0] > 10 * steps[2] and steps[1] > 2 * steps[2], steps


def test_nesterov_refuses_linear_equations() -> None:
    with pytest.raises(TypeError, match="Nesterov cannot solve"):
        minimize(valley, torch.zeros(B, N).double(), randn(B, N), step_size=1.0, adjoint=ImplicitAdjoint(Nesterov()))


def test_nesterov_is_fista() -> None:
    """Step by step against the textbook, Beck and Teboulle (2009)."""
    z, step, solver = randn(1, N), ProximalStep(quadratic, 0.25, L1(0.3)), Nesterov(restart=False)
    problem = Map(lambda x: step.optimality(x, (), z), step_size=step.step_size)
    x = y = got = torch.zeros(1, N).double()
    state, t = solver.init(problem, got), 1.0
    for _ in range(8):
        before, x = x, step(y, z)
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y, t = x + (t - 1) / following * (x - before), following
        got, state = solver.update(problem, got, state)
        close(got, y, 1e-14)


class Printing(Energy):
    """Says when it encodes."""

    def encode(self, z: Tensor) -> Tensor:
        print("encoded")
        return 2 * z

    def evaluate(self, x: Tensor, code: Tensor) -> Tensor:
        return (x - code).square().sum(-1)


@pytest.mark.parametrize("solver", [None, Nesterov(), Picard()], ids=repr)
def test_the_energy_is_encoded_once_per_solve(solver: Solver | None, capsys: pytest.CaptureFixture[str]) -> None:
    z = torch.tensor([[0.1, 3.0]], dtype=torch.float64)
    x = minimize(Printing(), torch.zeros_like(z), z, prox=Box(0.0, 1.0), solver=solver).value
    torch.testing.assert_close(x, torch.tensor([[0.2, 1.0]], dtype=torch.float64))
    assert capsys.readouterr().out.count("encoded") == 1


@pytest.mark.parametrize("wrong", ["1", [1.0, "a"], True, numpy.ones(3), numpy.float32(1), L1])
def test_an_argument_is_a_number_or_a_tensor(wrong: Any) -> None:
    for make, name in ((L1, "weight"), (GroupL2, "weight"), (L2Ball, "radius"), (Simplex, "radius"), (CappedSimplex, "upper"),
                       (Box, "lower"), (lambda upper: Box(0.0, upper), "upper")):  # fmt: skip
        with pytest.raises(TypeError, match=f"needs {name} to be a number, a tensor or a pytree of such, got"):
            make(wrong)
    with pytest.raises(TypeError, match="Affine needs tensors as its matrix and right-hand side, got list and list"):
        Affine([[1.0, 0.0]], [1.0])
    assert L1(numpy.float64(0.5))(torch.ones(1, 2), 1.0).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("prox", [Box([0.0], [1.0]), L1([0.1]), L2Ball({"a": 1.0})], ids=repr)
def test_a_pytree_of_arguments_does_not_fit_a_tensor(prox: Prox) -> None:
    with pytest.raises(TypeError, match=r"x is one tensor, so each argument of its prox must be a number or a tensor"):
        minimize(lambda x: (x - 1).square().sum(-1), torch.zeros(2, 3), prox=prox)

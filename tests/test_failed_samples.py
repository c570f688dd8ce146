"""Failed samples: what they leave alone, what is NaN, and that no value of theirs or of the others can fool it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import TIGHT
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    FPI_NN,
    ConvergenceWarning,
    Energy,
    ImplicitAdjoint,
    NeumannAdjoint,
    OneStepAdjoint,
    Picard,
    Status,
    Termination,
    fixed_point,
    implicit,
    minimize,
)

NAN = torch.nan
OPTIONS: dict[str, Any] = {"on_failure": "ignore", "termination": TIGHT}


def double(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def square(x: Tensor) -> Tensor:
    return x.square().sum(-1)


class Product(Energy):
    """½‖x − z W‖², the product made by `encode`."""

    def encode(self, z: Tensor, W: Tensor) -> Tensor:
        return z @ W

    def evaluate(self, x: Tensor, c: Tensor) -> Tensor:
        return 0.5 * square(x - c)


def test_a_shared_matrix_with_as_many_rows_as_samples_in_an_encoder() -> None:
    W = torch.arange(9.0, dtype=torch.float64).reshape(3, 3).requires_grad_()
    z = torch.ones(3, 3, dtype=torch.float64)
    z[0] = NAN
    z.requires_grad_()
    found = minimize(Product(), torch.zeros(3, 3, dtype=torch.float64), z, W, **OPTIONS)
    assert found.status.tolist() == [Status.NONFINITE, Status.CONVERGED, Status.CONVERGED]
    torch.testing.assert_close(found.value[1:], double([9, 12, 15], [9, 12, 15]))
    dz, dW = torch.autograd.grad(found.value[1:, 0].sum(), (z, W))  # x = z W
    torch.testing.assert_close(dW, double([2, 0, 0], [2, 0, 0], [2, 0, 0]))
    torch.testing.assert_close(dz, double([NAN] * 3, [0, 3, 6], [0, 3, 6]), equal_nan=True)


class Missing(Energy):
    """Missing values count for nothing: x = z / 2 where z is there, else 0."""

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.nan_to_num(), (~z.isnan()).to(z)

    def evaluate(self, x: Tensor, z: Tensor, there: Tensor) -> Tensor:
        return (there * (x - z).square()).sum(-1) + square(x)


@pytest.mark.parametrize("policy", ["raise", "warn", "ignore"])
def test_no_policy_changes_an_answer(policy: Any) -> None:
    z = double([1, 2], [NAN, 2], [torch.inf, 1]).requires_grad_()
    rows = slice(2 if policy == "raise" else 3)
    start = torch.full((3, 2), 0.3, dtype=torch.float64)[rows]
    with pytest.warns(ConvergenceWarning) if policy == "warn" else pytest.MonkeyPatch.context():
        found = minimize(Missing(), start, z[rows], on_failure=policy, termination=TIGHT)
    assert found.status[:2].tolist() == [Status.CONVERGED] * 2
    torch.testing.assert_close(found.value[:2], double([0.5, 1], [0, 1]))
    (gradient,) = torch.autograd.grad(found.value[:2].sum(), z)
    torch.testing.assert_close(gradient[:2], double([0.5, 0.5], [0, 0.5]))


def test_a_failed_sample_whose_row_equals_a_good_one() -> None:
    b, z = torch.zeros(2, dtype=torch.float64, requires_grad=True), double([1, NAN], [1, 1])
    found = minimize(lambda x, z, b: square(x - z - b), torch.zeros_like(z), z, b, **OPTIONS)
    torch.testing.assert_close(torch.autograd.grad(found.value[1].sum(), b)[0], double(1, 1).flatten())


@pytest.mark.parametrize("there", [True, False])
def test_a_residual_of_zero(there: bool) -> None:
    A, weights = double([1, 0], [0, 1], [1, 1], [1, -1]), double(1, 2, 4, 8).flatten()
    x = double([1, 2], [2, 1], [1, 1], [0, 3])
    y = x @ A.T
    y[0] = NAN
    y.requires_grad_()
    energy: Callable[..., Tensor] = lambda x, y, w: (w * (x @ A.T - y).square()).sum(-1)  # noqa: E731
    found = minimize(energy, x if there else torch.zeros_like(x), y, weights, **OPTIONS)
    (gradient,) = torch.autograd.grad(found.value[1, 0], y)
    weighted = A.T * weights
    expected = torch.zeros_like(y)
    expected[0], expected[1] = NAN, torch.linalg.solve(weighted @ A, weighted)[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12, equal_nan=True)


def fails_where_negative(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return (0.5 * w * z.sqrt() * x.square() - x * z).sum(-1)


def solved_by_minimize(z: Tensor, w: Tensor, **options: Any) -> Tensor:
    return minimize(fails_where_negative, torch.ones_like(z), z, w, **options).value


def solved_by_fixed_point(z: Tensor, w: Tensor, **options: Any) -> Tensor:
    return fixed_point(lambda x, z, w: 0.5 * x + 0.5 * z.sqrt() / w, torch.ones_like(z), z, w, **options).value


def solved_by_implicit(z: Tensor, w: Tensor, **options: Any) -> Tensor:
    condition = lambda x, z, w: x - z.sqrt() / w  # noqa: E731
    return implicit(lambda z, w: z.sqrt() / w, condition, batch_dims=1, **options)(z, w)


def solved_by_layers(z: Tensor, w: Tensor, **options: Any) -> Tensor:
    layer = FPI_GD(fails_where_negative, 0.3, start=lambda z, w: torch.ones_like(z), **options)
    assert isinstance(FPI_NN(lambda x: x), nn.Module)
    return layer(z, w)


ENTRIES = [solved_by_minimize, solved_by_fixed_point, solved_by_implicit, solved_by_layers]


@pytest.mark.parametrize("solve", ENTRIES)
def test_no_entry_point_affects_other_samples(solve: Callable[..., Tensor]) -> None:
    """x = √z / w, where z ≥ 0."""
    z = double([4, 1], [-1, 1], [9, 4]).requires_grad_()
    w = double(1, 2).flatten().requires_grad_()
    x = solve(z, w, **OPTIONS)
    good = [0, 2]
    torch.testing.assert_close(x[good], z[good].sqrt() / w)
    dz, dw = torch.autograd.grad(x[good].sum(), (z, w), create_graph=True)
    torch.testing.assert_close(dw, -z[good].sqrt().sum(0) / w.square())
    torch.testing.assert_close(dz[good], 0.5 / z[good].sqrt() / w)
    assert dz[1].isnan().all()
    (second,) = torch.autograd.grad(dw.sum(), w)
    torch.testing.assert_close(second, 2 * z[good].sqrt().sum(0) / w**3)


@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), OneStepAdjoint(), NeumannAdjoint(3)], ids=repr)
@pytest.mark.parametrize("encoded", [True, False])
def test_all_gradients_are_nan_if_every_sample_failed(encoded: bool, adjoint: Any) -> None:
    class Scaled(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2, dtype=torch.float64)
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def encode(self, z: Tensor) -> Any:
            return self.net(z) if encoded else (z,)

        def evaluate(self, x: Tensor, c: Tensor) -> Tensor:
            return (self.w * (x - c).square()).sum(-1) * torch.where(c.isfinite().all(-1), NAN, 1.0)

    energy, z = Scaled(), torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="Every sample failed, so every gradient is NaN"):
        x = minimize(energy, x0, z, step_size=0.3, on_failure="warn", adjoint=adjoint).value
    wanted = [energy.w, z, *(energy.net.parameters() if encoded else ())]
    for gradient in torch.autograd.grad(x.sum(), wanted):
        assert gradient.isnan().all()
    found = torch.func.vmap(torch.func.grad(lambda z: minimize(energy, x0, z, **OPTIONS).value.sum()))(z.detach().expand(2, 3, 2))
    assert found.isnan().all()


def test_samples_that_depend_on_one_another_have_no_derivative_once_one_fails() -> None:
    z = double([1, 1], [-1, 2], [2, 2]).requires_grad_()
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def energy(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return fails_where_negative(x, z, w) + square(x - z.mean(0))

    with pytest.warns(ConvergenceWarning) as seen:
        found = minimize(energy, torch.zeros_like(z), z, w, on_failure="warn")
    assert "cannot be separated from the others, so every gradient is NaN" in str(seen[-1].message)
    assert found.status.tolist() == [0, Status.NONFINITE, 0]
    for gradient in torch.autograd.grad(found.value[0].sum(), (z, w)):
        assert gradient.isnan().all()


@pytest.mark.parametrize("mixing", [False, True])
def test_captured_numbers_per_sample(mixing: bool) -> None:
    """The weights in a closure are those of this many samples only."""
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    z = double([1, 1], [-1, 2], [2, 2]).requires_grad_()
    w = double([1, 2], [0, 1]).requires_grad_()

    def energy(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        others = square(x - z.mean(0)) if mixing else 0
        return (weights * square(x - torch.where(z > 0, z, NAN) @ w) + others) / len(x)

    found = minimize(energy, torch.zeros_like(z), z, w, **OPTIONS)
    assert found.status.tolist() == [0, Status.NONFINITE, 0]
    dz, dw = torch.autograd.grad((weights * found.value[:, 0]).sum(), (z, w))
    if mixing:
        assert dz.isnan().all() and dw.isnan().all()
    else:  # x = z w
        torch.testing.assert_close(dz, double([1, 0], [NAN, NAN], [3, 0]), equal_nan=True)
        torch.testing.assert_close(dw, double([7, 0], [7, 0]))


class Mixing(Energy):
    """BatchNorm before the solve, whose statistics are made of all samples, and whose buffers nobody may change twice."""

    def __init__(self, front: nn.Module) -> None:
        super().__init__()
        self.front = front.double()

    def encode(self, z: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        return self.front(z), sign

    def evaluate(self, x: Tensor, c: Tensor, sign: Tensor) -> Tensor:
        return 0.5 * sign * square(x - c)


@pytest.mark.parametrize("front", [nn.BatchNorm1d(3), nn.Dropout(0.5)], ids=repr)
def test_an_encoder_that_mixes_samples_or_is_random(front: nn.Module) -> None:
    energy = Mixing(front)
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sign = double(1, 1, -1, 1).flatten()  # unbounded below
    state = torch.get_rng_state()
    found = minimize(energy, torch.zeros_like(z), z, sign, **OPTIONS)
    torch.set_rng_state(state)
    plain = copy.deepcopy(front)(z)
    if isinstance(front, nn.BatchNorm1d):
        assert int(front.num_batches_tracked) == 1  # of encode, once
    good = [0, 1, 3]
    torch.testing.assert_close(found.value[good], plain[good])
    assert found.status.tolist() == [0, 0, Status.DIVERGED, 0]
    dz = torch.autograd.grad(found.value[good].square().sum(), z, retain_graph=True)[0]
    assert dz.isnan().all()  # which rows are the failed sample's own, nobody can tell
    if isinstance(front, nn.BatchNorm1d):
        got = torch.autograd.grad(found.value[good].sum(), front.bias)[0]
        torch.testing.assert_close(got, double(3, 3, 3).flatten())


def test_a_table_of_parameters_with_a_row_per_sample() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.target = nn.Parameter(double([1, 2], [3, 4], [5, 6]))
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return (0.5 * self.w * (x - self.target).square()).sum(-1) + 0.5 * square(x - z)

    table, z = Table(), double([0, 0], [NAN, 0], [0, 0])
    x = minimize(table, torch.zeros_like(z), z, **OPTIONS).value
    target, w = torch.autograd.grad(x[[0, 2]].sum(), (table.target, table.w))
    torch.testing.assert_close(target, double([0.5, 0.5], [NAN, NAN], [0.5, 0.5]), equal_nan=True)
    torch.testing.assert_close(w, double(1.5, 2).flatten())  # ∂/∂w of w t / (1 + w) is t / 4


def test_a_sample_that_fails_in_the_adjoint_only() -> None:
    """½ z x² + |x|^1.5 has an infinite second derivative at x = 0, where sample 1 ends."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    z = double([1], [0], [2]).requires_grad_()
    energy: Callable[..., Tensor] = lambda x, z, w: (w * 0.5 * x.square() + x.abs().pow(1.5) - z * x).sum(-1)  # noqa: E731
    found = minimize(energy, double([1], [0], [1]), z, w, **OPTIONS)
    assert found.status.tolist() == [0, 0, 0]
    dz, dw = torch.autograd.grad(found.value.sum(), (z, w))
    good = [0, 2]
    root = found.value[good].detach().sqrt()  # w x + 1.5 √x = z
    slope = 1 + 0.75 / root
    torch.testing.assert_close(dz[good], 1 / slope, rtol=1e-9, atol=0)
    torch.testing.assert_close(dw, -(root.square() / slope).sum(), rtol=1e-9, atol=0)
    assert dz[1].isnan().all()


def test_the_gradient_of_a_network_in_front_is_nan_and_in_an_encoder_it_is_not() -> None:
    net = nn.Linear(2, 2, dtype=torch.float64)
    z, sign = torch.ones(3, 2, dtype=torch.float64), double(1, -1, 1).flatten()

    class Behind(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def encode(self, z: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(z), sign

        def evaluate(self, x: Tensor, c: Tensor, sign: Tensor) -> Tensor:
            return 0.5 * sign * square(x - c)

    inside = minimize(Behind(), torch.zeros_like(z), z, sign, **OPTIONS).value[[0, 2]].sum()
    torch.testing.assert_close(torch.autograd.grad(inside, net.bias)[0], double(2, 2).flatten())
    energy: Callable[..., Tensor] = lambda x, c, sign: 0.5 * sign * square(x - c)  # noqa: E731
    with pytest.warns(ConvergenceWarning, match="NaN, and so is that of every weight in front of the solve"):
        before = minimize(energy, torch.zeros_like(z), net(z), sign, on_failure="warn").value[[0, 2]].sum()
    assert torch.autograd.grad(before, net.bias)[0].isnan().all()


def test_the_steps_of_the_solver_do_not_matter() -> None:
    z = double([4, 1], [-1, 1], [9, 4])
    options: dict[str, Any] = {**OPTIONS, "solver": Picard(), "step_size": 0.2, "termination": Termination(rtol=1e-10)}
    x = minimize(fails_where_negative, torch.ones_like(z), z, torch.ones(2, dtype=torch.float64), **options).value
    torch.testing.assert_close(x[[0, 2]], z[[0, 2]].sqrt(), rtol=1e-8, atol=0)

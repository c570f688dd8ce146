"""Which tensors have one row per sample, by whether a function commutes with choices of samples."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from energynet.engine.row_inputs import roles

F = torch.nn.functional
RANDOM = torch.Generator().manual_seed(0)
X, Z = torch.randn(2, 16, 5, dtype=torch.float64, generator=RANDOM)
A, ROWS = torch.randn(16, 5, dtype=torch.float64, generator=RANDOM), torch.zeros(16, dtype=torch.float64)
ZERO, POSITIVE = torch.zeros(16, 5, dtype=torch.float64), Z.abs() + 0.1


def gradients(energy: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    def function(tensors: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            x = tensors[0].detach().requires_grad_()
            return [torch.autograd.grad(energy(x, *tensors[1:]).sum(), x)[0]]

    return function


def square(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def inputs(energy: Callable[..., Tensor], *tensors: Tensor, good: Tensor | None = None) -> list[bool | None] | None:
    good = torch.ones(len(tensors[0]), dtype=torch.bool) if good is None else good
    found = roles(gradients(energy), tensors, [True], good, fixed=[0])
    return None if found is None else found[1:]


@pytest.mark.parametrize(("energy", "tensors", "expected"), [
    (lambda x, z: square(x - z), (X, Z), [True]),
    (lambda x, A, b: square(x @ A.T - b), (X, A, Z @ A.T), [False, True]),  # A has 16 rows as well
    (lambda x, z, A, b: square(x - z) + square(torch.relu(x @ A.T - b)), (X, Z, A, ROWS), [True, False, False]),
    (lambda x, z, A, b: square(x - z) + square(torch.relu(x @ A.T - b)), (X, Z, A, ROWS + 1e4), [True, None, None]),
    (lambda x, keys: square(x) - torch.logsumexp(x @ keys.T, -1), (X, Z), [False]),  # the batch as a memory of all
    (lambda x, z, w: (w * (x - z).cosh()).sum(-1), (X, Z, Z[0]), [True, False]),
    (lambda x, k, W: F.cross_entropy(x @ W.T, k, reduction="none"), (X, torch.arange(16) % 3, A[:3]), [True, False]),
    (lambda x, k, W: F.cross_entropy(x @ W.T, k, reduction="none"), (X, torch.zeros(16).long(), A[:3]), [True, False]),
    (lambda x, mask, z: (mask * (x - z).square()).sum(-1), (X, Z > 0, Z), [True, True]),
    (lambda x, z: (x - z * x.log()).sum(-1), (POSITIVE, POSITIVE), [True]),
    (lambda x, z: -((1 - x).log() + z * x.log()).sum(-1), (POSITIVE / 4, POSITIVE), [True]),  # 0 < x < 1
    (lambda x, z: F.mse_loss(x, z, reduction="none").sum(-1), (X, Z), [True]),
    (lambda x, S: square((torch.linalg.cholesky(S) @ x.unsqueeze(-1)).squeeze(-1)), (X, torch.eye(5).double().expand(16, 5, 5)),
     [True]),
])  # fmt: skip
def test_rows_and_what_is_shared(energy: Callable[..., Tensor], tensors: tuple[Tensor, ...], expected: list[bool | None]) -> None:
    assert inputs(energy, *tensors) == expected


@pytest.mark.parametrize(("energy", "tensors"), [
    (lambda x, z: square(x - (z - z.mean(0))), (X, Z)),
    (lambda x, z: square(x - (z - z.mean(0))), (X, ZERO)),
    (lambda x, z, gate: square(x - gate * (z - z.mean(0))), (X, Z, torch.zeros((), dtype=torch.float64))),
    (lambda x, z, gate: square(x - torch.where(gate, z - z.mean(0), z)), (X, Z, torch.tensor(False))),
    (lambda x, z: square(x - z - torch.relu(z.mean(0) - 10)), (X, Z)),
    (lambda x, z: square(x - z) / len(x), (X, Z)),
    (lambda x: square(x.reshape(16, 5) - 1), (X,)),
    (lambda x: square(x - Z), (X,)),  # from a closure
    (lambda x, z: square(x - z) + 0 * x.amax(), (X, X * torch.nan)),
])  # fmt: skip
def test_samples_that_cannot_be_told_apart(energy: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
    assert inputs(energy, *tensors) is None


def test_values_that_fool_a_look_at_the_present_ones() -> None:
    nan, good = torch.tensor([torch.nan, 1.0], dtype=torch.float64), torch.tensor([False, True])
    z, b = torch.stack([nan, nan.nan_to_num(1.0)]), torch.zeros(2, dtype=torch.float64)
    assert inputs(lambda x, z, b: square(x - z - b), z, z, b, good=good) == [True, False]  # equal rows, as many as columns
    y = (X @ A[:, :].T).clone()  # a residual of zero
    y[0] = torch.nan
    good = torch.arange(16) > 0
    weights = torch.linspace(1, 2, 16, dtype=torch.float64)
    assert inputs(lambda x, y, w, A: (w * (x @ A.T - y).square()).sum(-1), X, y, weights, A, good=good) == [True, False, False]
    assert inputs(lambda x, z: square(x - z), X, Z, good=torch.zeros(16, dtype=torch.bool)) is None  # none to take values from


def test_functions_whose_results_are_shared() -> None:
    def encode(tensors: list[Tensor]) -> list[Tensor]:
        z, W, _ = tensors
        return [z @ W, W.T @ W]

    everyone = torch.ones(5, dtype=torch.bool)
    z, W = Z[:5], A[:5]
    assert roles(encode, (z, W, W), [True, False], everyone) == [True, False, None]
    assert roles(encode, (z, W, W), [True, None], everyone) == [True, False, None]
    assert roles(lambda t: [t[0] - t[0].mean(0)], (z,), [True], everyone) is None
    assert roles(lambda t: [t[0] + 1], (z,), [False], everyone) == [False]  # all of its rows are everyone's

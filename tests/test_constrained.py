"""Constrained quadratic problems against their conditions of optimality and against cvxpylayers."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from energynet.experiments.constrained import (
    CONSTRAINTS,
    Constrained,
    ConstrainedOptions,
    CvxpyLayers,
    DoublyStochastic,
    ProjectedFPI,
)

SMALL = ConstrainedOptions(problem="box", unknowns=4, rows=4, updates=20, every=10)


def loaded(problem: Any, unknowns: int = 4) -> tuple[Constrained, Any]:
    task = Constrained(replace(SMALL, problem=problem, unknowns=unknowns))
    return task, task.load(None)


def test_projection_onto_relaxed_permutations_meets_its_conditions() -> None:
    """x is in the set, and y − x has no larger product with any permutation than with x; the best is one."""
    y = 2 * torch.randn(20, 9, dtype=torch.float64)
    x = DoublyStochastic()(y, 1.0)
    square = x.reshape(20, 3, 3)
    assert float(x.min()) >= 0
    torch.testing.assert_close(square.sum(1), torch.ones(20, 3, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(square.sum(2), torch.ones(20, 3, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    eye = torch.eye(3, dtype=torch.float64)
    permutations = torch.stack([eye[list(order)].flatten() for order in itertools.permutations(range(3))])  # (6, 9)
    gain = (y - x) @ permutations.T - ((y - x) * x).sum(1, keepdim=True)
    assert float(gain.max()) < 1e-10


def test_projection_keeps_permutations_and_has_right_derivatives() -> None:
    permutation = torch.eye(3, dtype=torch.float64)[[2, 0, 1]].flatten()[None]
    torch.testing.assert_close(DoublyStochastic()(5 * permutation, 1.0), permutation, rtol=1e-12, atol=1e-12)
    y = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: DoublyStochastic()(y, 1.0), y, eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("problem", ["box", "simplex"])
def test_answers_are_fixed_points_of_projected_steps_and_some_bounds_are_active(problem: str) -> None:
    task, data = loaded(problem)
    model = ProjectedFPI().build(task.size(data))
    with torch.no_grad():
        x = model(data.train.inputs)
        matrix, right = model.energy.encode(data.train.inputs)
        again = CONSTRAINTS[problem].prox(x - 0.1 * (x @ matrix - right), 0.1)
    torch.testing.assert_close(x, again, rtol=0, atol=1e-7)
    assert 0 <= task.evaluate(data.train.targets, data.train, {})["active"] < 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("problem", ["box", "simplex", "matching"])
def test_solutions_and_gradients_are_those_of_cvxpylayers(problem: str) -> None:
    pytest.importorskip("cvxpylayers")
    task, data = loaded(problem)
    size, found = task.size(data), list[tuple[Tensor, tuple[Tensor, ...]]]()
    for rival in (ProjectedFPI(), CvxpyLayers()):
        torch.manual_seed(0)
        model = rival.build(size)
        x = model(data.train.inputs)
        found.append((x.detach(), torch.autograd.grad(task.loss(x, data.train), list(model.parameters()))))
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for mine, other in zip(gradients, expected, strict=True):
        assert float((mine - other).norm() / other.norm()) < 1e-5


def test_parameters_are_learned_end_to_end() -> None:
    task, data = loaded("simplex")
    model = ProjectedFPI().build(task.size(data))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        loss = task.loss(model(data.train.inputs), data.train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert task.better(0.1, 0.2) and not task.better(0.2, 0.1)


@pytest.mark.filterwarnings("ignore")
def test_cvxpylayers_answers_without_gradients_too() -> None:
    pytest.importorskip("cvxpylayers")
    task, data = loaded("box")
    model = CvxpyLayers().build(task.size(data))
    torch.testing.assert_close(task.predict(model, data.train), model(data.train.inputs).detach())

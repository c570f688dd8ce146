"""Kept answers: found again, bounded, of converged samples only, and worth keeping."""

import copy
import io
import pickle
import threading
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from energynet import FPI_GD, Solution, Status, Termination, WarmStart
from energynet.energies import ConvexNetwork, StronglyConvex


def solution(value: object, status: list[int] | None = None) -> Solution:
    first = value["a"] if isinstance(value, dict) else value
    status = status or [Status.CONVERGED] * len(first)
    zeros = torch.zeros(len(first))
    return Solution(value, torch.tensor(status, dtype=torch.int8), zeros, zeros.int())


def test_answers_are_found_again_and_the_default_fills_the_rest() -> None:
    cache, x = WarmStart(), torch.randn(3, 2, requires_grad=True)
    cache.store(torch.tensor([5, 9, 2]), solution(2 * x))
    default = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    got = cache.start([2, 7, 5, 2], default)
    assert not got.requires_grad and got.dtype == torch.float64 and not default.any()
    expected = 2 * torch.stack([x[2], torch.zeros(2), x[0], x[2]])
    torch.testing.assert_close(got, expected.detach().double())
    assert len(cache) == 3 and 9 in cache and 7 not in cache


def test_what_is_stored_and_returned_is_nobody_elses_memory() -> None:
    cache, x = WarmStart(), torch.ones(2, 1)
    cache.store([0, 1], solution(x))
    x.fill_(5.0)
    cache.start([0, 1], x).fill_(7.0)
    assert cache.start([0, 1], x).tolist() == [[1.0], [1.0]]


def test_only_converged_samples_are_stored_and_the_last_of_equal_numbers() -> None:
    cache = WarmStart()
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    cache.store([0, 1, 0, 2], solution(x, [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED, Status.MAX_STEPS]))
    assert len(cache) == 1 and cache.start([0, 1, 2], torch.zeros(3, 1)).flatten().tolist() == [3.0, 0.0, 0.0]
    cache.store([0], solution(torch.full((1, 1), torch.nan), [Status.DIVERGED]))
    assert cache.start([0], torch.zeros(1, 1)).item() == 3.0


def test_capacity_keeps_those_stored_last() -> None:
    cache = WarmStart(capacity=3)
    for number in (1, 2, 3, 1, 4):
        cache.store([number], solution(torch.full((1, 1), float(number))))
    assert [n in cache for n in (1, 2, 3, 4)] == [True, False, True, True]
    assert cache.start([1, 2, 3, 4], torch.zeros(4, 1)).flatten().tolist() == [1.0, 0.0, 3.0, 4.0]
    cache.store(range(10, 20), solution(torch.arange(10.0, 20.0)[:, None]))
    assert len(cache) == 3 and cache.start([17, 18, 19, 16], torch.zeros(4, 1)).flatten().tolist() == [17.0, 18.0, 19.0, 0.0]
    assert len(cache.state_dict()["answers"][0]) == 3


def test_pytrees() -> None:
    cache = WarmStart(device=torch.device("cpu"))
    value = {"a": torch.randn(2, 3), "b": (torch.randn(2), torch.randn(2, 1, 2, dtype=torch.float64))}
    cache.store([3, 4], solution(value))
    got = cache.start([4, 3], {"a": torch.zeros(2, 3), "b": (torch.zeros(2), torch.zeros(2, 1, 2, dtype=torch.float64))})
    assert torch.equal(got["a"], value["a"].flip(0)) and torch.equal(got["b"][1], value["b"][1].flip(0))


def test_copies_pickles_and_checkpoints_hold_the_answers() -> None:
    cache = WarmStart(capacity=5)
    cache.store(range(5), solution(torch.randn(5, 2)))
    cache.store([0], solution(torch.randn(1, 2)))  # now the last to go
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    loaded, small = WarmStart(), WarmStart(capacity=2)
    state = torch.load(file, weights_only=True)
    loaded.load_state_dict(state)
    small.load_state_dict(state)
    expected = cache.start(range(5), torch.zeros(5, 2))
    for other in (loaded, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(other.start(range(5), torch.zeros(5, 2)), expected)
    assert len(small) == 2 and 0 in small and 4 in small
    loaded.store([0], solution(torch.zeros(1, 2)))
    assert torch.equal(cache.start(range(5), torch.zeros(5, 2)), expected)


@pytest.mark.parametrize("index", [[1], torch.tensor(1), torch.tensor([0.5, 1.5]), torch.zeros(2, 1, dtype=torch.int64)])
def test_an_index_that_numbers_no_samples_is_told(index: object) -> None:
    with pytest.raises(ValueError, match="one whole number per sample"):
        WarmStart().start(index, torch.zeros(2, 1))


def test_other_shapes_and_no_capacity_are_told() -> None:
    cache = WarmStart()
    cache.store([0], solution(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match=r"\[\(3,\)\] per sample, but was given \[\(2,\)\]"):
        cache.start([0], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="capacity"):
        WarmStart(capacity=0)


def test_eight_threads_at_once() -> None:
    cache = WarmStart(capacity=50)
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for k in range(100):
                numbers = [first + (k + j) % 20 for j in range(8)]
                cache.store(numbers, solution(torch.tensor(numbers, dtype=torch.float32)[:, None]))
                got = cache.start(numbers, torch.full((8, 1), -1.0)).flatten()
                assert all(g in (-1.0, float(n)) for g, n in zip(got.tolist(), numbers))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(10 * k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(cache) == 50


def train(cache: WarmStart | None, step_size: float | None) -> tuple[list[int], list[float]]:
    """Three epochs on 64 samples: steps of each, and losses of all batches."""
    torch.manual_seed(0)
    energy = StronglyConvex(ConvexNetwork(10, 6, hidden=(32,)), 0.3)
    layer = FPI_GD(energy, step_size, termination=Termination(rtol=1e-4))
    z, labels = torch.randn(64, 6), (torch.rand(64, 10) < 0.3).float()
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3)
    steps, losses = [], []
    for _ in range(3):
        steps.append(0)
        for index in torch.randperm(64).split(16):
            x0 = energy.start(z[index])
            found = layer.solve(z[index], x0=x0 if cache is None else cache.start(index, x0))
            if cache is not None:
                cache.store(index, found)
            loss: Tensor = torch.nn.functional.binary_cross_entropy_with_logits(found.value, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps[-1] += int(found.num_steps.sum())
            losses.append(float(loss.detach()))
    return steps, losses


@pytest.mark.parametrize("step_size", [0.5, None], ids=["gradient steps", "LBFGS"])
def test_training_takes_fewer_steps_and_learns_the_same(step_size: float | None) -> None:
    cold, cold_losses = train(None, step_size)
    warm, warm_losses = train(WarmStart(), step_size)
    print(f"steps of each epoch, cold {cold}, warm {warm}")
    assert warm[0] == cold[0]
    assert warm[1] < 0.85 * cold[1] and warm[2] < 0.85 * cold[2], (cold, warm)
    assert max(abs(a - b) for a, b in zip(cold_losses, warm_losses)) < 1e-3


def test_answers_stored_in_inference_mode_are_written_over_in_training() -> None:
    cache, loaded = WarmStart(), WarmStart()
    with torch.inference_mode():
        cache.store([0, 1], solution(torch.ones(2, 3)))
        loaded.load_state_dict(cache.state_dict())
    for each in (cache, loaded):
        each.store([1], solution(2 * torch.ones(1, 3, requires_grad=True)))
        each.store([2], solution(2 * torch.ones(1, 3)))
        assert each.start([0, 1, 2], torch.zeros(3, 3))[:, 0].tolist() == [1.0, 2.0, 2.0]
        with torch.inference_mode():
            each.store([0], solution(3 * torch.ones(1, 3)))
        assert each.start([0], torch.zeros(1, 3)).tolist() == [[3.0, 3.0, 3.0]]


def test_of_several_precisions_the_finest_is_kept() -> None:
    cache = WarmStart()
    cache.store([0, 1], solution(torch.full((2, 1), 1e6)))
    cache.store([2], solution(torch.ones(1, 1, dtype=torch.float16)))  # makes the table grow
    cache.store([1], solution(torch.full((1, 1), 1 / 3, dtype=torch.float64)))  # and this one not
    expected = torch.tensor([[1e6], [1 / 3], [1.0]], dtype=torch.float64)
    assert torch.equal(cache.start([0, 1, 2], torch.zeros(3, 1, dtype=torch.float64)), expected)


def test_a_state_that_does_not_fit_together_is_refused() -> None:
    cache = WarmStart()
    cache.store([4, 5], solution(torch.ones(2, 1)))
    state = cache.state_dict()
    state["numbers"] = torch.tensor([4, 5, 6])
    with pytest.raises(ValueError, match=r"3 indices and solutions of shapes \[\(2, 1\)\]"):
        WarmStart().load_state_dict(state)


@pytest.mark.parametrize("index", [[True, False], torch.tensor([True, False]), [[3], [1]], numpy.array([[3], [1]]), [None, 1],
                                   [float("inf"), 1], [2**70, 1]], ids=repr)  # fmt: skip
def test_what_is_no_number_of_a_sample_is_refused(index: Any) -> None:
    with pytest.raises(ValueError, match="whole number"):
        WarmStart().store(index, solution(torch.ones(2, 1)))
    with pytest.raises(ValueError, match="whole number"):
        WarmStart().start(index, torch.ones(2, 1))


@pytest.mark.parametrize("capacity", [0, -1, 2.5, float("nan")])
def test_a_capacity_that_is_none_is_refused(capacity: Any) -> None:
    with pytest.raises(ValueError, match=f"whole capacity ≥ 1 or None, got {capacity}"):
        WarmStart(capacity)


def test_a_number_that_is_not_whole_is_refused() -> None:
    cache, x = WarmStart(), torch.ones(2, 3)
    for wrong in ([1.7, 2], torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="whole number"):
            cache.store(wrong, solution(x))  # type: ignore[arg-type]
    assert len(cache) == 0
    cache.store([torch.tensor(1), 2], solution(x))  # type: ignore[list-item]
    assert 1 in cache and 2 in cache

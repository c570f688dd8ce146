"""Loops whose kernels are recorded, which needs a GPU: here a recording is a Python function that is called again."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import compiles
from problems import TIGHT, some_context
from torch import Tensor

from energynet import Compiled, Eager, Picard, Status, minimize
from energynet.compiled import cuda_graphs as replay
from energynet.compiled.cuda_graphs import Loop, Recordings, loop_of, with_replays


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results of all that is recorded, on the CPU."""
    made: list[Tensor] = []

    def record(update: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        made.append(torch.tensor(True))
        place = made[-1]
        return lambda: place.copy_(update()) and None, place

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(replay, "stream_of", lambda device: 0)
    return made


def fibonacci(inputs: list[Any]) -> tuple[Tensor, ...]:
    """(a, b, k), one -> (b, a + b, k + 1)."""
    a, b, k, one = inputs
    inputs.clear()
    return b, a + b, k + one


def below(limit: int) -> Callable[[list[Any]], tuple[Tensor]]:
    def test(inputs: list[Any]) -> tuple[Tensor]:
        k = inputs[2]
        inputs.clear()
        return (k < limit,)

    return test


def start(n: int = 1) -> list[Any]:
    return [torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64), torch.tensor(0), torch.tensor(1)]


def test_a_recorded_loop_is_the_loop(recordings: list[Tensor]) -> None:
    loop = Loop(fibonacci, below(10), 3)
    for repeat in range(3):
        assert [int(t) for t in loop(start())] == [55, 89, 10], repeat
    assert len(recordings) == 1


def test_swapped_carries_are_read_before_they_are_overwritten(recordings: list[Tensor]) -> None:
    def swap(inputs: list[Any]) -> tuple[Tensor, ...]:
        a, b, k, one = inputs
        return b, a, k + one

    loop = Loop(swap, below(5), 3)
    assert [[int(t) for t in loop(start())] for _ in range(2)] == [[1, 0, 5]] * 2


def test_results_and_inputs_share_no_memory_with_recordings(recordings: list[Tensor]) -> None:
    loop, inputs = Loop(fibonacci, below(10), 3), start()
    first = loop(inputs)
    loop([torch.tensor([5]), *start()[1:]])
    assert int(first[0]) == 55 and [int(t) for t in inputs] == [0, 1, 0, 1]


def test_a_loop_of_one_turn(recordings: list[Tensor]) -> None:
    loop = Loop(fibonacci, below(1), 3)
    for _ in range(3):
        assert [int(t) for t in loop(start())] == [1, 1, 1]
    assert len(recordings) == 1


def test_each_shape_has_its_recording_up_to_a_limit(recordings: list[Tensor]) -> None:
    loop = Loop(fibonacci, below(10), 3)
    for n in (1, 2, 3, 4, 5, 6, 1, 2, 5):
        assert loop(start(n))[0].tolist() == [55] * n
    assert len(recordings) == replay.SHAPES


def test_signed_zeros_nan_and_types_have_different_keys() -> None:
    on_device = torch.zeros(2)
    values = (0.0, -0.0, float("nan"), 1, 1.0, True)
    kinds = [replay._key(each, on_device.device) for each in values]
    assert len(set(kinds)) == len(values)
    assert kinds == [replay._key(each, on_device.device) for each in values]


def test_inputs_with_gaps_are_launched(recordings: list[Tensor]) -> None:
    loop = Loop(lambda inputs: fibonacci(inputs[:4]), below(10), 3)
    gaps = torch.ones(2, 2, dtype=torch.int64)[:, 0]
    assert loop([*start(2), gaps])[0].tolist() == [55, 55]
    assert not recordings


def test_a_number_among_the_inputs_is_part_of_the_key(recordings: list[Tensor]) -> None:
    loop = Loop(fibonacci, below(10), 3)
    for step, count in ((1, 10), (2, 5), (1, 10)):
        *_, k = loop([*start()[:3], step])
        assert int(k) == 10 and count
    assert len(recordings) == 2


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"), TypeError("stride")])
def test_failed_recordings_are_launched_and_not_retried(
    recordings: list[Tensor], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried = []

    def fail(*_: Any) -> Any:
        tried.append(1)
        raise error

    monkeypatch.setattr(replay, "record", fail)
    loop = Loop(fibonacci, below(10), 3)
    for _ in range(3):
        assert [int(t) for t in loop(start())] == [55, 89, 10]
    assert len(tried) == 1


def test_large_loops_and_several_devices_are_launched(recordings: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(fibonacci, below(10), 3)
    monkeypatch.setattr(replay, "SMALL", 50)
    assert loop(start(30))[0].tolist() == [55] * 30
    assert replay.kind([torch.zeros(2), torch.zeros((), device="meta")]) is None
    assert replay.kind([torch.zeros(2, device="meta"), torch.zeros(2)]) is None
    assert not recordings


def test_a_number_on_the_cpu_is_part_of_a_recording(recordings: list[Tensor]) -> None:
    on_device = torch.zeros(2, device="meta")
    kinds = [replay.kind([on_device, torch.tensor(value)]) for value in (1.0, 2.0, 1.0)]
    assert None not in kinds and kinds[0] == kinds[2] != kinds[1]


def test_without_a_gpu_nothing_is_recorded() -> None:
    assert replay.kind(start()) is None
    assert [int(t) for t in Loop(fibonacci, below(10), 3)(start())] == [55, 89, 10]


def test_in_inference_mode_and_then_out_of_it(recordings: list[Tensor]) -> None:
    loop = Loop(fibonacci, below(10), 3)
    with torch.inference_mode():
        assert int(loop(start())[0]) == 55
    assert int(loop(start())[0]) == 55


def test_a_second_thread_does_not_wait_and_does_not_disturb(recordings: list[Tensor]) -> None:
    inside, go_on, found = threading.Event(), threading.Event(), []

    def body(inputs: list[Any]) -> tuple[Tensor, ...]:
        if threading.current_thread().name == "first":
            inside.set()
            go_on.wait()
        return fibonacci(inputs)

    loop = Loop(body, below(10), 3)
    thread = threading.Thread(target=lambda: found.append(loop(start())), name="first")
    thread.start()
    inside.wait()
    assert [int(t) for t in loop(start())] == [55, 89, 10]
    go_on.set()
    thread.join()
    assert [int(t) for t in found[0]] == [55, 89, 10]
    assert len(recordings) == 1


def test_recordings_are_deleted_with_their_program(recordings: list[Tensor]) -> None:
    test = below(10)
    program = Recordings(lambda tensors: loop_of(fibonacci, test, 3)(tensors))
    assert int(program(start())[0]) == int(program(start())[0]) == 55
    assert len(recordings) == 1
    (loop,) = program.loops.values()
    gone = weakref.ref(loop.recorded.popitem()[1])
    del program, loop
    gc.collect()
    assert gone() is None
    assert int(loop_of(fibonacci, test, 3)(start())[0]) == 55  # of no program
    assert len(recordings) == 1


LOOP = """
def body(args):
    return f(args)

def call(args):
    should_loop = buf1_result
    while should_loop:

        # subgraph: body
        body_args = [buf1[0], buf1[1], arg0_1]
        (buf1[0], buf1[1]) = body(body_args)

        # subgraph: test
        test_args = [buf1[0], buf1[1], arg0_1]
        (buf1_result,) = test(test_args)
        should_loop = buf1_result
    del arg0_1
"""


def test_which_loops_are_recognized() -> None:
    changed = with_replays(LOOP)
    assert "    if should_loop:\n        buf1 = loop_of(body, test, 2)([buf1[0], buf1[1], arg0_1])\n    del arg0_1" in changed
    assert changed.startswith("from energynet.compiled.cuda_graphs import loop_of\n") and "while" not in changed
    assert "loop_of" in with_replays(LOOP.replace("arg0_1]", "buf2[3]]"))
    for other in (
        LOOP.replace("buf1[0], buf1[1]", "buf1[1], buf1[0]"),
        LOOP.replace("[buf1[0], buf1[1], arg0_1]", "[arg0_1, buf1[0], buf1[1]]"),
        LOOP.replace("return f(args)", "while should_loop:\n        pass"),
        LOOP.replace("(buf1[0], buf1[1]) = body", "(buf1[1], buf1[0]) = body"),
        LOOP.replace("body_args = [buf1[0], buf1[1], arg0_1]", "body_args = [buf1[0], buf1[1], arg1_1]"),
        LOOP.replace("        should_loop = buf1_result\n    del", "        should_loop = buf1_result.item()\n    del"),
    ):
        assert with_replays(other) == other


@compiles
def test_solves_and_derivatives_with_recorded_loops(recordings: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """In Inductor's Python wrapper, as on a GPU; one sample fails."""
    monkeypatch.setattr("energynet.compiled.cache._options", lambda device, parts: {"allow_buffer_reuse": False})
    monkeypatch.setattr("energynet.compiled.tracing.CPU", "none")
    monkeypatch.setattr("energynet.compiled.inductor.folded", lambda source: source)  # sums in registers are for the C++ wrapper
    compiled, z = Compiled(strict=True, check_every=2), some_context(3)
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    energy = lambda x, z, weight: 0.5 * (x - z).square().sum(-1) + weight * x.cosh().log().sum(-1)  # noqa: E731
    z[1] = torch.nan
    found, made = [], []
    for driver in (Eager(), compiled, compiled):
        solution = minimize(energy, torch.zeros(3, 3, dtype=torch.float64), z.requires_grad_(), weight, step_size=0.5,
                            solver=Picard(), termination=TIGHT, driver=driver, on_failure="ignore")  # fmt: skip
        assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
        found.append([solution.value, *torch.autograd.grad(solution.value[::2].square().sum(), [z, weight])])
        made.append(len(recordings))
    for expected, first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert made[0] == 0 and made[1] == made[2] > 1

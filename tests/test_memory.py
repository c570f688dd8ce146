"""Memory of an implicit gradient does not grow with the iterations, and training leaks nothing."""

import gc
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from problems import LogCosh, some_context
from torch import Tensor

from energynet import (
    FPI_GD,
    FPI_NN,
    Adjoint,
    AdjointReport,
    Anderson,
    ImplicitAdjoint,
    OneStepAdjoint,
    Picard,
    Termination,
)

N = 256


def live_tensors() -> int:
    gc.collect()
    return sum(1 for o in gc.get_objects() if issubclass(type(o), Tensor))


def forward_and_backward(steps: int, adjoint: Adjoint) -> tuple[int, int]:
    """Live tensors that the graph holds after the forward, and how many more after the backward."""
    z = torch.randn(8, N, requires_grad=True)
    fixed = Termination(atol=0.0, rtol=0.0, max_steps=steps)
    layer = FPI_NN(
        lambda x, z: 0.9 * torch.tanh(x) + z, start=torch.zeros_like, termination=fixed, adjoint=adjoint, on_failure="ignore"
    )
    before = live_tensors()
    x = layer(z)
    held = live_tensors() - before
    x.sum().backward()
    return held, live_tensors() - before


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(Picard()), ImplicitAdjoint(Anderson(3)), OneStepAdjoint()], ids=str)
def test_live_tensors_do_not_grow_with_the_iterations(adjoint: Adjoint) -> None:
    assert forward_and_backward(50, adjoint) == forward_and_backward(800, adjoint)


def peak_rss(steps: int, adjoint: str) -> int:
    """Peak resident memory in KiB of a process that solves with this many iterations forward and backward."""
    program = f"""
        import resource, torch
        from energynet import *
        torch.set_num_threads(1)
        z = torch.randn(64, 4096, requires_grad=True)
        termination = Termination(atol=0.0, rtol=1e-30, max_steps={steps})
        energy = lambda x, z: 0.5 * (x - z).square().sum(-1) + torch.cosh(0.1 * x).sum(-1)
        x = FPI_GD(energy, 1e-3, start=torch.zeros_like, termination=termination, adjoint={adjoint}, on_failure="ignore")(z)
        x.sum().backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    return int(done.stdout)
@pytest.mark.slow
def test_peak_memory_is_flat_for_implicit_and_grows_for_unrolled() -> None:
    few, many = peak_rss(50, "ImplicitAdjoint(Picard())"), peak_rss(800, "ImplicitAdjoint(Picard())")
    assert many < few + 16 * 1024, (few, many)  # one array is 1 MiB
    assert peak_rss(200, "UnrolledAdjoint()") > few + 200 * 1024
@pytest.mark.slow
def test_200_training_steps_leak_nothing() -> None:
    energy, z, seen = LogCosh(), some_context(4), AdjointReport()
    layer = FPI_GD(energy, 0.2, adjoint=ImplicitAdjoint(report=seen))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            inputs = z.clone().requires_grad_()
            loss = layer(inputs).square().sum()
            (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
            (loss + slope.square().sum()).backward()
            optimizer.step()
            seen.clear()

    train(5)
    before = live_tensors()
    train(200)
    assert live_tensors() == before


def test_a_solution_frees_its_graph() -> None:
    energy = LogCosh()
    solution = FPI_GD(energy, 0.2).solve(some_context(4, requires_grad=True))
    answer = weakref.ref(solution.value)
    del solution  # by reference counting alone: nothing waits for the collector
    assert answer() is None

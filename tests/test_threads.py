"""One layer, many threads: the right gradients, the module intact."""

import sys
import threading
from collections.abc import Callable

import pytest
import torch
from problems import TIGHT, Contraction, LogCosh
from torch import Tensor, nn

from energynet import FPI_GD, FPI_NN, AdjointReport, ImplicitAdjoint


def _minimum() -> nn.Module:
    energy = LogCosh()
    return FPI_GD(energy, energy.step_size, termination=TIGHT)


def _network() -> nn.Module:
    return FPI_NN(Contraction(), start=lambda z: z.new_zeros(z.shape[0], 4), termination=TIGHT)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []
    together = threading.Barrier(count)

    def run(k: int) -> None:
        try:
            together.wait()
            work(k)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


@pytest.mark.parametrize("make", [_minimum, pytest.param(_network, marks=pytest.mark.slow)], ids=["FPI_GD", "FPI_NN"])
def test_eight_threads_one_layer(make: Callable[[], nn.Module]) -> None:
    layer = make()
    contexts = [torch.randn(3, 3, dtype=torch.float64) for _ in range(8)]
    parameters = dict(layer.named_parameters())

    def gradients(z: Tensor) -> list[Tensor]:
        z = z.clone().requires_grad_()
        loss = layer(z).square().sum()
        (slope,) = torch.autograd.grad(loss, z, create_graph=True)
        return [slope.detach(), *torch.autograd.grad(loss + slope.square().sum(), list(parameters.values()))]

    expected = [gradients(z) for z in contexts]
    got: dict[int, list[Tensor]] = {}

    def work(k: int) -> None:
        for _ in range(3):
            got[k] = gradients(contexts[k])

    in_threads(8, work)
    for k, want in enumerate(expected):
        for g, w in zip(got[k], want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)
    assert {name: id(p) for name, p in layer.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert all(type(p) is nn.Parameter for p in layer.parameters())


def test_two_backwards_of_one_graph_at_once() -> None:
    layer, seen = _minimum(), AdjointReport()
    layer.adjoint = ImplicitAdjoint(report=seen)
    z = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    loss = layer(z).square().sum()
    (expected,) = torch.autograd.grad(loss, z, retain_graph=True)
    got: dict[int, Tensor] = {}

    def work(k: int) -> None:
        got[k] = torch.autograd.grad(loss, z, retain_graph=True)[0]

    in_threads(8, work)
    assert all(torch.equal(g, expected) for g in got.values())
    assert len(seen.records) == 9

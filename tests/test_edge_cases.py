"""Odd shapes, dtypes and surroundings: every solver, and what users wrap around a layer."""

import datetime
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed
import torch.utils.checkpoint
from problems import TIGHT, LogCosh, LogEnergy, some_context
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    LBFGS,
    Anderson,
    BarzilaiBorwein,
    Broyden,
    ConvergenceWarning,
    GradientDescent,
    Nesterov,
    Newton,
    NewtonCG,
    Picard,
    Solver,
    Status,
    fixed_point,
    minimize,
)
from energynet.constraints import L1

SOLVERS = [Picard(), Anderson(), Broyden(), Nesterov(), LBFGS(), Newton(), NewtonCG(), GradientDescent(),
           GradientDescent(BarzilaiBorwein())]  # fmt: skip


def pull(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).square().sum(-1) + 0.1 * x.cosh().sum(-1)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_empty_and_single(solver: Solver, shape: tuple[int, int]) -> None:
    z = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    x = minimize(pull, torch.zeros(shape, dtype=torch.float64), z, solver=solver).value
    assert x.shape == shape
    assert torch.autograd.grad(x.sum(), z)[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_low_precision_strided_and_expanded_input(solver: Solver, dtype: torch.dtype) -> None:
    exact = minimize(pull, torch.zeros(3, 2), torch.ones(3, 2)).value
    strided = torch.zeros(2, 3, dtype=dtype).T
    expanded = torch.ones(1, 1, dtype=dtype).expand(3, 2)
    x = minimize(pull, strided, expanded, solver=solver, on_failure="ignore").value
    assert x.dtype == dtype
    torch.testing.assert_close(x.float(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps ** 0.5)
    assert not strided.any()


def test_nan_after_some_steps_stays_with_its_sample() -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z = torch.linspace(0, 1, 64, dtype=torch.float64).reshape(64, 1)

    def step(x: Tensor, z: Tensor, w: Tensor, bad: Tensor) -> Tensor:
        moved = w * x + z
        return torch.where(bad & (x > 1.99 * z), torch.nan, moved)

    def run(keep: Tensor, bad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = z[keep]
        solution = fixed_point(step, torch.zeros_like(rows), rows, weight, bad[keep], on_failure="warn")
        kept = solution.value[solution.converged]
        return kept, solution.status, torch.autograd.grad(kept.sin().sum(), weight)[0]

    everyone, bad = torch.arange(64), (torch.arange(64) == 40).reshape(64, 1)
    with pytest.warns(ConvergenceWarning, match=r"number 40\)"):
        values, status, gradient = run(everyone, bad)
    assert status[40] == Status.NONFINITE and (status == Status.CONVERGED).sum() == 63
    others = torch.cat([everyone[:40], everyone[41:]])
    expected, _, expected_gradient = run(others, bad)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=0)


def test_a_step_ten_times_too_large_fails_only_without_a_line_search() -> None:
    energy, z = LogCosh(), some_context()
    bad = 10 * energy.step_size
    with pytest.raises(RuntimeError, match=r"DIVERGED|NONFINITE"):
        minimize(energy, None, z, step_size=bad, solver=Picard())
    for solver in (LBFGS(), GradientDescent()):
        torch.testing.assert_close(minimize(energy, None, z, step_size=bad, solver=solver, termination=TIGHT).value,
                                   minimize(energy, None, z, termination=TIGHT).value, rtol=0, atol=1e-10)  # fmt: skip


def test_autocast() -> None:
    network = nn.Linear(3, 3)
    layer = FPI_GD(Quadratic(network), 0.5, start=torch.zeros_like)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    plain = layer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = layer.solve(z)
        solution.value.square().sum().backward()
    assert solution.error.dtype == torch.float32
    torch.testing.assert_close(solution.value, plain, rtol=0, atol=3e-2)
    assert network.weight.grad is not None and bool(network.weight.grad.isfinite().all())


class Quadratic(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * x.square().sum(-1) - (x * self.network(z).tanh()).sum(-1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", [LBFGS(), Newton(), NewtonCG(), GradientDescent()], ids=repr)
def test_no_graph_is_built_unless_needed(solver: Solver, mode: type) -> None:
    energy, z = LogCosh(), some_context()
    with mode():
        quiet = minimize(energy, None, z, solver=solver).value
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet.clone(), minimize(energy, None, z, solver=solver).value.detach())


class Outer(nn.Module):
    """½ (y − 3)² + ½ x² with y = argmin θ exp(y) − z exp(x) y = x + log z − log θ, so x* = (3 − log z + log θ) / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LogEnergy()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = minimize(self.inner, torch.zeros_like(x), z * x.exp(), termination=TIGHT).value
        return 0.5 * (y - 3).square().sum(-1) + 0.5 * x.square().sum(-1)


def test_bilevel_inside_bilevel() -> None:
    outer = Outer()
    inner = outer.inner
    z = torch.tensor([[0.8], [1.7]], dtype=torch.float64, requires_grad=True)
    x = minimize(outer, torch.zeros(2, 1, dtype=torch.float64), z, termination=TIGHT).value
    torch.testing.assert_close(x, (3 - z.log() + inner.theta.log()) / 2, rtol=0, atol=1e-9)
    dz, dtheta = torch.autograd.grad(x.sum(), (z, inner.theta), create_graph=True)
    torch.testing.assert_close(dz, -0.5 / z, rtol=0, atol=1e-8)
    torch.testing.assert_close(dtheta, 1 / inner.theta, rtol=0, atol=1e-8)
    torch.testing.assert_close(torch.autograd.grad(dz.sum(), z)[0], 0.5 / z**2, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_inside_a_checkpoint_and_with_an_unused_context() -> None:
    layer, z = FPI_GD(LogCosh(), termination=TIGHT), some_context(requires_grad=True)
    expected = torch.autograd.grad(layer(z).square().sum(), [z, *layer.parameters()])
    again = torch.utils.checkpoint.checkpoint(layer, z, use_reentrant=False)
    for mine, theirs in zip(torch.autograd.grad(again.square().sum(), [z, *layer.parameters()]), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    unused = torch.ones(2, 5, requires_grad=True)
    x = minimize(lambda x, z, unused: pull(x, z[:, :2]), torch.zeros(2, 2, dtype=torch.float64), z, unused).value
    (gradient,) = torch.autograd.grad(x.sum(), unused, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("solve", [
    lambda z: minimize(lambda x, z: pull(x, z) + (4 * x).cosh().sum(-1), torch.zeros_like(z), z).value,
    FPI_GD(lambda x, z: pull(x, z) + (2 * x).cosh().sum(-1), start=torch.zeros_like),
    lambda z: minimize(lambda x, z: pull(x, z) + (3 * x).cosh().sum(-1), torch.zeros_like(z), z, prox=L1(0.1)).value,
])  # fmt: skip
def test_the_first_solve_of_an_energy_inside_a_checkpoint(solve: Callable[[Tensor], Tensor]) -> None:
    z = some_context(requires_grad=True)  # what is checked once only is not among what the checkpoint counts
    again = torch.utils.checkpoint.checkpoint(solve, z, use_reentrant=False)
    mine, theirs = (torch.autograd.grad(x.square().sum(), z)[0] for x in (again, solve(z)))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_hooks_for_saved_tensors_see_those_of_the_solution_only() -> None:
    seen, z = list[torch.Size](), some_context(requires_grad=True)

    def pack(t: Tensor) -> Tensor:
        seen.append(t.shape)
        return t

    def energy(x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (x - z).square().sum(-1) + (5 * x).cosh().sum(-1)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = minimize(energy, torch.zeros_like(z), z, termination=TIGHT).value
    assert len(seen) < 10
    (gradient,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(gradient, 1 / (1 + 25 * (5 * x).cosh()), rtol=0, atol=1e-9)


def train_once(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size,
                                         timeout=datetime.timedelta(seconds=60))  # fmt: skip
    layer = nn.parallel.DistributedDataParallel(FPI_GD(LogCosh(), termination=TIGHT))
    z = some_context(4).chunk(size)[rank]
    layer(z).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in layer.parameters()], f"{folder}/gradients.pt")
    torch.distributed.barrier()  # nobody leaves while the other still talks
    # The destructor of DDP's reducer joins gloo's thread while it holds the GIL, for which that thread may wait: forever.
    os._exit(0)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: object) -> None:
    torch.multiprocessing.spawn(train_once, args=(2, str(tmp_path)), nprocs=2)
    layer = FPI_GD(LogCosh(), termination=TIGHT)
    layer(some_context(4)).square().mean().backward()
    found = torch.load(f"{tmp_path}/gradients.pt", weights_only=True)
    for mine, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=0, atol=1e-12)


def test_x0_of_wrong_shape_dtype_or_device_is_refused() -> None:
    z = torch.ones(3, 3, dtype=torch.float64)
    multiplied = lambda x, z: (x @ z).square().sum(-1)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"x0: \(2, 3\) float32 cpu; the context: \(3, 3\) float64 cpu.*zeros_like"):
        minimize(multiplied, torch.zeros(2, 3), z)
    with pytest.raises(RuntimeError, match=r"x0: \(2, 4\) float64 cpu; the context: \(3, 3\) float64 cpu"):
        minimize(multiplied, torch.zeros(2, 4, dtype=torch.float64), z)
    with pytest.raises(RuntimeError, match=r"x0: \(3, 3\) float64 meta; the context: \(3, 3\) float64 cpu"):
        minimize(pull, torch.zeros(3, 3, dtype=torch.float64, device="meta"), z)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_pytree_of_several_dtypes_is_judged_by_the_least_precise(solver: Solver) -> None:
    z = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2).requires_grad_()
    energy = lambda x, z: pull(x["a"], z) + pull(x["b"][0], 2 * z)  # noqa: E731
    start = {"a": torch.zeros(3, 2), "b": (torch.zeros(3, 2, dtype=torch.float64),)}
    x = minimize(energy, start, z, solver=solver).value
    assert x["a"].dtype == torch.float32 and x["b"][0].dtype == torch.float64
    exact = minimize(pull, torch.zeros(3, 2, dtype=torch.float64), z).value
    torch.testing.assert_close(x["a"].double(), exact, rtol=0, atol=1e-3)
    (got,) = torch.autograd.grad(x["a"].sum(), z)
    torch.testing.assert_close(got, torch.autograd.grad(exact.sum(), z)[0], rtol=0, atol=1e-3)

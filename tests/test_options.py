"""What is no option is refused where it is passed, by layers and calls alike, with what was probably meant."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    FPI_NN,
    GMRES,
    LBFGS,
    AdjointReport,
    Anderson,
    Backtracking,
    BarzilaiBorwein,
    Broyden,
    Compiled,
    DampedStep,
    Eager,
    Energy,
    GradientStep,
    HessianBlocks,
    HessianDiagonal,
    ImplicitAdjoint,
    LaggedWeights,
    MapStep,
    MultiStart,
    Nesterov,
    NeumannAdjoint,
    Newton,
    NewtonCG,
    OptimalityStep,
    Picard,
    Progress,
    ProjectedLBFGS,
    StrongWolfe,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    implicit,
    minimize,
)
from energynet.solvers import BacktrackingStep

X0, Z = torch.zeros(2, 3), torch.ones(2, 3)


def energy(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).square().sum(-1)


def half(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * x + z


MAKERS: dict[str, Callable[..., Any]] = {
    "FPI_GD": lambda **o: FPI_GD(energy, **o),
    "FPI_NN": lambda **o: FPI_NN(half, **o),
    "minimize": lambda **o: minimize(energy, X0, Z, **o),
    "fixed_point": lambda **o: fixed_point(half, X0, Z, **o),
}
WRONG = [
    ({"solver": "lbfgs"}, TypeError, r"solver must be a Solver.*Did you mean LBFGS\(\)\?"),
    ({"solver": "Newton-CG"}, TypeError, r"Did you mean NewtonCG\(\)\?"),
    ({"solver": torch.optim.LBFGS}, TypeError, r"the class LBFGS was passed. Did you mean energynet.LBFGS\(\)\?"),
    ({"solver": Picard}, TypeError, r"Did you mean an instance, Picard\(\)\?"),
    ({"solver": 3}, TypeError, r"such as LBFGS\(\), but 3 was passed.$"),
    ({"driver": "compiled"}, TypeError, r"driver must be a Driver.*Did you mean Compiled\(\)\?"),
    ({"driver": Compiled}, TypeError, r"Did you mean an instance, Compiled\(\)\?"),
    ({"termination": 1e-3}, TypeError, r"Did you mean Termination\(rtol=0.001\)\?"),
    ({"termination": 50}, TypeError, r"Did you mean Termination\(max_steps=50\)\?"),
    ({"adjoint": "implicit"}, TypeError, r"adjoint must be an Adjoint.*Did you mean ImplicitAdjoint\(\)\?"),
    ({"adjoint": Picard()}, TypeError, r"such as ImplicitAdjoint\(\), but Picard\(\) was passed"),
    ({"on_failure": "skip"}, ValueError, r"one of \('raise', 'warn', 'ignore'\), got 'skip'. Did you mean \"ignore\"\?"),
    ({"on_failure": None}, ValueError, "got None"),
    ({"batch_dims": 2}, ValueError, "batch_dims must be 1 .* or 0 .*, got 2. Flatten several"),
    ({"batch_dims": True}, ValueError, "got True"),
]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("options, error, says", WRONG, ids=[str(w[0]) for w in WRONG])
def test_a_wrong_option_is_refused(make: Callable[..., Any], options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make(**options)


@pytest.mark.parametrize("size", ["auto", True, [0.1], lambda x: 0.1])
def test_a_step_size_is_a_number_or_a_tensor(size: Any) -> None:
    for make in (MAKERS["FPI_GD"], MAKERS["minimize"]):
        with pytest.raises(TypeError, match=r"step_size must be a positive number or a tensor.*If it is left out"):
            make(step_size=size)
    for bad in (0.0, -1.0, float("nan"), torch.tensor([0.1, -0.1])):
        with pytest.raises(ValueError, match="step_size must be positive and finite"):
            FPI_GD(energy, bad)


@pytest.mark.parametrize("make", [MAKERS["FPI_GD"], MAKERS["FPI_NN"]])
def test_a_start_is_a_tensor_a_pytree_or_a_function(make: Callable[..., Any]) -> None:
    for start in (5, [1.0, 2.0], "zeros", nn.Linear):
        with pytest.raises(TypeError, match="start must be a tensor, a pytree of tensors or a function of the context"):
            make(start=start)
    for start in (torch.zeros(3), {"a": torch.zeros(3)}, torch.zeros_like, nn.Linear(3, 3)):
        make(start=start)


class Squares(Energy):
    def evaluate(self, x: Tensor, z: Tensor) -> Tensor:
        return (x - z).square().sum(-1)


def test_an_energy_is_an_instance_that_can_be_called() -> None:
    for call in (lambda f: FPI_GD(f), lambda f: minimize(f, X0, Z), lambda f: FPI_NN(f), lambda f: fixed_point(f, X0, Z)):
        with pytest.raises(TypeError, match=r"Did you mean an instance, Squares\(\)\?"):
            call(Squares)
        with pytest.raises(TypeError, match="but Tensor cannot be called"):
            call(torch.zeros(3))


def test_calls_have_flags_of_their_own() -> None:
    for call in (MAKERS["minimize"], MAKERS["fixed_point"]):
        with pytest.raises(TypeError, match="trace must be True or False, but 'yes' was passed"):
            call(trace="yes")


def test_objects_in_objects_are_looked_at_too() -> None:
    for wrong, says in (
        (lambda: ImplicitAdjoint("gmres"), r"solver must be a Solver.*Did you mean GMRES\(\)\?"),
        (lambda: ImplicitAdjoint(termination=1e-3), r"Did you mean Termination\(rtol=0.001\)\?"),
        (lambda: ImplicitAdjoint(report=AdjointReport), r"Did you mean an instance, AdjointReport\(\)\?"),
        (lambda: UnrolledAdjoint(checkpoint=4), "checkpoint must be True or False"),
        (lambda: implicit(energy, energy, termination=1e-3), r"Termination\(rtol=0.001\)"),
        (lambda: implicit(energy, energy, symmetric="yes"), "symmetric must be True or False"),
        (lambda: implicit(3, energy), "solve must be a function"),
        (lambda: Progress(show=3), "show must be a function"),
        (lambda: Nesterov(restart="no"), "Nesterov needs True or False as restart"),
    ):
        with pytest.raises(TypeError, match=says):
            wrong()
    for wrong in (lambda: UnrolledAdjoint(last=2.5), lambda: NeumannAdjoint(terms="3")):
        with pytest.raises(ValueError):
            wrong()


# ------------------------------------------------------------------------------------------------- the batch


def all_in_one(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).square().sum()


def test_an_energy_that_loses_the_batch_warns_once() -> None:
    says = r"returned one number for x of shape \(2, 3\).*\.sum\(-1\) in place of \.sum\(\).*batch_dims=0"
    with pytest.warns(UserWarning, match=says):
        minimize(all_in_one, X0, Z)
    minimize(all_in_one, X0, Z)  # warnings are errors here
    FPI_GD(all_in_one)(Z, x0=X0)


def test_an_energy_that_says_it_is_one_problem_does_not_warn() -> None:
    one = lambda x, z: (x - z).square().sum()  # noqa: E731
    assert minimize(one, X0, Z, batch_dims=0).status.shape == ()
    assert FPI_GD(one, batch_dims=0).solve(Z, x0=X0).status.shape == ()
    assert minimize(lambda x: (x - 1).square().sum(), torch.zeros(3)).status.shape == ()  # one dimension: nothing is lost
    starts = MultiStart(torch.stack([X0, Z]))
    assert minimize(lambda x, z: (x - z).square().sum(), starts, Z, batch_dims=0).status.shape == ()


def test_batch_dims_must_be_what_the_energy_returns() -> None:
    with pytest.raises(ValueError, match=r"returned shape \(2,\) for x of shape \(2, 3\)"):
        minimize(energy, X0, Z, batch_dims=0)
    with pytest.raises(ValueError, match=r"returned shape \(\) for x of shape \(2, 3\)"):
        FPI_GD(lambda x, z: (x - z).square().sum(), batch_dims=1)(Z, x0=X0)
    assert "batch_dims=0" in repr(FPI_GD(all_in_one, batch_dims=0))


def test_one_nan_spoils_only_its_sample_where_the_energy_has_one_value_per_sample() -> None:
    z = torch.tensor([[1.0, 1.0], [torch.nan, 1.0]])
    x0 = torch.zeros(2, 2)
    summed = minimize(lambda x, z: (x - z).square().sum(), x0, z, batch_dims=0, on_failure="ignore")
    assert not bool(summed.converged)
    assert minimize(energy, x0, z, on_failure="ignore").converged.tolist() == [True, False]


def test_the_resolved_solver_shows() -> None:
    assert repr(FPI_NN(half)) == "FPI_NN(half, solver=Picard())"
    assert repr(FPI_GD(energy, 0.1, solver=LBFGS())).startswith("FPI_GD(energy, step_size=0.1, solver=LBFGS(")
    assert FPI_GD(energy).solver == Picard()


# ------------------------------------------------------------------------------------------------- numbers


WHOLE = [  # constructor, argument, least value, whether None is allowed
    (Termination, "max_steps", 0, False),
    (Termination, "budget", 0, True),
    (Termination, "products", 0, True),
    (LBFGS, "memory", 1, False),
    (ProjectedLBFGS, "memory", 1, False),
    (Broyden, "memory", 1, False),
    (Anderson, "memory", 1, False),
    (BarzilaiBorwein, "memory", 1, False),
    (NewtonCG, "inner", 1, False),
    (LaggedWeights, "inner", 1, False),
    (HessianDiagonal, "probes", 1, False),
    (HessianBlocks, "probes", 1, False),
    (GMRES, "restart", 1, False),
    (NeumannAdjoint, "terms", 1, False),
    (UnrolledAdjoint, "last", 1, True),
    (Eager, "check_every", 1, True),
    (Compiled, "check_every", 1, True),
    (Compiled, "capacity", 1, False),
]


@pytest.mark.parametrize("make, name, least, optional", WHOLE, ids=[f"{w[0].__name__}-{w[1]}" for w in WHOLE])
def test_a_whole_number_is_no_text_and_no_fraction(make: Any, name: str, least: int, optional: bool) -> None:
    for wrong in ("5", 1.5, True, float("nan"), [1], LBFGS, torch.ones(2), least - 1, *([] if optional else [None])):
        with pytest.raises(ValueError, match=rf"{make.__name__} needs a whole number {name} ≥ {least}.*, got "):
            make(**{name: wrong})
    for right in (least, numpy.int64(7), *([None] if optional else [])):
        make(**{name: right})


NUMBERS = [  # constructor, argument, numbers that are allowed, numbers that are not, whether None is allowed
    (Termination, "atol", (0, 1e-3), (-1.0, float("inf")), True),
    (Termination, "rtol", (0, 1e-3), (-1.0, float("inf")), True),
    (Termination, "rounding", (1e-3,), (0.0, -1.0, 1.0), True),
    (Anderson, "mixing", (1, 0.5), (0.0, 1.5), False),
    (Anderson, "regularization", (0, 1e-8), (-1.0, float("inf")), True),
    (Newton, "radius", (1, float("inf")), (0.0, -1.0), False),
    (NewtonCG, "radius", (1,), (0.0, float("inf")), False),
    (LaggedWeights, "accuracy", (0.1,), (0.0, 1.0), False),
    (BacktrackingStep, "growth", (1, 2.0), (0.5, float("inf")), False),
    (Backtracking, "decrease", (0.1,), (0.0, 0.5), False),
    (StrongWolfe, "decrease", (0.1,), (0.0, 0.5), False),
    (StrongWolfe, "flatness", (0.5,), (0.0, 1.0, -1.0), False),
    (NeumannAdjoint, "damping", (1, 0.5), (0.0, 1.5), False),
    (Progress, "seconds", (0, 2.5), (-1.0,), False),
]


@pytest.mark.parametrize("make, name, right, wrong, optional", NUMBERS, ids=[f"{w[0].__name__}-{w[1]}" for w in NUMBERS])
def test_a_number_is_no_text(make: Any, name: str, right: Any, wrong: Any, optional: bool) -> None:
    for bad in (*wrong, "0.5", True, float("nan"), [1], LBFGS, torch.ones(2), *([] if optional else [None])):
        with pytest.raises(ValueError, match=rf"{make.__name__} needs a number {name} .*, got "):
            make(**{name: bad})
    for good in (*right, *([None] if optional else [])):
        make(**{name: good})


def test_a_damping_and_a_norm_are_looked_at_too() -> None:
    for wrong in ("0.5", 0.0, 1.5, None):
        with pytest.raises(ValueError, match=r"DampedStep needs a number damping in \(0, 1\]"):
            DampedStep(half, wrong)
    for wrong in ("max", 2, None):
        with pytest.raises(TypeError, match="Termination needs a function as its norm, such as max_norm, got"):
            Termination(norm=wrong)


@pytest.mark.parametrize("make", [MapStep, GradientStep, OptimalityStep, lambda f: DampedStep(f, damping=0.5)])
def test_a_step_without_a_function_is_refused_by_its_constructor(make: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"must be a function or a module, but int cannot be called"):
        make(3)
    with pytest.raises(TypeError, match=r"Did you mean an instance, Linear\(\)\?"):
        make(nn.Linear)

"""What a failure says: the cause that is at work, and remedies that help; each remedy is tried on the case that names it."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from energynet import (
    FPI_GD,
    GMRES,
    LBFGS,
    Anderson,
    Broyden,
    ConjugateGradient,
    ConvergenceError,
    ConvergenceWarning,
    DampedStep,
    Dense,
    GradientDescent,
    ImplicitAdjoint,
    Nesterov,
    Newton,
    Picard,
    ProjectedLBFGS,
    Solution,
    Status,
    Termination,
    UnrolledAdjoint,
    fixed_point,
    implicit,
    minimize,
)
from energynet.constraints import L1, Box
from energynet.regularizers import spectrally_normalized

F64 = torch.float64
RIDGE = 0.005
POINTS = torch.tensor([[0.4, -1.0], [1.2, 0.3], [0.5, 2.0], [-0.3, 0.9], [-1.5, -0.2], [-0.8, 0.4]], dtype=F64)
CURVATURES = torch.logspace(0, 5, 9, dtype=F64)
EXPANDING = 3 * torch.eye(6) + 2 * torch.triu(torch.ones(6, 6))
TURN = torch.tensor([[0.0, -1.2], [1.2, 0.0]])
FEW = Termination(max_steps=10)
SHARP = Termination(atol=0.0, rtol=1e-9, max_steps=100)


def separable(w: Tensor) -> Tensor:  # (B, 2) -> (B,)
    return torch.nn.functional.softplus(-(w @ POINTS.T) * POINTS[:, 0].sign()).mean(-1)


def banana(x: Tensor) -> Tensor:
    return 100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (1 - x[:, 0]) ** 2


def kinked(x: Tensor) -> Tensor:
    return (x - 1).abs().sum(-1) + (x - 1.3).square().sum(-1)


def narrow(x: Tensor) -> Tensor:
    return (CURVATURES * (x - 1).square()).sum(-1)


def kinked_inside(x: Tensor) -> Tensor:  # minimal at 0.5
    return (x - 0.5).abs().sum(-1) + (x - 0.7).square().sum(-1)


def smooth_inside(x: Tensor) -> Tensor:
    return ((x - 0.5).square() + 1e-6).sqrt().sum(-1) + (x - 0.7).square().sum(-1)


def saturated(x: Tensor) -> Tensor:  # g(0.5) = 0.5
    return (3 - 5 * x).clamp(0, 1)


def quadratic(x: Tensor) -> Tensor:
    return 2 * (x - 1).square().sum(-1)


def half_exact(x: Tensor) -> Tensor:
    """Evaluated in float32, whatever x is."""
    x = x.float()
    return ((x - 1 / 3).square().sum(-1) + 0.1 * (x - 1 / 7).pow(4).sum(-1)).double()


def ridged(energy: Callable[..., Tensor], weight: float = RIDGE) -> Callable[..., Tensor]:
    return lambda x, *context: energy(x, *context) + weight * x.square().sum(-1)


def start(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([values], dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A solve that fails, what must be said of it, and the remedies that are named, each with the solve that takes it."""

    fails: Callable[[], Solution]
    says: str
    remedies: dict[str, Callable[[], Solution]]
    never: str = "^$"


START = start(-1.2, 1.0)
TENTH = torch.full((1, 2), 0.1, dtype=F64)
SLOW = {"a prox, slow", "separable", "a slow map", "kink, Newton", "kink, stalled", "kink, piecewise linear",
        "a map that contracts slowly", "steps of a slow solver", "gradient steps"}  # fmt: skip


def marked(cases: dict[str, Any]) -> list[Any]:
    """The cases, of which some take a thousand steps."""
    return [pytest.param(case, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, case in cases.items()]


FORWARD = {
    "separable": Case(
        lambda: minimize(separable, torch.zeros(1, 2, dtype=F64)),
        r"no minimizer.*x has grown to ‖x‖ =",
        {r"a ridge 0.005 \* x.square\(\).sum\(-1\)": lambda: minimize(ridged(separable), torch.zeros(1, 2, dtype=F64))},
        "LBFGS|float64",
    ),
    "exponential": Case(
        lambda: minimize(lambda x: (-x).exp().sum(-1), torch.zeros(2, 1)),
        r"no minimizer.*x has grown",
        {"a ridge": lambda: minimize(ridged(lambda x: (-x).exp().sum(-1)), torch.zeros(2, 1))},
        "LBFGS",
    ),
    "linear": Case(
        lambda: minimize(lambda x: x.sum(-1), torch.zeros(2, 1)),
        "DIVERGED.*no minimizer",
        {"a ridge": lambda: minimize(ridged(lambda x: x.sum(-1)), torch.zeros(2, 1))},
    ),
    "linear, steps of a given size": Case(
        lambda: minimize(lambda x: x.sum(-1), torch.zeros(2, 3), step_size=0.3),
        "no minimizer",
        {"a ridge": lambda: minimize(ridged(lambda x: x.sum(-1)), torch.zeros(2, 3))},
    ),
    "budget": Case(
        lambda: minimize(banana, START, termination=FEW),
        r"MAX_STEPS: .*the energy still falls, by 0.\d+ per step.*after 10 steps of 10 allowed",
        {
            r"Newton\(\)": lambda: minimize(banana, START, solver=Newton(), termination=Termination(max_steps=30)),
            "a larger max_steps than 10": lambda: minimize(banana, START),
        },
        "float64|ridge",
    ),
    "gradient steps": Case(
        lambda: minimize(narrow, torch.zeros(1, 9, dtype=F64), solver=Picard()),
        "the energy still falls",
        {r"LBFGS\(\)": lambda: minimize(narrow, torch.zeros(1, 9, dtype=F64), solver=LBFGS())},
        "float64|Picard",
    ),
    "step too long": Case(
        lambda: minimize(quadratic, torch.zeros(2, 3), step_size=0.6),
        r"the step size 0.6 exceeds 2/L = 0.5,.*at x0",
        {
            "a smaller step size": lambda: minimize(quadratic, torch.zeros(2, 3), step_size=0.45),
            "leave out step_size=": lambda: minimize(quadratic, torch.zeros(2, 3)),
        },
        "ridge",
    ),
    "layer with a step too long": Case(
        lambda: FPI_GD(quadratic, 0.6).solve(x0=torch.zeros(2, 3)),
        "the step size 0.6 exceeds 2/L = 0.5",
        {"leave out step_size=": lambda: FPI_GD(quadratic).solve(x0=torch.zeros(2, 3))},
    ),
    "kink, stalled": Case(
        lambda: minimize(kinked, torch.zeros(2, 2, dtype=F64)),
        r"STALLED: .*kink.*steps of 1000 allowed",
        {
            r"\(x.square\(\) \+ 1e-6\).sqrt\(\) for x.abs\(\)": lambda: minimize(
                lambda x: ((x - 1).square() + 1e-6).sqrt().sum(-1) + (x - 1.3).square().sum(-1), torch.zeros(2, 2, dtype=F64)
            ),
            r"constraints.L1\(weight\)": lambda: minimize(  # with u = x - 1
                lambda u: (u - 0.3).square().sum(-1), torch.zeros(2, 2, dtype=F64), prox=L1(1.0)
            ),
        },
        "float64|max_steps",
    ),
    "kink, piecewise linear": Case(
        lambda: minimize(lambda x: (x - 1).abs().sum(-1) + (x[:, 0] - 2 * x[:, 1]).abs(), torch.zeros(2, 2)), "kink", {}, "ridge"
    ),
    "kink, Newton": Case(lambda: minimize(kinked, torch.zeros(2, 2), solver=Newton()), "kink", {}),
    "rounding in float64": Case(
        lambda: minimize(half_exact, torch.zeros(1, 2, dtype=F64), termination=SHARP),
        "STALLED.*rounding.*a looser Termination",
        {},
        "float64|kink",
    ),
    "start outside of the domain": Case(
        lambda: minimize(lambda x: (x - x.log()).sum(-1), torch.tensor([[1.0], [-2.0], [3.0]])),
        r"1 of 3 samples \(number 1\).*the energy is not finite at x0 = \(-2\)",
        {"start where it is finite": lambda: minimize(lambda x: (x - x.log()).sum(-1), torch.tensor([[1.0], [2.0], [3.0]]))},
        "steps that Termination|max_steps",
    ),
    "start where the gradient is not finite": Case(
        lambda: minimize(lambda x: x.square().sum(-1).sqrt() + (x - 1).square().sum(-1), torch.zeros(1, 2)),
        r"E\(x0\) is finite but its gradient is not",
        {
            "start elsewhere": lambda: minimize(
                lambda x: x.square().sum(-1).sqrt() + (x - 1).square().sum(-1), torch.full((1, 2), 0.1)
            ),
            r"\+ 1e-6\)": lambda: minimize(
                lambda x: (x.square().sum(-1) + 1e-6).sqrt() + (x - 1).square().sum(-1), torch.zeros(1, 2)
            ),
        },
    ),
    "NaN in the context": Case(
        lambda: minimize(lambda x, z: (x - z).square().sum(-1), torch.zeros(2, 1), torch.tensor([[1.0], [math.nan]])),
        r"1 of 2 samples \(number 1\).*the context of these samples holds NaN",
        {},
    ),
    "NaN in what is shared": Case(
        lambda: minimize(lambda x, z: (z * x - 1).square().sum(-1), torch.zeros(3, 2), torch.tensor(math.nan)),
        "a parameter or a shared tensor holds NaN",
        {},
    ),
    "NaN in x0": Case(lambda: minimize(quadratic, torch.tensor([[1.0], [math.nan]])), "x0 holds NaN", {}),
    "a map that doubles": Case(
        lambda: fixed_point(lambda x: 2 * x + 1, torch.zeros(2, 1)),
        "contraction factor is 2,",
        {r"Broyden\(\)": lambda: fixed_point(lambda x: 2 * x + 1, torch.zeros(2, 1), solver=Broyden())},
        "ridge|step size|DampedStep",
    ),
    "a map that turns": Case(
        lambda: fixed_point(lambda x: x @ TURN.mT + 1, torch.zeros(1, 2)),
        "contraction factor is 1.2,",
        {
            r"DampedStep\(g, 0.4\)": lambda: fixed_point(DampedStep(lambda x: x @ TURN.mT + 1, 0.4), torch.zeros(1, 2)),
            r"Broyden\(\)": lambda: fixed_point(lambda x: x @ TURN.mT + 1, torch.zeros(1, 2), solver=Broyden()),
        },
    ),
    "a slow map": Case(
        lambda: fixed_point(lambda x: 0.9999 * x + 1, torch.zeros(2, 1, dtype=F64)),
        "contracts slowly: each plain step leaves 0.9999 of the error",
        {
            r"Broyden\(\)": lambda: fixed_point(lambda x: 0.9999 * x + 1, torch.zeros(2, 1, dtype=F64), solver=Broyden()),
            "a larger max_steps": lambda: fixed_point(
                lambda x: 0.999 * x + 1, torch.zeros(2, 1), termination=Termination(max_steps=20_000)
            ),
        },
        "float64|ridge",
    ),
    "Anderson fails": Case(
        lambda: fixed_point(lambda x: x @ EXPANDING + 1, torch.zeros(2, 6), solver=Anderson(memory=1)),
        "DIVERGED.*does not contract",
        {r"Broyden\(\)": lambda: fixed_point(lambda x: x @ EXPANDING + 1, torch.zeros(2, 6), solver=Broyden())},
        r"Anderson\(\)",
    ),
    "no fixed point": Case(
        lambda: fixed_point(lambda x: x + 1, torch.zeros(2, 1), termination=FEW),
        "has the eigenvalue 1",
        {"a factor of 0.9": lambda: fixed_point(lambda x: 0.9 * (x + 1), torch.zeros(2, 1))},
    ),
    "unrolled": Case(
        lambda: fixed_point(lambda x: 2 * x + 1, torch.zeros(2, 1), adjoint=UnrolledAdjoint()), "contraction factor is 2,", {}
    ),
    "a prox, step too long": Case(
        lambda: minimize(quadratic, torch.zeros(2, 3), step_size=0.9, prox=L1(0.1)),
        "step size exceeds 2/L",
        {"leave out step_size=": lambda: minimize(quadratic, torch.zeros(2, 3), prox=L1(0.1))},
    ),
    "a kink within bounds": Case(
        lambda: minimize(kinked_inside, TENTH, prox=Box(0.0, 1.0)),
        "STALLED: .*kink",
        {r"\(x.square\(\) \+ 1e-6\).sqrt\(\) for x.abs\(\)": lambda: minimize(smooth_inside, TENTH, prox=Box(0.0, 1.0))},
        r"rounding|step size|Nesterov|prox=",
    ),
    "a kink beside a prox": Case(
        lambda: minimize(kinked_inside, TENTH, prox=L1(0.1), termination=Termination(max_steps=100)),
        "MAX_STEPS: .*kink",
        {r"for x.abs\(\)": lambda: minimize(smooth_inside, TENTH, prox=L1(0.1))},
        "step size|ill-conditioned|prox=",
    ),
    "few steps within bounds": Case(
        lambda: minimize(banana, START, prox=Box(-2.0, 2.0), termination=Termination(max_steps=5)),
        "ill-conditioned, so that progress is slow",
        {"a larger max_steps than 5": lambda: minimize(banana, START, prox=Box(-2.0, 2.0))},
        "Nesterov|step size",
    ),
    "few projected gradient steps": Case(
        lambda: minimize(banana, START, prox=Box(-2.0, 2.0), solver=Picard(), termination=Termination(max_steps=5)),
        "ill-conditioned, so that progress is slow",
        {r"ProjectedLBFGS\(\)": lambda: minimize(banana, START, prox=Box(-2.0, 2.0), solver=ProjectedLBFGS())},
        "Nesterov|step size",
    ),
    "a map that jumps to and fro": Case(
        lambda: fixed_point(saturated, TENTH, termination=Termination(max_steps=100)),
        r"do not settle although the map contracts where they ended \(contraction factor 0\)",
        {r"DampedStep\(g, 0.2\)": lambda: fixed_point(DampedStep(saturated, 0.2), TENTH)},
        "slowly|Picard",
    ),
    "a prox, slow": Case(
        lambda: minimize(narrow, torch.zeros(1, 9, dtype=F64), prox=L1(0.1), solver=Picard(), termination=FEW),
        "progress is slow",
        {
            r"Nesterov\(\)": lambda: minimize(
                narrow, torch.zeros(1, 9, dtype=F64), prox=L1(0.1), solver=Nesterov(), termination=Termination(max_steps=20_000)
            )
        },
    ),
}


@pytest.mark.parametrize("case", marked(FORWARD))
def test_a_failed_solve_states_cause_and_remedy(case: Case) -> None:
    with pytest.raises(ConvergenceError) as caught:
        case.fails()
    message = str(caught.value)
    assert re.search(case.says, message), message
    assert not re.search(case.never, message), message
    for named, solve in case.remedies.items():
        assert re.search(named, message), message
        assert bool(solve().converged.all()), named


def backward(x: Solution) -> None:
    x.value.sum().backward()


def leaf(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def shifted(x: Tensor, z: Tensor) -> Tensor:
    return (CURVATURES * (x - z).square()).sum(-1)


def turned(x: Tensor, z: Tensor) -> Tensor:
    return x @ TURN.mT + z


def solve_turned(adjoint: ImplicitAdjoint) -> Solution:
    return fixed_point(turned, torch.zeros(1, 2), leaf(1, 2, dtype=torch.float32), solver=Broyden(), adjoint=adjoint)


def solve_shifted(adjoint: ImplicitAdjoint) -> Solution:
    return minimize(shifted, torch.zeros(1, 9, dtype=F64), leaf(1, 9), adjoint=adjoint)


def slow(adjoint: ImplicitAdjoint) -> Solution:
    return fixed_point(
        lambda x, z: 0.999 * x + z, torch.zeros(1, 2), leaf(1, 2, dtype=torch.float32), solver=Anderson(), adjoint=adjoint
    )


Z = torch.zeros(1, 2, dtype=F64)
ADJOINT = {
    "steps of a slow solver": Case(
        lambda: solve_shifted(ImplicitAdjoint(Picard())),
        r"ill-conditioned \(condition number 1e\+05",
        {r"ImplicitAdjoint\(ConjugateGradient\(\)\)": lambda: solve_shifted(ImplicitAdjoint(ConjugateGradient()))},
        "ridge|float64",
    ),
    "too few steps": Case(
        lambda: solve_shifted(ImplicitAdjoint(termination=Termination(max_steps=3))),
        "truncated",
        {
            r"ImplicitAdjoint\(Dense\(\)\)": lambda: solve_shifted(ImplicitAdjoint(Dense())),
            r"more steps than 3: ImplicitAdjoint\(termination": lambda: solve_shifted(
                ImplicitAdjoint(termination=Termination(max_steps=100))
            ),
        },
    ),
    "a map that does not contract": Case(
        lambda: solve_turned(ImplicitAdjoint(Picard())),
        r"contraction factor 1.2\)",
        {r"ImplicitAdjoint\(GMRES\(\)\)": lambda: solve_turned(ImplicitAdjoint(GMRES()))},
        "ridge|Hessian",
    ),
    "a map that contracts slowly": Case(
        lambda: slow(ImplicitAdjoint(Picard(), Termination(max_steps=50))),
        "contracts slowly at the solution.*after 50 steps of 50 allowed",
        {
            r"ImplicitAdjoint\(GMRES\(\)\)": lambda: slow(ImplicitAdjoint(GMRES())),
            r"more steps than 50": lambda: slow(ImplicitAdjoint(Picard(), Termination(max_steps=20_000))),
        },
        "ridge|Hessian",
    ),
    "loss without a gradient": Case(
        lambda: dataclasses.replace(
            s := minimize(lambda x, z: (x - z).square().sum(-1), Z, 0 * leaf(1, 2)), value=s.value.sqrt()
        ),
        "the gradient of the loss is not finite at the solution",
        {},
        "Hessian",
    ),
}


@pytest.mark.parametrize("case", marked(ADJOINT))
def test_a_failed_gradient_states_cause_and_remedy(case: Case) -> None:
    with pytest.raises(ConvergenceError, match=r"The adjoint solve \(the gradient\) failed") as caught:
        backward(case.fails())
    message = str(caught.value)
    assert re.search(case.says, message), message
    assert not re.search(case.never, message), message
    for named, solve in case.remedies.items():
        assert re.search(named, message), message
        backward(solve())


def test_a_ridge_makes_a_flat_energy_differentiable() -> None:
    energy = lambda x, z: (x - z).pow(4).sum(-1)  # noqa: E731
    with pytest.raises(ConvergenceError, match=r"singular or indefinite.*a ridge 0.005"):
        backward(minimize(energy, torch.ones(2, 1, dtype=F64), leaf(2, 1)))
    backward(minimize(ridged(energy), torch.ones(2, 1, dtype=F64), leaf(2, 1)))


class Recurrent(nn.Module):
    """x ← x W + z."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        moved: Tensor = self.inner(x) + z
        return moved


def test_the_remedy_for_networks_is_to_bound_the_norm() -> None:
    network = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        network.weight.copy_(1.5 * torch.eye(4))
    with pytest.raises(ConvergenceError, match=r"spectrally_normalized\(network, 0.9\)"):
        fixed_point(Recurrent(network), torch.zeros(2, 4), torch.ones(2, 4))
    bounded = Recurrent(spectrally_normalized(network, 0.9)).eval()
    assert bool(fixed_point(bounded, torch.zeros(2, 4), torch.ones(2, 4)).converged.all())


def test_the_tolerance_that_is_named_can_be_reached() -> None:
    with pytest.raises(ConvergenceError) as caught:
        minimize(half_exact, torch.zeros(1, 2, dtype=F64), termination=SHARP)
    named = re.search(r"Termination\(rtol=([\d.e-]+)\)", str(caught.value))
    assert named
    minimize(half_exact, torch.zeros(1, 2, dtype=F64), termination=Termination(rtol=float(named[1])))


def test_a_black_box_is_told_once() -> None:
    with pytest.raises(ConvergenceError, match=r"does not satisfy its optimality condition.*less exactly than") as caught:
        implicit(lambda z: z + 0.1, lambda x, z: x - z)(torch.ones(2, 3))
    assert str(caught.value).count("Likely cause") == 1
    loose = implicit(lambda z: z + 1e-4, lambda x, z: x - z, termination=Termination(rtol=1e-2))  # the remedy
    assert loose(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"adjoint": ImplicitAdjoint(Dense())}], ids=str)
def test_a_condition_that_does_not_determine_its_solution(options: dict[str, Any]) -> None:
    for factor in (torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.0], [-2.0, 0.0]])):  # singular; indefinite as well
        z = leaf(*factor.shape)
        singular = implicit(torch.clone, lambda x, z: factor * (x - z), **options)  # noqa: B023
        with pytest.raises(ConvergenceError, match=r"∂F/∂x is singular.*as many independent equations") as caught:
            singular(z).sum().backward()
        assert not re.search("the map|Hessian|NewtonCG|ridge|spectrally", str(caught.value))
    z = leaf(2)
    implicit(lambda z: z[:1].clone(), lambda x, z: x - z[:1], **options)(z).sum().backward()
    assert z.grad is not None and z.grad.tolist() == [1, 0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_remedy_for_an_ill_conditioned_condition(symmetric: bool) -> None:
    curvatures, z = torch.logspace(0, 6, 40, dtype=F64), leaf(40)
    few = ImplicitAdjoint(termination=Termination(max_steps=4))
    solve = [torch.clone, lambda x, z: curvatures * (x - z)]
    with pytest.raises(ConvergenceError, match=r"∂F/∂x is ill-conditioned.*ImplicitAdjoint\(Dense\(\)\), or more steps than 4"):
        implicit(*solve, symmetric=symmetric, adjoint=few)(z).sum().backward()
    implicit(*solve, symmetric=symmetric, adjoint=ImplicitAdjoint(Dense()))(z).sum().backward()
    torch.testing.assert_close(z.grad, torch.ones(40, dtype=F64))


def test_a_black_box_has_no_initial_point() -> None:
    for solve, condition, says in (
        (lambda z: z * math.nan, lambda x, z: x - z, "the result of solve holds NaN or Inf"),
        (lambda z: -z, lambda x, z: x.log() - z, "F is not finite at the result of solve"),
    ):
        with pytest.raises(ConvergenceError, match=says) as caught:
            implicit(solve, condition)(torch.ones(2))
        assert not re.search("x0|start", str(caught.value))
    with pytest.raises(ConvergenceError, match="the context of these samples holds NaN"):
        implicit(torch.clone, lambda x, z: x - z)(torch.tensor([1.0, math.nan]))


def test_two_kinds_of_failure_are_reported_separately() -> None:
    x0 = torch.tensor([[1.0], [-2.0], [5.0], [math.nan]])
    with pytest.warns(ConvergenceWarning) as caught:
        minimize(lambda x: (x - x.log()).sum(-1), x0, on_failure="warn")
    message = str(caught[0].message)
    assert re.search(r"NONFINITE: 1 of 4 samples \(number 3\).*x0 holds NaN", message)
    assert re.search(r"1 of 4 samples \(number 1\) \S.*not finite at x0 = \(-2\)", message)


def test_an_energy_that_cannot_be_evaluated_elsewhere_does_not_hide_its_failure() -> None:
    calls = []

    def energy(x: Tensor, *context: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 60:
            raise ZeroDivisionError("only so many evaluations")
        return (-x).sum(-1)

    with pytest.raises(ConvergenceError, match="DIVERGED"):
        minimize(energy, torch.zeros(1, 1))


@pytest.mark.parametrize("weight", [1e-3, 1e-6])
def test_a_wall_is_no_kink(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    G, c = torch.randn(20, 4, dtype=F64, generator=generator), torch.randn(4, dtype=F64, generator=generator)

    def barrier(x: Tensor) -> Tensor:
        return x @ c - weight * (1 - x @ G.T).log().sum(-1)

    x0 = torch.zeros(1, 4, dtype=F64)
    with pytest.raises(ConvergenceError, match=r"Try this: Newton\(\)"):
        minimize(barrier, x0, solver=GradientDescent(), termination=Termination(max_steps=60))
    assert minimize(barrier, x0, solver=Newton()).converged.all()


def test_stalled_is_a_separate_status() -> None:
    solution = minimize(kinked, torch.zeros(2, 2, dtype=F64), on_failure="ignore")
    assert (solution.status == Status.STALLED).all() and (solution.num_steps < 1000).all()
    with pytest.raises(ConvergenceError, match=r"STALLED: 2 of 2 samples.*Likely cause"):
        solution.raise_for_status()


@pytest.mark.slow
def test_repeated_verification_does_not_change_the_step_limit() -> None:
    """Each claim that does not hold doubles the updates until the next look, which must not overflow."""
    solution = minimize(separable, torch.zeros(1, 2, dtype=F64), on_failure="ignore")
    assert int(solution.num_steps) == 1000

"""What tells how solves went: names of statuses, the summary of backward solves, progress of long ones."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from energynet import FPI_GD, AdjointReport, Eager, ImplicitAdjoint, Picard, Progress, Solution, Status, Termination, minimize


def energy(x: Tensor, z: Tensor) -> Tensor:
    return 0.5 * (torch.tensor([1.0, 10.0]) * (x - z).square()).sum(-1)


def test_statuses_have_names() -> None:
    status = torch.tensor([0, 1, 2, 3, 4, 5], dtype=torch.int8)
    solution = Solution(torch.zeros(6, 1), status, torch.zeros(6), torch.zeros(6, dtype=torch.int32))
    assert solution.status_names == ["CONVERGED", "MAX_STEPS", "NONFINITE", "DIVERGED", "STALLED", "BUDGET"]
    assert minimize(lambda x: (x - 3).square().sum(), torch.zeros(2)).status_names == ["CONVERGED"]


def test_a_report_sums_up_and_is_bounded() -> None:
    report = AdjointReport(keep=3)
    layer = FPI_GD(energy, adjoint=ImplicitAdjoint(report=report), start=torch.zeros_like)
    short = FPI_GD(energy, adjoint=ImplicitAdjoint(Picard(), Termination(max_steps=1), report), start=torch.zeros_like,
                   on_failure="ignore")  # fmt: skip
    for _ in range(7):
        layer(torch.ones(4, 2, requires_grad=True))[:, 0].square().sum().backward()
    short(torch.ones(2, 2, requires_grad=True)).sum().backward()
    assert len(report.records) == 3 and report.num_solves == 8
    assert report.counts == {Status.CONVERGED: 28, Status.MAX_STEPS: 2}
    assert report.max_steps >= 1 and report.max_residual > 0.1
    assert repr(report).startswith("AdjointReport(8 solves, CONVERGED 28, MAX_STEPS 2, steps≤")
    for other in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert repr(other) == repr(report)
    report.clear()
    assert repr(report) == "AdjointReport(0 solves, steps≤0, residual≤0)" and not report.records
    with pytest.raises(ValueError, match="whole number of records"):
        AdjointReport(keep=-1)


def test_a_long_solve_tells_its_progress() -> None:
    seen: list[tuple[int, int, float]] = []
    driver = Eager(progress=Progress(seconds=0.0, show=lambda *told: seen.append(told)))
    x0, z = torch.zeros(3, 2), torch.ones(3, 2, requires_grad=True)
    solution = minimize(energy, x0, z, step_size=0.1, driver=driver)
    steps = int(solution.num_steps.max())
    assert seen[0][:2] == (0, 3) and seen[-1][:2] == (steps, 0) and len(seen) == steps + 1
    errors = [error for _, running, error in seen if running]
    assert errors[-1] < 1e-3 < errors[0]
    assert torch.equal(solution.value, minimize(energy, x0, z, step_size=0.1).value)
    before = len(seen)
    solution.value.sum().backward()
    assert len(seen) > before  # the adjoint solve as well


def test_a_short_solve_tells_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    minimize(energy, torch.zeros(3, 2), torch.ones(3, 2), driver=Eager(progress=Progress(seconds=600.0)))
    assert capsys.readouterr() == ("", "")
    minimize(energy, torch.zeros(3, 2), torch.ones(3, 2), driver=Eager(progress=Progress(seconds=0.0)))
    assert "still running, estimated distance" in capsys.readouterr().err
    for wrong in (True, print):
        with pytest.raises(TypeError, match="progress must be a Progress"):
            Eager(progress=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds ≥ 0"):
        Progress(seconds=-1.0)


def test_what_cannot_be_read_inside_a_transform_says_so() -> None:
    for name, read in (("status_names", lambda s: s.status_names), ("raise_for_status", lambda s: s.raise_for_status())):

        def solve(z: Tensor) -> Solution:
            solution = minimize(lambda x, z: (x - z).square().sum(), torch.zeros(2), z)
            read(solution)  # noqa: B023
            return solution

        with pytest.raises(RuntimeError, match=f"Solution.{name} was read inside vmap.*read it outside"):
            torch.func.vmap(solve)(torch.ones(3, 2))
    outside = torch.func.vmap(lambda z: minimize(lambda x, z: (x - z).square().sum(), torch.zeros(2), z))(torch.ones(3, 2))
    assert outside.raise_for_status().status_names == ["CONVERGED"] * 3

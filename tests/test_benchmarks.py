"""The benchmarks run, at toy size and without peers, and their check can fail; nothing is timed in earnest."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("rich")

from benchmarks import harness, report, w5_accuracy, w6_scaling, work, workload
from benchmarks.contenders.handwritten import HandWritten
from benchmarks.contenders.ours import OursEager
from benchmarks.contenders.plain import Plain
from benchmarks.contenders.unrolled import Unrolled
from benchmarks.harness import Options, Row, Watcher, compete
from benchmarks.ops import TORCH
from benchmarks.w1_single import Single
from benchmarks.w2_batch import Batch
from benchmarks.w3_labels import Labels, LabelsApart
from benchmarks.w4_images import Images
from benchmarks.work import Task, prepare
from benchmarks.workload import FixedStepWorkload, Workload

TOY = Options(repeats=1, quick=True, skip_peers=True)
SKIPPED = {
    ("unrolled autograd", Task.FORWARD.value), ("plain eager loop", Task.HESSIAN.value), ("hand-written", Task.HESSIAN.value),
}  # fmt: skip


def interpreted(options: Options) -> list[harness.Contender]:
    """Nobody who needs a compiler."""
    return [Plain(), HandWritten(), Unrolled(), OursEager()]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SHORTEST", 0.0)
    monkeypatch.setattr(workload, "contenders", interpreted)


@pytest.mark.slow
@pytest.mark.parametrize("each", [Single(), Batch(), Labels(), LabelsApart(), Images()], ids=lambda w: w.name)
def test_all_contenders_are_correct_and_timed(each: FixedStepWorkload, tmp_path: Path) -> None:
    rows = each.run(TOY, Watcher())
    assert len(rows) == 4 * len(each.tasks)
    for row in rows:
        if (row.contender, row.task) in SKIPPED:
            assert row.note.startswith("cannot")
        else:
            assert row.right and row.seconds is not None and row.ratio is not None, row
    report.table(each, rows)
    report.write(tmp_path / "found.json", each, rows, TOY)
    assert len(json.loads((tmp_path / "found.json").read_text())[each.name]["rows"]) == len(rows)


class Toy(Workload):
    name, title = "toy", "two rows"

    def __init__(self, stops: bool = False) -> None:
        self.stops = stops

    def run(self, options: Options, watch: Watcher) -> list[Row]:
        rows = [Row("toy", "forward", "one", seconds=1.0), Row("toy", "forward", "another", seconds=2.0)]
        watch.seen(rows[:1])
        if self.stops:
            raise KeyboardInterrupt
        watch.seen(rows)
        return rows


def test_an_earlier_table_stays_until_another_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else the command makes one of its own
    from benchmarks import __main__ as command

    def run(stops: bool, *arguments: str) -> list[str]:
        monkeypatch.setattr(command, "WORKLOADS", [Toy(stops)])
        monkeypatch.setattr(command, "missing_peers", lambda: ["torchdeq"])
        monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "toy", *arguments])
        command.main()
        return [row["contender"] for row in json.loads((tmp_path / "found.json").read_text())["toy"]["rows"]]

    output = "--output", str(tmp_path / "found.json")
    assert run(False, *output) == ["one", "another"]
    assert "not among the peers: torchdeq" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="130"):
        run(True, *output)
    assert "toy was interrupted" in (shown := capsys.readouterr().out) and "found.unfinished.json" in shown and "1 s" in shown
    kept = [len(json.loads(path.read_text())["toy"]["rows"]) for path in sorted(tmp_path.glob("found*.json"))]
    assert kept == [2, 1]
    assert run(False, *output) == ["one", "another"] and not list(tmp_path.glob("*.unfinished.json"))
    monkeypatch.chdir(tmp_path)
    run(False)  # a peer is missing: not in the place of the table of all
    assert (tmp_path / "results" / "benchmarks.json").exists()


@pytest.mark.parametrize("each", [Single(), Batch(), Labels(), LabelsApart(), Images()], ids=lambda w: w.name)
def test_all_contenders_get_the_same_energy(each: FixedStepWorkload) -> None:
    """That of a code, as energynet and the loop by hand evaluate it, and that of the inputs, as all others do."""
    problem = each.problem(TOY).double()
    x = torch.randn_like(problem.x0)
    of_code = problem.formula.evaluate(TORCH, x, *problem.code())
    torch.testing.assert_close(problem.energy(x, *problem.inputs), of_code, rtol=1e-13, atol=1e-13)


def test_a_wrong_gradient_is_reported_and_not_timed() -> None:
    class OneStep(Plain):
        name = "one step"

        def adjoint(self, work: work.Work, x: torch.Tensor) -> Any:
            pull = super().adjoint(work, x)
            return lambda v: (tuple(0.5 * t for t in pull(v)[0]), 1)

    rows = compete("toy", prepare(Batch().problem(TOY), [*Batch.tasks]), Batch.tasks, [Plain(), OneStep()], TOY, Watcher())
    wrong = rows[-1]
    assert wrong.note == "wrong" and wrong.error == pytest.approx(0.5, rel=1e-3) and wrong.seconds is None


def test_the_reference_is_the_same_without_a_dense_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dataclasses.replace(Images().problem(TOY), tolerance=1e-3)
    dense = prepare(problem, [Task.FORWARD, Task.GRADIENT])
    monkeypatch.setattr(work, "DENSE", 0)
    free = prepare(problem, [Task.FORWARD, Task.GRADIENT])
    assert free.contraction == pytest.approx(dense.contraction, rel=1e-2)
    torch.testing.assert_close(free.answers[Task.GRADIENT][0], dense.answers[Task.GRADIENT][0], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_all_minimizers_reach_the_accuracy_and_their_evaluations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = w5_accuracy.everyone

    def eager(options: Options) -> list[w5_accuracy.Minimizer]:
        return [m for m in everyone(options) if "compiled" not in m.name]

    monkeypatch.setattr(w5_accuracy, "everyone", eager)
    rows = w5_accuracy.Accuracy().run(TOY, Watcher())
    assert {row.contender for row in rows} == {m.name for m in eager(TOY)}
    assert all(row.right and row.steps and row.seconds for row in rows), rows


def test_evaluations_are_those_of_a_known_algorithm() -> None:
    from benchmarks.contenders.minimizers import Tally, _Seen

    x, tally = torch.ones(3, requires_grad=True), Tally()
    (slope,) = torch.autograd.grad(_Seen.apply(x, tally).pow(4).sum(), x, create_graph=True)
    for _ in range(3):
        torch.autograd.grad(slope, x, torch.ones(3), retain_graph=True)
    assert (tally.backward - tally.twice, tally.twice) == (1, 3)


@pytest.mark.slow
def test_scaling_runs_and_is_plotted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(w6_scaling, "OursCompiled", OursEager)
    rows: Sequence[Row] = w6_scaling.Scaling().run(TOY, Watcher())
    longer = [row for row in rows if row.contender == "plain eager loop" and "iterations" in row.case]
    iterations = [int(row.steps.split(" ")[0]) for row in longer]
    assert iterations[1] > 3 * iterations[0]
    w6_scaling.plot([dataclasses.asdict(row) for row in rows], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 0

"""Tasks, training, the results folder and the command line, on a data set of a few rows."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from compiling import records
from safetensors.torch import load_file
from torch import Tensor, nn

import energynet
from energynet import ConvergenceWarning
from energynet.experiments import cli
from energynet.experiments.data import Data, Rows
from energynet.experiments.data.multilabel import load
from energynet.experiments.display import Display, describe
from energynet.experiments.find import NotFoundError, find_rival, find_task, place_of
from energynet.experiments.fits import Setup
from energynet.experiments.metrics import decide, figures
from energynet.experiments.models import FORWARD, Size
from energynet.experiments.multilabel import FpiGd, MultiLabel, MultiLabelOptions, soft_f1_loss
from energynet.experiments.processes import Alone
from energynet.experiments.results import ResumeError, read_json
from energynet.experiments.runs import Plan, Watcher, load_model, run_one
from energynet.experiments.task import Column, FittedRival, Rates, Rival, Task
from energynet.experiments.trainer import Round, Trainer
from energynet.experiments.tuning import tuned_rates

QUIET = Watcher(lambda setup, done: None, lambda: None, lambda setup, one: None)
OPTIONS = MultiLabelOptions(updates=8, every=2, loss="f1", batch_size=16, folds=1, experts=2, hidden=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    X = rng.random((120, 12)) > 0.5
    Y = np.stack([X[:, 0] & X[:, 1], X[:, 2], X[:, 3] | X[:, 4]], axis=1)
    path = tmp_path / "tiny"
    path.mkdir()
    np.savez(path / "tiny.npz", X_train=X[:80], Y_train=Y[:80], X_test=X[80:], Y_test=Y[80:],
             n_features=np.array(12), n_labels=np.array(3))  # fmt: skip
    return path


@pytest.fixture
def data(folder: Path) -> Data:
    return load(folder)


def setup_for(data: Data, method: str, options: MultiLabelOptions = OPTIONS, seed: int = 1) -> Setup:
    rival = find_rival(method, MultiLabel)
    return Setup(MultiLabel(options), data, rival, options.rates(rival), seed)


def stop_after(rounds: int) -> Watcher:
    def on_round(setup: Setup, one: Round) -> None:
        if one.round == rounds:
            raise KeyboardInterrupt

    return replace(QUIET, on_round=on_round)


TIMES = ("seconds", "peak_memory_mib")


def timeless(metrics: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in metrics.items() if name not in TIMES}


def timeless_history(text: str) -> list[str]:
    return [line.rsplit(",", 2)[0] for line in text.splitlines()]  # without seconds and memory


@pytest.mark.parametrize(("method", "folds"), [
    ("fpi-gd", 1), pytest.param("fpi-nn", 1, marks=pytest.mark.slow), pytest.param("mlp", 1, marks=pytest.mark.slow),
    pytest.param("mlp", 2, marks=pytest.mark.slow), ("logistic", 3),
])  # fmt: skip
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(method: str, folds: int, data: Data, tmp_path: Path) -> None:
    setup = setup_for(data, method, replace(OPTIONS, folds=folds))
    whole = run_one(setup, Plan(tmp_path / "whole"), QUIET)
    with pytest.raises(KeyboardInterrupt):
        run_one(setup, Plan(tmp_path / "parts"), stop_after(2))
    place = tmp_path / "parts" / method / "seed-1"
    assert {"config.json", "history.csv", "model.json", "model.safetensors", "curves.png"} <= set(os.listdir(place))
    load_model(place)
    torch.rand(7)  # the caller's random numbers have no say
    resumed = run_one(setup, Plan(tmp_path / "parts", resume=True), QUIET)
    assert timeless(whole) == timeless(resumed)
    other = tmp_path / "whole" / method / "seed-1"
    for name in ("config.json", "model.json"):
        assert (place / name).read_text() == (other / name).read_text()
    histories = [timeless_history((at / "history.csv").read_text()) for at in (place, other)]
    assert histories[0] == histories[1] and len(histories[0]) == 5
    for name in ("model.safetensors", "checkpoint.safetensors"):
        one, two = load_file(place / name), load_file(other / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_model_is_rebuilt_from_its_folder(data: Data, tmp_path: Path) -> None:
    metrics = run_one(setup_for(data, "fpi-gd", replace(OPTIONS, updates=2)), Plan(tmp_path), QUIET)
    model, calibration = load_model(tmp_path / "fpi-gd" / "seed-1")
    predicted = decide(model(data.test.inputs), calibration["threshold"])
    assert figures(predicted, data.test.targets) == metrics["test"]
    assert metrics["converged"] == 1 and metrics["diagnostics"]["agreement_99th_percentile"] < 1e-2
    assert 0 < metrics["diagnostics"]["spectral_radius"] < 0.9


def test_resuming_another_run_names_what_differs(data: Data, tmp_path: Path) -> None:
    setup = setup_for(data, "mlp", replace(OPTIONS, updates=2))
    run_one(setup, Plan(tmp_path), QUIET)
    with pytest.raises(ResumeError, match=r"learning_rate: 0\.002 there, 0\.1 now"):
        run_one(replace(setup, rates=Rates(0.1)), Plan(tmp_path, resume=True), QUIET)
    with pytest.raises(ResumeError, match="already holds a run"):
        run_one(setup, Plan(tmp_path), QUIET)


def test_a_finished_run_is_not_tested_again(data: Data, tmp_path: Path) -> None:
    log = tmp_path / "test_log.json"
    setup = setup_for(data, "logistic")
    first = run_one(setup, Plan(tmp_path / "out", test_log=log), QUIET)
    assert run_one(setup, Plan(tmp_path / "out", test_log=log, resume=True), QUIET) == first
    (entry,) = json.loads(log.read_text())
    assert entry["method"] == "logistic" and entry["figures"] == first["test"] and entry["commit"]
    assert entry["loss"] == "f1" and entry["learning_rate"] == 0.03


def test_no_test_leaves_test_rows_alone(data: Data, tmp_path: Path) -> None:
    poisoned = replace(data, test=Rows(torch.full_like(data.test.inputs, torch.nan), data.test.targets))
    metrics = run_one(setup_for(poisoned, "mlp"), Plan(tmp_path, test=False), QUIET)
    assert "test" not in metrics and 0 <= metrics["held_out"]["example_f1"] <= 1


def test_experts_learn_apart_and_the_energy_from_the_answer() -> None:
    torch.manual_seed(0)
    rival, task = FpiGd(), MultiLabel(replace(OPTIONS, loss="bce"))
    model = rival.build(Size(6, 3, 2))
    batch = Rows(torch.rand(4, 6), torch.ones(4, 3))
    answer = task.loss(model.combine(model.features(batch.inputs).detach()), batch)
    answer.backward(retain_graph=True)
    assert all(p.grad is None for p in model.features.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.layer.parameters())
    total = rival.training_loss(model, batch, task)
    total.backward()
    assert all(p.grad is not None for p in model.features.parameters())
    assert total > answer > 0 and FORWARD.rtol == 1e-4


def test_soft_f1_loss_of_a_perfect_and_an_empty_row() -> None:
    assert soft_f1_loss(torch.tensor([[50.0, -50.0]]), torch.tensor([[1.0, 0.0]])) < 1e-6
    assert torch.isfinite(soft_f1_loss(torch.full((1, 2), -200.0), torch.zeros(1, 2)))


# ---------------------------------------------------------------- the trainer, on a task of one number


class Line(nn.Module):
    """Two numbers, the second without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return self.slope * x


class LineRival(Rival):
    name = "line"
    rates = Rates(0.05, 0.0)

    def build(self, size: object) -> nn.Module:
        return Line()


class Warns(Rival):
    name = "warns"

    def build(self, size: object) -> nn.Module:
        return Line()

    def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
        if int(model.seen) % 2:
            warnings.warn("a solve", ConvergenceWarning, stacklevel=1)
        loss = super().training_loss(model, batch, task)
        return loss * torch.nan if int(model.seen) == 1 else loss


class Mean(FittedRival):
    name = "mean"

    def build(self, size: object) -> nn.Module:
        return Line().requires_grad_(False)

    def fit(self, model: nn.Module, rows: Rows, rates: Rates, seed: int) -> None:
        model.slope.fill_((rows.targets / rows.inputs).mean())


class Slope(Task):
    """Find the slope of a line."""

    name = "slope"
    size_class = dict
    choice = "error"
    larger_is_better = False
    columns: ClassVar[dict[str, Column]] = {}

    @classmethod
    def rivals(cls) -> list[Rival]:
        return [LineRival(), Warns(), Mean()]

    def load(self, folder: Path | None) -> Data:
        x = torch.linspace(1, 2, 40)[:, None]
        return Data("line", Rows(x, 3 * x), Rows(x, 3 * x))

    def size(self, data: Data) -> object:
        return {}

    def loss(self, output: Tensor, batch: Rows) -> Tensor:
        return (output - batch.targets).square().mean()

    def evaluate(self, output: Tensor, rows: Rows, calibration: object) -> dict[str, float]:
        return {"error": float(self.loss(output, rows))}


def trainer_of(rival: Rival, options: MultiLabelOptions) -> Trainer:
    task = Slope(options)
    trainer = Trainer(Setup(task, task.load(None), rival, options.rates(rival), 0))
    while not trainer.finished:
        trainer.run_round()
    return trainer


SLOW = MultiLabelOptions(updates=400, every=10, patience=3, batch_size=8, folds=1)


def test_patience_ends_a_run_and_a_spent_budget_says_that_it_still_rises() -> None:
    patient = trainer_of(LineRival(), replace(SLOW, updates=2000))
    assert patient.history[-1].round == patient.best.round + 3 and not patient.still_rising
    assert abs(patient.chosen_model().slope.item() - 3) < 1e-2
    hurried = trainer_of(LineRival(), replace(SLOW, updates=20))
    assert hurried.history[-1].updates == 20 and hurried.still_rising


def test_the_average_is_that_of_the_weights_and_the_first_one_is_forgotten() -> None:
    trainer = trainer_of(LineRival(), replace(SLOW, updates=30, every=30))
    (fit,) = trainer.fits
    assert 0.3 < fit.judged.slope.item() / fit.model.slope.item() < 0.99
    assert fit.judged.seen == fit.model.seen == 30  # buffers come along
    assert trainer_of(LineRival(), replace(SLOW, averaging=0.0)).fits[0].judged.slope.item() == pytest.approx(3, abs=0.05)


def test_failed_solves_and_gradients_are_counted_and_do_no_harm() -> None:
    trainer = trainer_of(Warns(), replace(SLOW, updates=10))
    assert trainer.history[0].failed == 6  # five warnings, one of them also NaN, and the NaN of the second batch
    assert torch.isfinite(trainer.fits[0].model.slope).all()


def test_other_warnings_are_passed_on() -> None:
    class Talks(Warns):
        def training_loss(self, model: nn.Module, batch: Rows, task: Task) -> Tensor:
            warnings.warn("other", UserWarning, stacklevel=1)
            return task.loss(model(batch.inputs), batch)

    with pytest.warns(UserWarning, match="other"):
        trainer_of(Talks(), replace(SLOW, updates=1))


def test_cross_validation_judges_every_row_once_and_refits_all() -> None:
    trainer = trainer_of(LineRival(), replace(SLOW, folds=4))
    assert len(trainer.held_out) == 40 and len(trainer.held_out.inputs.unique()) == 40
    model = trainer.final_model()
    assert abs(model.slope.item() - 3) < 1e-2 and model.seen == trainer.best.updates


def test_a_rival_that_fits_itself_takes_one_round() -> None:
    trainer = trainer_of(Mean(), replace(SLOW, folds=2))
    assert trainer.finished and len(trainer.history) == 1 and not trainer.still_rising
    assert trainer.final_model().slope.item() == pytest.approx(3)


def test_runs_leave_the_random_numbers_of_the_caller_alone() -> None:
    before = torch.get_rng_state()
    trainer_of(LineRival(), replace(SLOW, updates=20))
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- names and the command line


def test_tasks_and_rivals_are_found_by_name_and_by_place() -> None:
    assert find_task("multilabel") is MultiLabel and find_task(place_of(MultiLabel)) is MultiLabel
    assert find_rival("energynet.experiments.multilabel:FpiGd", MultiLabel).name == "fpi-gd"
    with pytest.raises(NotFoundError, match="no task 'nothing'; ours are multilabel"):
        find_task("nothing")
    with pytest.raises(NotFoundError, match="no method 'nothing'; it has fpi-gd"):
        find_rival("nothing", MultiLabel)
    with pytest.raises(NotFoundError, match="no class 'Nothing'; it has"):
        find_task("energynet.experiments.multilabel:Nothing")
    with pytest.raises(NotFoundError, match=r"FpiGd is no energynet\.experiments\.task\.Task"):
        find_task("energynet.experiments.multilabel:FpiGd")
    with pytest.raises(NotFoundError, match=r"there is no file .*absent\.py"):
        find_task("absent.py:Nothing")
    with pytest.raises(NotFoundError, match="no module 'absent' can be imported"):
        find_task("absent:Nothing")


def invoke(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["energynet", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out + told.err


SMALL = ("--threads", "1", "--updates", "2", "--hidden", "8", "--folds", "1")


def test_the_command_line_prints_a_table_and_leaves_a_png(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = (
        "run",
        "multilabel",
        "--data",
        str(folder),
        "--method",
        "fpi-gd",
        "mlp",
        "sklearn-logistic",
        "--seeds",
        "2",
        *SMALL,
    )
    code, output = invoke(capsys, *options, "--out", "out")
    assert code == 0, output
    assert all(name in output for name in ("fpi-gd", "mlp ↑", "sklearn-logistic", "±", "spectral radius", "raise --updates"))
    assert "so far: 6" in " ".join(output.split()) and "\x1b" not in output
    assert len(json.loads((tmp_path / "docs/results/test_log.json").read_text())) == 6
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_json(tmp_path / "out/mlp/seed-1/metrics.json")) > 0
    code, output = invoke(capsys, *options, "--out", "out", "--resume", "--loss", "f1")
    assert code == 2 and "loss: 'bce' there, 'f1' now" in output


def test_the_command_line_refuses_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in [
        (("run", "multilabel", "--data", str(tmp_path / "absent")), "--data"),
        (("run", "multilabel", "--resume"), "--out"),
        (("run", "nothing"), "ours are multilabel"),
        (("run", "multilabel", "--method", "nothing"), "it has fpi-gd"),
        (("run", "multilabel", "--upates", "3"), "--updates"),
        (("nothing",), "usage"),
    ]:
        code, output = invoke(capsys, *arguments)
        assert code == 2 and said in output and "Traceback" not in output


class Shows(Slope):
    """It has finished weights, which it shows where no data are named."""

    def use(self, out: Path | None, *, named: bool, say: Callable[[str], None]) -> bool:
        if named:
            raise ValueError("a picture of 1 × 1 pixels is too small.")
        say(f"written to [{out}]")
        return True


def test_a_task_applies_finished_weights_in_place_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_task", lambda name: Shows)
    assert invoke(capsys, "run", "shows", "--out", "here") == (0, "written to [here]\n")
    assert invoke(capsys, "run", "shows", "--method", "line") == (2, "Error: a picture of 1 × 1 pixels is too small.\n")


def test_ctrl_c_says_how_to_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("run", "multilabel", "--data", str(folder), "--method", "mlp", "--no-test", "--out", str(tmp_path / "out"), *SMALL)
    monkeypatch.setattr(Display, "_round", lambda self, setup, one: stop_after(1).on_round(setup, one))
    code, output = invoke(capsys, *options, "--every", "1")
    assert code == 130 and "--resume --out" in output
    monkeypatch.undo()
    code, output = invoke(capsys, *options, "--every", "1", "--resume")
    assert code == 0 and "held-out rows" in output


def test_list_names_tasks_methods_and_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = invoke(capsys, "list", str(folder.parent))
    assert code == 0 and "multilabel: " in output and "  sklearn-chain: " in output and output.endswith(": tiny\n")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "multilabel", "--help"], ["report", "--help"]])
def test_help_is_whole_in_a_narrow_window(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    code, told = invoke(capsys, *arguments)
    assert code == 0 and "…" not in told and "\x1b" not in told
    assert max(len(line) for line in told.splitlines()) <= 50


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(capsys, "--version")[1].startswith(f"energynet {energynet.__version__}, torch ")


def test_a_round_in_words() -> None:
    assert describe(MultiLabel(OPTIONS), Round(1, 50, 1.0, {"example_f1": 0.5}, {})) == "loss 1.000, ex-F1 50.0"
    told = describe(MultiLabel(OPTIONS), Round(1, 50, 1.0, {"example_f1": 0.5}, {}, 2.0, None, 0.5, failed=3))
    assert told == "loss 1.000, ex-F1 50.0, steps 2.0 + 0.0, converged 50.0 %, 3 updates failed"


@pytest.mark.slow
def test_rates_are_tuned_once_on_held_out_rows(data: Data, tmp_path: Path) -> None:
    setup = setup_for(data, "sklearn-logistic")
    assert isinstance(setup.rival, FittedRival)
    first = tuned_rates(setup, Plan(tmp_path), QUIET)
    told = read_json(tmp_path / "sklearn-logistic" / "tuning.json")
    assert [point["rates"]["weight_decay"] for point in told["tried"]] == [rates.weight_decay for rates in setup.rival.grid]
    best = max(told["tried"], key=lambda point: point["figure"])
    assert told["rates"] == best["rates"] == {"learning_rate": first.learning_rate, "weight_decay": first.weight_decay}
    assert told["seconds"] == pytest.approx(sum(point["seconds"] for point in told["tried"]))
    poisoned = replace(setup, data=replace(data, train=Rows(data.train.inputs * torch.nan, data.train.targets)))
    assert tuned_rates(poisoned, Plan(tmp_path), QUIET) == first  # what is known is not tried again


@pytest.mark.slow
def test_interrupted_tuning_goes_on_where_it_was(data: Data, tmp_path: Path) -> None:
    setup, seen = setup_for(data, "mlp", replace(OPTIONS, updates=4)), []

    def on_round(setup: Setup, one: Round) -> None:
        seen.append((setup.rates, one.round))
        if len(seen) == 3:
            raise KeyboardInterrupt

    watcher = replace(QUIET, on_round=on_round)
    with pytest.raises(KeyboardInterrupt):
        tuned_rates(setup, Plan(tmp_path), watcher)
    tuned_rates(setup, Plan(tmp_path), watcher)
    assert seen == [(rates, one) for rates in setup.rival.grid for one in (1, 2)]


@pytest.mark.slow
def test_seeds_spread_over_processes_give_what_one_process_gives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("--method", "mlp", "sklearn-logistic", "--seeds", "2", "--tune")
    options = ("run", "multilabel", "--data", str(folder), *methods, *SMALL)
    outputs = {}
    for jobs in ("1", "2"):
        log = ("--test-log", str(tmp_path / f"log-{jobs}.json"))
        code, outputs[jobs] = invoke(capsys, *options, "--jobs", jobs, "--out", str(tmp_path / jobs), *log)
        assert code == 0, outputs[jobs]
    assert "mlp seed 1 update 2/2" in outputs["2"] and "test rows, 2 seeds" in outputs["2"]
    for name in ("mlp/seed-0", "mlp/seed-1", "sklearn-logistic/seed-1"):
        one, two = (read_json(tmp_path / jobs / name / "metrics.json") for jobs in ("1", "2"))
        assert one["test"] == two["test"] and one["rates"] == two["rates"]
    assert len(json.loads((tmp_path / "log-2.json").read_text())) == 4
    code, output = invoke(capsys, *options, "--jobs", "2", "--out", str(tmp_path / "2"))
    assert code == 2 and "already holds a run" in output


@pytest.mark.slow
def test_two_processes_of_accelerate_give_what_one_gives(folder: Path, tmp_path: Path) -> None:
    options = ("run", "multilabel", "--data", str(folder), "--method", "logistic", "fpi-gd", "--seeds", "1", "--no-test")
    budget = ("--updates", "20", "--every", "5", "--folds", "1", "--hidden", "8", "--batch-size", "15")
    plain = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *plain)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(energynet.__file__).parent.parent)}
    for name, how in (("one", ()), ("two", launch)):
        command = [sys.executable, *how, "-m", "energynet", *options, *budget, "--out", str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=280)
    one, two = (load_file(tmp_path / name / "logistic" / "seed-0" / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "two" / "fpi-gd" / "seed-0" / "metrics.json").is_file()


def test_a_batch_is_shared_so_that_the_mean_is_that_of_the_whole() -> None:
    class Two(Alone):
        count = 2

    rows, values = torch.arange(7), torch.rand(7)
    total = 0.0
    for rank in (0, 1):
        process = Two()
        process.rank = rank
        own, weight = process.share(rows)
        total += weight * values[own].mean() / 2
    assert total == pytest.approx(values.mean().item())
    process.rank = 1
    assert process.share(rows[:1])[1] == 0


def test_tensorboard_gets_every_round(data: Data, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_one(setup_for(data, "logistic"), Plan(tmp_path, test=False, tensorboard=True), QUIET)
    events = EventAccumulator(str(tmp_path / "logistic" / "seed-1" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("example_f1")] == [2, 4, 6, 8]
    assert "threshold" in events.Tags()["scalars"] and "forward_steps" not in events.Tags()["scalars"]


@records
def test_compiled_solves_give_what_eager_ones_give(data: Data, tmp_path: Path) -> None:
    setup = setup_for(data, "fpi-gd", replace(OPTIONS, updates=2))
    eager, compiled = (
        run_one(replace(setup, compiled=choice), Plan(tmp_path / str(choice), test=False), QUIET) for choice in (False, True)
    )
    assert compiled["held_out"] == pytest.approx(eager["held_out"])
    assert compiled["forward_steps"] == pytest.approx(eager["forward_steps"], abs=0.5)

"""Training, the results folder and the command line, on a data set of a few rows."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import energynet
from energynet.experiments import multilabel
from energynet.experiments.cli import app
from energynet.experiments.data import MultiLabelData, load
from energynet.experiments.models import FORWARD, MethodName, Size, build
from energynet.experiments.multilabel import Plan, Watcher, run_one
from energynet.experiments.report import Display, describe, result_table, show
from energynet.experiments.results import ResumeError, load_model, read_json
from energynet.experiments.training import Epoch, LossName, Recipe, loss_function, predict, total_loss

QUIET = Watcher(lambda recipe, done, batches: None, lambda: None, lambda recipe, epoch: None)


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
def data(folder: Path) -> MultiLabelData:
    return load(folder)


def plan_for(out: Path, *, resume: bool = False, test: bool = True, log: Path | None = None) -> Plan:
    return Plan((MethodName.FPI_GD,), LossName.F1, 1, 4, 2, out, resume, test, log)


def stop_after(epochs: int) -> Watcher:
    def on_epoch(recipe: Recipe, epoch: Epoch) -> None:
        if epoch.epoch == epochs:
            raise KeyboardInterrupt

    return replace(QUIET, on_epoch=on_epoch)


@pytest.mark.parametrize("method", list(MethodName))
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(method: MethodName, data: MultiLabelData, tmp_path: Path) -> None:
    recipe = Recipe(method, LossName.F1, 1, 4, 2, batch_size=16)
    whole = run_one(data, plan_for(tmp_path / "whole"), recipe, QUIET)
    with pytest.raises(KeyboardInterrupt):
        run_one(data, plan_for(tmp_path / "parts"), recipe, stop_after(2))
    place = tmp_path / "parts" / method.value / "seed-1"
    assert {"config.json", "history.csv", "model.json", "model.safetensors", "curves.png"} <= set(os.listdir(place))
    torch.rand(7)  # the caller's random numbers have no say
    resumed = run_one(data, plan_for(tmp_path / "parts", resume=True), recipe, QUIET)
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}
    other = tmp_path / "whole" / method.value / "seed-1"
    for name in ("history.csv", "config.json", "model.json"):
        assert (place / name).read_text() == (other / name).read_text()
    for name in ("model.safetensors", "checkpoint.safetensors"):
        one, two = load_file(place / name), load_file(other / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_model_is_rebuilt_from_its_folder(data: MultiLabelData, tmp_path: Path) -> None:
    recipe = Recipe(MethodName.FPI_GD, LossName.BCE, 0, 2, 2)
    metrics = run_one(data, plan_for(tmp_path), recipe, QUIET)
    model, threshold = load_model(tmp_path / "fpi-gd" / "seed-0")
    predicted = multilabel.decide(predict(model, data.test_features), threshold)
    assert multilabel.figures(predicted, data.test_labels).example_f1 == metrics["test"]["example_f1"]
    assert metrics["converged"] == 1 and metrics["agreement"]["99th percentile"] < 1e-2


def test_resuming_another_run_names_what_differs(data: MultiLabelData, tmp_path: Path) -> None:
    recipe = Recipe(MethodName.MLP, LossName.BCE, 0, 1)
    run_one(data, plan_for(tmp_path), recipe, QUIET)
    with pytest.raises(ResumeError, match=r"learning_rate: 0\.002 there, 0\.1 now"):
        run_one(data, plan_for(tmp_path, resume=True), replace(recipe, learning_rate=0.1), QUIET)
    with pytest.raises(ResumeError, match="already holds a run"):
        run_one(data, plan_for(tmp_path), recipe, QUIET)


def test_a_finished_run_is_not_tested_again(data: MultiLabelData, tmp_path: Path) -> None:
    log = tmp_path / "test_log.json"
    recipe = Recipe(MethodName.LOGISTIC, LossName.BCE, 0, 1)
    first = run_one(data, plan_for(tmp_path / "out", log=log), recipe, QUIET)
    assert run_one(data, plan_for(tmp_path / "out", log=log, resume=True), recipe, QUIET) == first
    (entry,) = json.loads(log.read_text())
    assert entry["method"] == "logistic" and entry["figures"] == first["test"] and entry["commit"]


def test_no_test_leaves_test_rows_alone(data: MultiLabelData, tmp_path: Path) -> None:
    poisoned = replace(data, test_features=torch.full_like(data.test_features, torch.nan))
    metrics = run_one(poisoned, plan_for(tmp_path, test=False), Recipe(MethodName.MLP, LossName.BCE, 0, 1), QUIET)
    assert "test" not in metrics and 0 <= metrics["held_out"]["example_f1"] <= 1


def test_experts_learn_apart_and_the_energy_from_the_answer() -> None:
    torch.manual_seed(0)
    model = build(MethodName.FPI_GD, Size(6, 3, 2))
    z, labels = torch.rand(4, 6), torch.ones(4, 3)
    scores = model(z)
    total, answer = total_loss(loss_function(LossName.BCE), scores, labels)
    loss_function(LossName.BCE)(scores.logits, labels).backward(retain_graph=True)
    assert all(p.grad is None for p in model.features.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.layer.parameters())
    total.backward()
    assert all(p.grad is not None for p in model.features.parameters())
    assert total > answer > 0 and FORWARD.rtol == 1e-4


def test_soft_f1_loss_of_a_perfect_and_an_empty_row() -> None:
    loss = loss_function(LossName.F1)
    logits = torch.tensor([[50.0, -50.0]])
    assert loss(logits, torch.tensor([[1.0, 0.0]])) < 1e-6
    assert torch.isfinite(loss(torch.full((1, 2), -200.0), torch.zeros(1, 2)))


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["run", "multilabel", "--threads", "1", *arguments])
    return result.exit_code, result.output


def test_the_command_line_prints_a_table_and_leaves_a_png(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    code, output = invoke("--data", str(folder), "--seeds", "2", "--epochs", "1", "--out", "out")
    assert code == 0, output
    assert all(name in output for name in ("fpi-gd ×5", "fpi-nn ×5", "mlp", "logistic", "±", "median"))
    assert "so far: 8" in " ".join(output.split()) and "\x1b" not in output
    assert len(json.loads((tmp_path / "docs/results/test_log.json").read_text())) == 8
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_json(tmp_path / "out/mlp/seed-1/metrics.json")) > 0
    code, output = invoke("--data", str(folder), "--seeds", "2", "--epochs", "1", "--out", "out", "--resume", "--loss", "f1")
    assert code == 2 and "loss: 'bce' there, 'f1' now" in output


def test_the_command_line_refuses_in_words(tmp_path: Path) -> None:
    code, output = invoke("--data", str(tmp_path / "absent"))
    assert code == 2 and "--data" in output
    code, output = invoke("--resume")
    assert code == 2 and "--out" in output


def test_ctrl_c_says_how_to_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--data", str(folder), "--method", "mlp", "--epochs", "3", "--no-test", "--out", str(tmp_path / "out"))
    monkeypatch.setattr(Display, "_epoch", lambda self, recipe, epoch: stop_after(1).on_epoch(recipe, epoch))
    code, output = invoke(*options)
    assert code == 130 and "--resume --out" in output
    monkeypatch.undo()
    code, output = invoke(*options, "--resume")
    assert code == 0 and "held-out rows" in output


def test_table_fits_a_narrow_terminal(tmp_path: Path) -> None:
    figure = {"example_f1": 0.5, "micro_f1": 0.5, "macro_f1": 0.25, "exact_match": 0.125}
    run = {
        "method": "fpi-gd",
        "experts": 3,
        "test": figure,
        "forward_steps": 5.0,
        "adjoint_steps": 4.0,
        "converged": 1.0,
    }
    console = Console(width=60, record=True, file=io.StringIO(), no_color=True)
    console.print(result_table(plan_for(tmp_path), "tiny", [run, run], None))
    assert max(len(line) for line in console.export_text().splitlines()) <= 60
    narrow = Console(width=40, record=True, file=io.StringIO(), no_color=True)
    show(narrow, result_table(plan_for(tmp_path), "tiny", [run, run], None))
    told = narrow.export_text()
    assert "…" not in told and "  steps  5.0+4.0\n" in told and "fpi-gd ×3\n" in told
    assert max(len(line) for line in told.splitlines()) <= 40


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "multilabel", "--help"]])
def test_help_is_whole_in_a_narrow_window(arguments: list[str]) -> None:
    environment = {**os.environ, "COLUMNS": "40", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "energynet", *arguments]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True).stdout
    cut = told.replace("[ARGS]...", "").replace("0 … N-1", "")
    assert "…" not in cut and "..." not in cut and "\x1b" not in told
    assert max(len(line) for line in told.splitlines()) <= 50


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith(f"energynet {energynet.__version__}, torch ")


def test_an_epoch_in_words() -> None:
    assert describe(Epoch(1, 1.0, 0.5, 0.2)) == "loss 1.000, F1 50.0"


def test_python_m_energynet_runs() -> None:
    told = subprocess.run([sys.executable, "-m", "energynet", "--help"], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and "run" in told.stdout

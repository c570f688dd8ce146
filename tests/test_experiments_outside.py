"""A task, a rival and a data set of a user, run from an empty folder against the installed wheel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from energynet.experiments.find import find_rival, find_task, place_of
from energynet.experiments.multilabel import MultiLabel
from energynet.experiments.runs import load_model

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "docs" / "my_study.py"


def test_the_example_is_short_and_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len([line for line in STUDY.read_text().splitlines() if line]) <= 40
    shutil.copy(STUDY, tmp_path / "my_study.py")
    monkeypatch.chdir(tmp_path)
    task = find_task("my_study.py:Slopes")
    assert place_of(task) == f"{tmp_path.resolve() / 'my_study.py'}:Slopes" and find_task(place_of(task)) is task
    assert find_rival("my_study.py:TwoLayers", MultiLabel).name == "two-layers"


@pytest.mark.slow
def test_the_example_runs_from_an_empty_folder_with_the_installed_wheel(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site, place = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
    subprocess.run([*pip, "install", "--no-deps", "-t", str(site), str(next(wheels.glob("*.whl")))], check=True)
    place.mkdir()
    shutil.copy(STUDY, place)
    rng = np.random.default_rng(0)
    X = (rng.random((60, 8)) > 0.5).astype(np.uint8)
    (place / "my_set").mkdir()
    np.savez(place / "my_set" / "my_set.npz", X_train=X, Y_train=X[:, :3], X_test=X, Y_test=X[:, :3], n_features=8, n_labels=3)

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        command = [sys.executable, "-m", "energynet", "run", *arguments]
        return subprocess.run(command, cwd=place, env=environment, check=True, capture_output=True, text=True).stdout

    told = run("my_study.py:Slopes", "--seeds", "2", "--updates", "100", "--out", "slopes")
    assert "line, test rows, 2 seeds" in told and "energy" in told
    assert "slopes, " not in told and (place / "slopes" / "energy" / "seed-1" / "curves.png").is_file()
    methods = ("--method", "my_study.py:TwoLayers", "sklearn-logistic", "--seeds", "1", "--updates", "400", "--jobs", "2")
    told = run("multilabel", "--data", "my_set", *methods, "--out", "labels")
    assert "two-layers" in told and "my_set, test rows, 1 seed" in told
    metrics = json.loads((place / "labels" / "two-layers" / "seed-0" / "metrics.json").read_text())
    assert metrics["test"]["example_f1"] > 0.9
    model, _ = load_model(place / "labels" / "two-layers" / "seed-0")
    assert sum(parameter.numel() for parameter in model.parameters()) == metrics["parameters"]

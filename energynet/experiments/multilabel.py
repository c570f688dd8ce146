"""The multi-label experiment: each method with each seed, its metrics on held-out rows and, once, on test rows."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .data import MultiLabelData
from .metrics import Figures, decide, figures
from .models import DEFAULT_EXPERTS, EnergyClassifier, MethodName, agreement
from .plot import plot_curves
from .results import RunFolder, read_json, write, write_json
from .training import Epoch, LossName, Recipe, Trainer, predict

AGREEMENT_ROWS = 256


@dataclass(frozen=True)
class Plan:
    """What the user asked for. `experts` 0 stands for each method's own number."""

    methods: tuple[MethodName, ...]
    loss: LossName
    seeds: int
    epochs: int
    experts: int
    out: Path
    resume: bool
    test: bool
    test_log: Path | None

    def recipes(self) -> list[Recipe]:
        """One recipe for each method and seed, in the order in which they are run."""
        return [
            Recipe(method, self.loss, seed, self.epochs, self._experts(method))
            for method in self.methods
            for seed in range(self.seeds)
        ]

    def _experts(self, method: MethodName) -> int:
        return self.experts if self.experts and method is not MethodName.LOGISTIC else DEFAULT_EXPERTS[method]


@dataclass(frozen=True)
class Watcher:
    """The callbacks for progress: at the start of a run, after each batch and after each epoch."""

    on_run: Callable[[Recipe, int, int], None]  # recipe, epochs done, batches an epoch
    on_batch: Callable[[], None]
    on_epoch: Callable[[Recipe, Epoch], None]


def run_one(data: MultiLabelData, plan: Plan, recipe: Recipe, watcher: Watcher) -> dict[str, Any]:
    """Train one method with one seed, or continue where an earlier call stopped, and write its folder.

    Args:
        data: the data set.
        plan: where results go, and whether test rows are used.
        recipe: what to train.
        watcher: the callbacks for progress.

    Returns:
        The contents of the run's `metrics.json`.

    Raises:
        ResumeError: when the folder holds a run and may not be continued.
        KeyboardInterrupt: passed on; the last finished epoch is saved, with its weights and curves.
    """
    folder = RunFolder(plan.out / recipe.method.value / f"seed-{recipe.seed}")
    rows = {"data": data.name, "fingerprint": data.fingerprint, "shape": [*data.features.shape, data.labels.shape[1]]}
    folder.begin({**rows, **asdict(recipe), "test": plan.test}, resume=plan.resume)
    if folder.metrics.is_file():
        return read_json(folder.metrics)
    trainer = Trainer(data, recipe)
    folder.restore(trainer)
    watcher.on_run(recipe, len(trainer.history), trainer.num_batches)
    began = time.perf_counter()
    try:
        while len(trainer.history) < recipe.epochs:
            epoch = trainer.run_epoch(watcher.on_batch)
            folder.save(trainer)
            watcher.on_epoch(recipe, epoch)
    finally:
        publish(folder, trainer, data.name)
    metrics = evaluate(trainer, data, plan)
    metrics["seconds"] = time.perf_counter() - began
    write_json(folder.metrics, metrics)
    return metrics


def publish(folder: RunFolder, trainer: Trainer, name: str) -> None:
    """Write the chosen weights and the curves of the epochs so far; nothing before the first."""
    if trainer.best is None:
        return
    recipe = trainer.recipe
    folder.save_model(trainer.best_model(), recipe.method, trainer.size, trainer.best.epoch.threshold)
    title = f"{name} · {recipe.method.value} · {recipe.loss.value} · seed {recipe.seed}"
    plot_curves({(recipe.method.value, recipe.seed): trainer.history}, title, folder.path / "curves.png")


def evaluate(trainer: Trainer, data: MultiLabelData, plan: Plan) -> dict[str, Any]:
    """The metrics of a finished run; this is the only place where test rows are used."""
    recipe, best, model = trainer.recipe, trainer.best, trainer.best_model()
    assert best is not None
    held_out = trainer.split.held_out
    threshold = best.epoch.threshold
    metrics: dict[str, Any] = {
        "method": recipe.method.value, "loss": recipe.loss.value, "seed": recipe.seed, "experts": recipe.experts,
        "epoch": best.epoch.epoch, "threshold": threshold,
        "held_out": asdict(figures(decide(predict(model, data.features[held_out]), threshold), data.labels[held_out])),
        "forward_steps": _mean([epoch.forward_steps for epoch in trainer.history]),
        "adjoint_steps": _mean([epoch.adjoint_steps for epoch in trainer.history]),
        "converged": _mean([epoch.converged for epoch in trainer.history]),
    }  # fmt: skip
    if isinstance(model, EnergyClassifier):
        error = agreement(model, data.features[held_out[:AGREEMENT_ROWS]])
        quantiles = torch.quantile(error, torch.tensor([0.5, 0.99], dtype=error.dtype)).tolist()
        metrics["agreement"] = {"rows": len(error), "median": quantiles[0], "99th percentile": quantiles[1]}
    if plan.test:
        tested = figures(decide(predict(model, data.test_features), threshold), data.test_labels)
        metrics["test"] = asdict(tested)
        log_test(plan.test_log, data.name, recipe, tested)
    return metrics


def log_test(path: Path | None, name: str, recipe: Recipe, tested: Figures) -> None:
    """Append one evaluation on test rows to the log, a JSON list.

    Args:
        path: the log; None for no log.
        name: the data set.
        recipe: what was trained.
        tested: the figures.
    """
    if path is None:
        return
    entry = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit(), "data": name}
    entries = [*read_log(path), {**entry, **asdict(recipe), "figures": asdict(tested)}]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(entries, indent=1) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The evaluations on test rows so far; empty without a log.

    Raises:
        ValueError: when the file holds no JSON list.
    """
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}; expected a list of evaluations.")
    return entries


def _commit() -> str:
    """The checkout's commit, marked when the working tree differs from it; "unknown" outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

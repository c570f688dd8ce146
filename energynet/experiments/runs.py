"""One run: one method with one seed, trained, judged on held-out rows and, once, on test rows."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from .board import write_board
from .find import find_rival, find_task, place_of
from .fits import Setup
from .log import log_test
from .plot import plot_curves
from .results import RunFolder, read_json, write_json, write_tensors
from .solves import mean, take_solves
from .task import Rival
from .trainer import Round, Trainer


@dataclass(frozen=True)
class Plan:
    """Where results go, and what test rows may be used for."""

    out: Path
    resume: bool = False
    test: bool = True
    test_log: Path | None = None
    tuned: bool = False
    tensorboard: bool = False

    def folder(self, setup: Setup) -> RunFolder:
        """The folder of one run."""
        return RunFolder(self.out / setup.rival.name / f"seed-{setup.seed}", writes=setup.processes.is_main)

    def tuning_file(self, rival: Rival) -> Path:
        """What `--tune` chose for a method, and from what."""
        return self.out / rival.name / "tuning.json"


@dataclass(frozen=True)
class Watcher:
    """The callbacks for progress: at the start of a run with the updates done, after each update and after each round."""

    on_run: Callable[[Setup, int], None]
    on_update: Callable[[], None]
    on_round: Callable[[Setup, Round], None]


def run_one(setup: Setup, plan: Plan, watcher: Watcher) -> dict[str, Any]:
    """Train one method with one seed, or continue where an earlier call stopped, and write its folder.

    Args:
        setup: what to train.
        plan: where results go, and whether test rows are used.
        watcher: the callbacks for progress.

    Returns:
        The contents of the run's `metrics.json`.

    Raises:
        ResumeError: when the folder holds a run and may not be continued.
        KeyboardInterrupt: passed on; the last finished round is saved, with its weights and curves.
    """
    folder = plan.folder(setup)
    if folder.metrics.is_file() and plan.resume:
        folder.begin(describe(setup, plan), resume=True)
        return read_json(folder.metrics)
    trainer = train(setup, plan, watcher)
    began = time.perf_counter()
    model = trainer.final_model()
    seconds = time.perf_counter() - began
    if not folder.writes:
        return {}
    save_model(folder, setup, model, trainer.best)
    metrics = judge(trainer, model, plan)
    metrics["seconds"] += seconds
    write_json(folder.metrics, metrics)
    return metrics


def train(setup: Setup, plan: Plan, watcher: Watcher) -> Trainer:
    """Train one method with one seed to the end of its budget or patience, from where its folder stands."""
    folder = plan.folder(setup)
    folder.begin(describe(setup, plan), resume=plan.resume)
    trainer = Trainer(setup)
    folder.restore(trainer)
    watcher.on_run(setup, trainer.history[-1].updates if trainer.history else 0)
    try:
        while not trainer.finished:
            one = trainer.run_round(watcher.on_update)
            folder.save(trainer)
            if plan.tensorboard and folder.writes:
                write_board(folder.path, trainer.history)
            watcher.on_round(setup, one)
    finally:
        _publish(folder, trainer)
    return trainer


def describe(setup: Setup, plan: Plan) -> dict[str, Any]:
    """What a run's result depends on, as JSON values."""
    data, task = setup.data, setup.task
    shape = [*data.train.inputs.shape, *data.train.targets.shape[1:]]
    return {
        "task": place_of(type(task)), "data": data.name, "fingerprint": data.fingerprint, "shape": shape,
        "method": setup.rival.name, "rival": place_of(type(setup.rival)), "seed": setup.seed, **asdict(task.options),
        **asdict(setup.rates), "test": plan.test,
    }  # fmt: skip


def judge(trainer: Trainer, model: nn.Module, plan: Plan) -> dict[str, Any]:
    """The metrics of a finished run; this is the only place where test rows are used."""
    setup, best, history = trainer.setup, trainer.best, trainer.history
    assert best is not None
    task, data = setup.task, setup.data
    metrics: dict[str, Any] = {
        "task": task.name, "data": data.name, "method": setup.rival.name, "seed": setup.seed,
        "options": asdict(task.options), "rates": asdict(setup.rates), "folds": len(trainer.splits),
        "tuning_seconds": read_json(plan.tuning_file(setup.rival))["seconds"] if plan.tuned else None,
        "chosen_round": best.round, "rounds": len(history), "chosen_updates": best.updates, "updates": history[-1].updates,
        "still_rising": trainer.still_rising, "calibration": best.calibration, "held_out": best.figures,
        "forward_steps": mean([one.forward_steps for one in history]),
        "adjoint_steps": mean([one.adjoint_steps for one in history]),
        "converged": mean([one.converged for one in history]),
        "failed_updates": sum(one.failed for one in history), "seconds": history[-1].seconds,
        "peak_memory_mib": max(one.memory_mib for one in history),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "diagnostics": setup.rival.diagnose(model, trainer.held_out),
    }  # fmt: skip
    if plan.test:
        take_solves(model)
        output = task.predict_test(model, data.test)
        metrics["test_solves"] = asdict(take_solves(model))
        metrics["test"] = task.evaluate(output, data.test, best.calibration)
        log_test(plan.test_log, setup, metrics["test"])
    task.pictures(model, data, plan.folder(setup).path)
    return metrics


def save_model(folder: RunFolder, setup: Setup, model: nn.Module, best: Round | None) -> None:
    """Save the weights of a model, and what `load_model` needs to build it again."""
    tensors = model.state_dict()
    write_tensors(folder.path / "model.safetensors", tensors, {})
    write_json(folder.path / "model.json", {
        "task": place_of(type(setup.task)), "rival": place_of(type(setup.rival)), "size": asdict(setup.task.size(setup.data)),
        "options": asdict(setup.task.options), "calibration": best.calibration if best else {},
        "shapes": {name: list(value.shape) for name, value in tensors.items()},
    })  # fmt: skip


def load_model(folder: Path) -> tuple[nn.Module, dict[str, float]]:
    """Build a trained model again from `model.json` and `model.safetensors`, without pickle.

    Args:
        folder: the folder of one run.

    Returns:
        The model in evaluation mode, and what held-out rows chose for it, such as its threshold.

    Raises:
        FileNotFoundError: when the folder holds no model.
    """
    described = read_json(folder / "model.json")
    task = find_task(described["task"])
    rival = find_rival(described["rival"], task)
    model = rival.build(task.size_class(**described["size"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), described["calibration"]


def _publish(folder: RunFolder, trainer: Trainer) -> None:
    """Write the chosen weights and the curves of the rounds so far; nothing before the first."""
    if trainer.best is None or not folder.writes:
        return
    setup = trainer.setup
    save_model(folder, setup, trainer.chosen_model(), trainer.best)
    title = f"{setup.data.name} · {setup.rival.name} · seed {setup.seed}"
    plot_curves({(setup.rival.name, setup.seed): trainer.history}, type(setup.task), title, folder.path / "curves.png")

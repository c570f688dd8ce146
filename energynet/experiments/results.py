"""The results folder: configuration, history, metrics and weights, without pickle and never half written."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .models import Classifier, MethodName, Size, build
from .training import Best, Epoch, Trainer


class ResumeError(RuntimeError):
    """A folder holds a run with another configuration, or one that must not be overwritten."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run: one method with one seed.

    `checkpoint.safetensors` is one file, written last and atomically, and all that a resumed run reads; the others are
    for people and for other programs.
    """

    path: Path

    @property
    def checkpoint(self) -> Path:
        """Everything the next epoch depends on."""
        return self.path / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        """The run's final figures; there once the run is finished."""
        return self.path / "metrics.json"

    def begin(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Write the configuration, or compare it with the one that is there.

        Args:
            config: what the run's result depends on, as JSON values.
            resume: whether the folder may hold an earlier part of the same run.

        Raises:
            ResumeError: when the folder holds a run and `resume` is not set, or it holds another run.
        """
        stored = self.path / "config.json"
        if stored.is_file():
            if not resume:
                raise ResumeError(f"{self.path} already holds a run. Add --resume to continue it, or give another --out.")
            _compare(read_json(stored), config, stored)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(stored, config)

    def save(self, trainer: Trainer) -> None:
        """Save the state after an epoch: the history, then the checkpoint."""
        write(self.path / "history.csv", history_text(trainer.history))
        tensors, progress = _pack(trainer)
        write_tensors(self.checkpoint, tensors, {"progress": json.dumps(progress)})

    def restore(self, trainer: Trainer) -> bool:
        """Put the last saved state into a new trainer of the same configuration.

        Returns:
            Whether there was one.
        """
        if not self.checkpoint.is_file():
            return False
        with safe_open(self.checkpoint, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
        _unpack(trainer, load_file(self.checkpoint), progress)
        return True

    def save_model(self, model: Classifier, method: MethodName, size: Size, threshold: float) -> None:
        """Save the weights of the chosen epoch, and what `load_model` needs to rebuild the model."""
        tensors = model.state_dict()
        write_tensors(self.path / "model.safetensors", tensors, {})
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        described = {"method": method.value, "size": asdict(size), "threshold": threshold, "shapes": shapes}
        write_json(self.path / "model.json", described)


def load_model(folder: Path) -> tuple[Classifier, float]:
    """Rebuild a trained classifier from `model.json` and `model.safetensors`, without pickle.

    Args:
        folder: the folder of one run.

    Returns:
        The classifier in evaluation mode, and its decision threshold.

    Raises:
        FileNotFoundError: when the folder holds no finished model.
    """
    described = read_json(folder / "model.json")
    model = build(MethodName(described["method"]), Size(**described["size"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), float(described["threshold"])


def history_text(history: list[Epoch]) -> str:
    """The epochs as CSV, floats in full precision, empty where a method has no such figure."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    return buffer.getvalue()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: when the file does not hold one; names file and place.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Restore it, or start in another folder.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected an object.")
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    write(path, json.dumps(value, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write text atomically."""
    replace_by(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors atomically as safetensors."""
    plain = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    replace_by(path, lambda temporary: save_file(plain, temporary, metadata))


def replace_by(path: Path, write_to: Callable[[Path], object]) -> None:
    """Write a temporary file beside `path`, then move it there in one step: readers see the old file or the new."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _compare(stored: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    now = json.loads(json.dumps(config))
    differing = [name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)]
    if differing:
        changed = "; ".join(f"{name}: {stored.get(name)!r} there, {now.get(name)!r} now" for name in differing)
        raise ResumeError(f"--resume: {path} belongs to another run ({changed}). Give the same options, or another --out.")


def _pack(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"model/{name}": value for name, value in trainer.model.state_dict().items()}
    tensors |= {f"averaged/{name}": value for name, value in trainer.averaged.state_dict().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    best = trainer.best
    tensors |= {f"best/{name}": value for name, value in best.weights.items()} if best else {}
    tensors["rng_state"] = trainer.rng_state
    history = [asdict(epoch) for epoch in trainer.history]
    return tensors, {
        "history": history,
        "best": asdict(best.epoch) if best else None,
        "num_updates": trainer.num_updates,
    }


def _unpack(trainer: Trainer, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    trainer.model.load_state_dict(_under(tensors, "model/"))
    trainer.averaged.load_state_dict(_under(tensors, "averaged/"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _under(tensors, "optimizer/").items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = value
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": state})
    trainer.history = [Epoch(**epoch) for epoch in progress["history"]]
    trainer.best = Best(Epoch(**progress["best"]), _under(tensors, "best/")) if progress["best"] else None
    trainer.num_updates = progress["num_updates"]
    trainer.rng_state = tensors["rng_state"].to(torch.uint8)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

"""The results folder: configuration, history, metrics and weights, without pickle and never half written."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .fits import under
from .trainer import Round, Trainer


class ResumeError(RuntimeError):
    """A folder holds a run with another configuration, or one that must not be overwritten."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run: one method with one seed.

    `checkpoint.safetensors` is one file, written last and atomically, and all that a resumed run reads; the others are
    for people and for other programs.
    """

    path: Path
    writes: bool = True  # False in all but the main one of several processes

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
        if not self.writes:
            return
        stored = self.path / "config.json"
        if stored.is_file():
            if not resume:
                raise ResumeError(f"{self.path} already holds a run. Add --resume to continue it, or give another --out.")
            _compare(read_json(stored), json.loads(json.dumps(config)), stored)  # a tuple comes back as a list
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(stored, config)

    def save(self, trainer: Trainer) -> None:
        """Save the state after a round: the history, then the checkpoint."""
        if not self.writes:
            return
        write(self.path / "history.csv", history_text(trainer.history))
        tensors = {f"best/{name}": value for name, value in trainer.best_weights.items()}
        for part, fit in enumerate(trainer.fits):
            tensors |= {f"fit-{part}/{name}": value for name, value in fit.state().items()}
        progress = {"history": [asdict(one) for one in trainer.history], "best": trainer.best and trainer.best.round}
        write_tensors(self.checkpoint, tensors, {"progress": json.dumps(progress)})

    def restore(self, trainer: Trainer) -> bool:
        """Put the last saved state into a new trainer of the same configuration.

        Returns:
            Whether there was one.
        """
        if not self.checkpoint.is_file():
            return False
        tensors = load_file(self.checkpoint)
        for part, fit in enumerate(trainer.fits):
            fit.restore(under(tensors, f"fit-{part}/"))
        trainer.best_weights = under(tensors, "best/")
        trainer.history = self.history()
        best = self._progress()["best"]
        trainer.best = trainer.history[best - 1] if best else None
        return True

    def history(self) -> list[Round]:
        """The rounds so far; empty before the first."""
        return [Round(**one) for one in self._progress()["history"]] if self.checkpoint.is_file() else []

    def _progress(self) -> dict[str, Any]:
        with safe_open(self.checkpoint, framework="pt") as file:
            progress: dict[str, Any] = json.loads(file.metadata()["progress"])
        return progress


def history_text(history: Sequence[Round]) -> str:
    """The rounds as CSV, floats in full precision, empty where a method has no such figure."""
    names = [field.name for field in fields(Round)]
    rows = [_flat(one) for one in history]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _flat(one: Round) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in asdict(one).items():
        row |= value if isinstance(value, dict) else {name: value}
    return row


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

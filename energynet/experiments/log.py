"""The log of evaluations on test rows, a JSON list: whoever looks at test rows leaves a line here."""

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .fits import Setup
from .results import write


def log_test(path: Path | None, setup: Setup, figures: Mapping[str, float]) -> None:
    """Append one evaluation on test rows to the log.

    Args:
        path: the log; None for no log.
        setup: what was trained.
        figures: the figures on test rows.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit(), "task": setup.task.name,
        "data": setup.data.name, "method": setup.rival.name, "seed": setup.seed, **asdict(setup.task.options),
        **asdict(setup.rates), "figures": dict(figures),
    }  # fmt: skip
    with _locked(path):
        write(path, json.dumps([*read_log(path), entry], indent=1) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The evaluations on test rows so far; empty without a log.

    Raises:
        ValueError: when the file holds no JSON list.
    """
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}; expected a list of evaluations.")
    return entries


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Runs in other processes may write to the same log."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"energynet-{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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

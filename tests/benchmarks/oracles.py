"""Errors that are reached against other people's software: ``python -m tests.benchmarks.oracles``.

Runs ``tests/test_oracles.py`` and prints, for each test, the largest relative error of values and of first and second
derivatives beside the one that the test allows.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from . import command

FILE = Path(__file__).parents[1] / "test_oracles.py"


class Recorder:
    """Takes the errors of each test from ``test_oracles.ERRORS``."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, tuple[float, float]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        item.module.ERRORS.clear()
        result = yield
        found: dict[int, tuple[float, float]] = {}
        for order, error, allowed in item.module.ERRORS:
            worst, tightest = found.get(order, (0.0, float("inf")))
            found[order] = max(worst, error), min(tightest, allowed)
        self.rows[item.name] = found
        return result


def main() -> None:
    parser = command.parser("oracles", __doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recorder = Recorder()
    failed = pytest.main([str(FILE), "-q", "-rN", "--no-header", "-p", "no:cacheprovider"], plugins=[recorder])
    print(f"{'':92}" + "".join(f"{name:>22}" for name in ("value", "first", "second")))
    for name, row in recorder.rows.items():
        cells = (f"{row[k][0]:.1e} of {row[k][1]:.0e}" if k in row else "-" for k in range(3))
        print(f"{name.removeprefix('test_')[:90].replace('_', ' '):92}" + "".join(f"{cell:>22}" for cell in cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(recorder.rows, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()

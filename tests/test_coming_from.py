"""Every pair of snippets in docs/coming_from.md gives the same value and gradient, where the other library is installed."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "coming_from.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
LIBRARIES = ("torchdeq", "jaxopt", "cvxpylayers", "theseus", "TorchOpt")
PRINT = "\nimport json\nprint('NUMBERS', json.dumps([value.flatten().tolist(), gradient.flatten().tolist()]))\n"


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", SECTIONS[name], flags=re.DOTALL)


@pytest.fixture
def keep_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def ours(name: str) -> list[list[float]]:
    found: dict[str, torch.Tensor] = {}
    exec(compile(snippets(name)[1], f"coming_from.md, {name}", "exec"), found)
    return [found["value"].flatten().tolist(), found["gradient"].flatten().tolist()]


def theirs(name: str) -> list[list[float]]:
    """In a process of its own: some change defaults for good, and warn in their own ways."""
    command = [sys.executable, "-W", "ignore", "-c", snippets(name)[0] + PRINT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (told,) = re.findall("^NUMBERS (.*)$", done.stdout, flags=re.MULTILINE)
    return json.loads(told)


def test_every_library_has_a_pair() -> None:
    assert tuple(SECTIONS) == LIBRARIES
    assert all(len(snippets(name)) == 2 for name in LIBRARIES)


@pytest.mark.parametrize("name", LIBRARIES)
def test_ours_runs(name: str, keep_dtype: None) -> None:
    value, gradient = ours(name)
    assert len(value) == len(gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_theirs_gives_the_same(name: str, keep_dtype: None) -> None:
    if find_spec(name.lower()) is None:
        pytest.skip(f"{name} is not installed")
    for one, other in zip(theirs(name), ours(name), strict=True):
        assert one == pytest.approx(other, abs=1e-4)

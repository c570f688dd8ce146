"""Every example that draws random numbers, in pages and docstrings, runs whatever the seed is."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch

import energynet

ROOT = Path(__file__).parent.parent
RANDOM = re.compile(r"torch\.(rand|nn\.(Linear|Conv|Sequential))")
OTHERS = re.compile(r"^(?:from|import) (?!torch\b|energynet\b)", flags=re.M)  # another library's half of a pair
SEEDS = 100


def blocks() -> list[tuple[str, str]]:
    """Python in the pages that stands by itself, and draws random numbers."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for k, source in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)):
            if RANDOM.search(source) and "energynet import" in source and not OTHERS.search(source):
                found.append((f"{page.name}, block {k}", re.sub(r"torch\.manual_seed\(\d+\)", "pass", source)))
    return found


def docstrings() -> list[doctest.DocTest]:
    """Docstrings that draw random numbers."""
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    for module in pkgutil.walk_packages(energynet.__path__, "energynet."):
        if "experiments" in module.name or "__main__" in module.name:
            continue
        with contextlib.suppress(ImportError):
            found += finder.find(importlib.import_module(module.name), module.name)
    return [test for test in found if any(RANDOM.search(e.source) for e in test.examples)]


def run_block(source: str, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, f"seed {seed}", "exec"), {"__name__": "example"})


def run_docstring(test: doctest.DocTest, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        said = io.StringIO()
        runner.run(test, out=said.write, clear_globs=False)
        assert not runner.failures, f"seed {seed}: {said.getvalue()}"


BLOCKS, DOCSTRINGS = blocks(), docstrings()


def test_there_are_such_examples() -> None:
    assert len(BLOCKS) >= 2 and len(DOCSTRINGS) >= 3


@pytest.mark.parametrize("source", [b[1] for b in BLOCKS], ids=[b[0] for b in BLOCKS])
def test_an_example_of_a_page_runs_with_other_seeds(source: str) -> None:
    run_block(source, range(1, 4))


@pytest.mark.parametrize("test", DOCSTRINGS, ids=[t.name for t in DOCSTRINGS])
def test_an_example_of_a_docstring_runs_with_other_seeds(test: doctest.DocTest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_docstring(test, range(1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("source", [b[1] for b in BLOCKS], ids=[b[0] for b in BLOCKS])
def test_an_example_of_a_page_runs_with_many_seeds(source: str) -> None:
    run_block(source, range(SEEDS))


@pytest.mark.slow
@pytest.mark.parametrize("test", DOCSTRINGS, ids=[t.name for t in DOCSTRINGS])
def test_an_example_of_a_docstring_runs_with_many_seeds(test: doctest.DocTest) -> None:
    run_docstring(test, range(SEEDS))

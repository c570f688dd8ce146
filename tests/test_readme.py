"""The README's Python runs and prints what it says, its commands exist once, and the tests and pages it names are there."""

import re
import shlex
from pathlib import Path

import pytest

import energynet

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("source", blocks("python"))
def test_python_block_runs(source: str) -> None:
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


def test_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == blocks("text")[0]


def test_example_has_at_most_twelve_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 12


def test_each_command_is_one_line_and_pins_torch() -> None:
    commands = blocks("sh")
    assert len(commands) == 2
    for command in commands:
        assert command.count("\n") == 1
        words = shlex.split(command)
        assert "-c" in words and words[words.index("-c") + 1] == "constraints.txt"
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_each_claim_names_a_test() -> None:
    table = CONTRIBUTING.split("| Claim | Tests |\n|---|---|\n")[1].split("\n\n")[0]
    for row in table.splitlines():
        assert re.search(r"\| `tests/test_\w+\.py(::\w+)?` \|$", row), row


@pytest.mark.parametrize("figure", ["speed", "readme"])
def test_front_page_has_figures_before_the_commands(figure: str) -> None:
    assert README.index(f"](docs/figures/{figure}.png)") < README.index("```sh")


def test_citation_names_version_and_paper() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {energynet.__version__}\n" in citation and "arXiv:2002.02868" in citation


def test_named_tests_exist() -> None:
    named = re.findall(r"`(tests/test_\w+\.py)(?:::(\w+))?`", CONTRIBUTING)
    assert named
    for path, function in named:
        assert (ROOT / path).is_file(), path
        assert f"def {function}" in (ROOT / path).read_text(), f"{path}::{function}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target

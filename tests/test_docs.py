"""The documentation: links lead somewhere, every public name and every source is on its page, what is drawn is current."""

import ast
import builtins
import hashlib
import importlib
import inspect
import json
import operator
import re
import runpy
from pathlib import Path

import pytest
from test_structure import imports

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("api/*.md")])
MODULES = ["energynet", "energynet.constraints", "energynet.diagnostics", "energynet.losses", "energynet.regularizers",
           "energynet.plotting", "energynet.testing", "energynet.testing.strategies", "energynet.energies"]  # fmt: skip
API = "\n".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
STRAIGHT_LINE = runpy.run_path(str(DOCS / "figures" / "make_straight_line.py"))
BUILT = {"_generated", "tutorials"}  # folders that exist in a build only


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```(python|sh|text|\{code-cell\}).*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)", prose):
        file = (page.parent / target).resolve() if target else page
        if target.split("/")[0] in BUILT:
            continue
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in slugs(file) or f"{anchor}\n" in API, f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_web_addresses_are_well_formed(page: Path) -> None:
    for address in re.findall(r"https?://[^\s)>\"]+", page.read_text()):
        assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./#?=%~+-]*)?", address), f"{page.name}: {address}"


def public_names() -> list[str]:
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        defined = [n for n, thing in vars(module).items() if not n.startswith("_") and getattr(thing, "__module__", "") == name]
        found += [f"{name}.{n}" for n in getattr(module, "__all__", defined)]
    return sorted(set(found))


@pytest.mark.parametrize("name", public_names())
def test_public_name_is_documented(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    if not (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)):
        return  # a constant or an alias of types
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if getattr(importlib.import_module("energynet"), attribute, None) is thing:  # offered twice, shown once
        name = f"energynet.{attribute}"
    shown = f":: {name}\n" in API or f".. automodule:: {module}\n   :members:" in API or f".. automodule:: {name}\n" in API
    assert shown, f"{name} is on no page of docs/api"


def test_snippets_of_troubleshooting_are_complete() -> None:
    """Each runs by itself: no name in it comes from another snippet."""
    page = (DOCS / "troubleshooting.md").read_text()
    for cell in re.findall(r"^```\{code-cell\} python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        if ":tags: [remove-cell]" in cell:
            continue
        tree = ast.walk(ast.parse(re.sub(r"^:tags:.*\n", "", cell)))
        read, known = set[str](), {*dir(builtins)}
        for node in tree:
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else known).add(node.id)
            elif isinstance(node, ast.alias):
                known.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.arg):
                known.add(node.arg)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
        assert read <= known, f"{read - known} in\n{cell}"


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=lambda page: page.name)
def test_api_page_begins_with_a_table_of_what_it_shows(page: Path) -> None:
    text = page.read_text()
    table = text.split(".. autosummary::\n   :nosignatures:\n\n")[1].split("\n\n")[0].split()
    assert table == re.findall(r"^\.\. auto(?:class|function):: (\S+)$", text, flags=re.M)
    overview = (DOCS / "api.md").read_text()
    assert f"(api/{page.name})" in overview
    for name in table:
        assert f"`{name.removeprefix('energynet.')}`" in overview, f"{name} is not in the table of docs/api.md"


def test_every_source_is_in_the_references() -> None:
    references = (DOCS / "references.md").read_text()
    for file in (ROOT / "energynet").rglob("*.py"):
        if "experiments" in file.parts:
            continue
        for source in re.findall(r"Source:(.*?)(?:\"\"\"|\n\n)", file.read_text(), flags=re.DOTALL):
            for name, year in re.findall(r"([\w'’]+)(?: et al\.)? \((\d{4})\)", source):
                assert re.search(rf"{name}( et al\.)? \({year}\)", references), f"{file.name}: {name} ({year})"


def test_drawing_is_what_its_script_draws() -> None:
    assert STRAIGHT_LINE["drawing"]() == (DOCS / "figures" / "straight_line.svg").read_text()


def imported_by(module: str) -> set[str]:
    """What a module of the package imports, or the files of a folder together."""
    path = ROOT / "energynet" / Path(*module.split("."))
    return set[str]().union(*(imports(file) for file in (path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")])))


@pytest.mark.parametrize("start, end", STRAIGHT_LINE["ARROWS"])
def test_each_arrow_of_the_drawing_is_an_import(start: str, end: str) -> None:
    assert any(f"{name}.".startswith(f"energynet.{end}.") for name in imported_by(start))


def test_chart_of_speed_shows_what_was_measured() -> None:
    """If this fails, run ``python docs/figures/make_speed_chart.py``."""
    digest = hashlib.sha256((DOCS / "results" / "benchmarks.json").read_bytes()).hexdigest()
    assert digest.encode() in (DOCS / "figures" / "speed.png").read_bytes()


def test_readme_figure_is_small() -> None:
    assert (DOCS / "figures" / "readme.png").stat().st_size < 200_000


def test_tables_from_json(tmp_path: Path) -> None:
    tables = runpy.run_path(str(DOCS / "tables.py"))
    row = {"case": "W1", "task": "forward", "contender": "a", "steps": "9", "error": 1e-9, "right": True, "seconds": 0.002,
           "ratio": 0.5, "first_seconds": None, "peak_mib": 3.0, "target": 0.6, "note": ""}  # fmt: skip
    wrong = {**row, "contender": "b", "right": False, "seconds": 0.1, "note": "x|y"}
    work = {"title": "one", "date": "2026-01-01", "machine": {"cores": 2}, "versions": {"torch": "2"}, "rows": [row, wrong]}
    sizes = [{**row, "case": f"batch {size}", "contender": name} for size in (1, 16) for name in ("a", "b")]
    (tmp_path / "benchmarks.json").write_text(json.dumps({"W1": work, "W6": {**work, "title": "scaling of W2", "rows": sizes}}))
    choosing = {"tables": [{"name": "solvers", "columns": ["a", "b"], "rows": [["1", "2"]], "note": "Counts."}]}
    (tmp_path / "choosing.json").write_text(json.dumps(choosing))
    tables["write"](tmp_path, tmp_path / "out", ["01_first"])
    told = (tmp_path / "out" / "benchmarks.md").read_text()
    assert "| a | 9 | 1e-09 | 2 | 0.5 | ≤ 0.6 | 3 |  |" in told
    assert "b (wrong)" in told and "x\\|y" in told and "compile" not in told
    grown = (tmp_path / "out" / "scaling.md").read_text()
    assert "Scaling of W2." in grown and "| batch 16 | 2 | 2 | 3 | 3 |" in grown and "batch" not in told
    assert "| 1 | 2 |" in (tmp_path / "out" / "choosing-solvers.md").read_text()
    assert "Nothing has been recorded" in (tmp_path / "out" / "choosing-adjoints.md").read_text()
    assert "01_first.ipynb" in (tmp_path / "out" / "notebooks.md").read_text()


@pytest.mark.parametrize("path", sorted((DOCS / "results").glob("*.json")), ids=lambda path: path.name)
def test_recorded_results_are_readable(path: Path) -> None:
    json.loads(path.read_text())


def test_references_name_what_exists() -> None:
    named = re.findall(r"`([\w.]+)`", (DOCS / "references.md").read_text())
    assert len(named) > 30
    importlib.import_module("energynet.energies")
    for name in named:
        assert operator.attrgetter(name)(importlib.import_module("energynet")), name

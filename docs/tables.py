"""Tables of measurements, from docs/results/*.json to Markdown; conf.py writes them to docs/_generated at each build."""

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

NONE_YET = "*Nothing has been recorded yet; `{command}` writes this table.*\n"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; numbers to the right."""
    columns, rows = list(columns), [list(row) for row in rows]
    bar = ["---" if k == 0 else "---:" for k in range(len(columns))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (columns, bar, *rows)) + "\n"


def measured(path: Path, command: str) -> dict[str, str]:
    """Name to Markdown, of a file ``{"tables": [{"name", "columns", "rows", "note"}, ...]}``."""
    if not path.is_file():
        return {}
    tables = json.loads(path.read_text())["tables"]
    return {t["name"]: f"{table(t['columns'], t['rows'])}\n{t['note']} Printed by `{command}`.\n" for t in tables}


def races(path: Path, command: str) -> str:
    """Every workload of ``{"W1": {"title", "date", "machine", "versions", "rows"}, ...}``, see tests/benchmarks/report.py."""
    if not path.is_file():
        return NONE_YET.format(command=command)
    parts = []
    for name, work in json.loads(path.read_text()).items():
        if name == SCALING:
            continue
        title = work["title"][:1].upper() + work["title"][1:]
        parts += [f"### {name}\n", f"{title}.\n"]
        for (case, task), rows in groupby(work["rows"], key=lambda row: (row["case"], row["task"])):
            heading = (task if case == name else f"{case}, {task}").replace("*", "\\*")
            parts += [f"**{heading[:1].upper()}{heading[1:]}**\n", *_race(list(rows))]
        parts.append(f"{_circumstances(work)} Printed by `{command}`.\n")
    return "\n".join(parts)


def compile_times(path: Path, command: str) -> str:
    """One sentence: how long the first calls of compiled solves took."""
    if not path.is_file():
        return NONE_YET.format(command=command)
    rows = [row for name, work in json.loads(path.read_text()).items() if name != SCALING for row in work["rows"]]
    seconds = [row["first_seconds"] for row in rows if "compiled" in row["contender"] and row["first_seconds"]]
    if not seconds:
        return ""
    return (f"In the recorded measurements, the first call of a compiled solve took {min(seconds):.0f} to {max(seconds):.0f} s "
            "longer than the later ones.\n")  # fmt: skip


SCALING = "W6"
"""The workload that is a table of its own: what it costs at each size."""


def scaling(path: Path, command: str) -> str:
    """Time and memory of each contender at each size, one row a size."""
    work = json.loads(path.read_text()).get(SCALING) if path.is_file() else None
    if work is None:
        return NONE_YET.format(command=f"{command} --only {SCALING}")
    names = list(dict.fromkeys(row["contender"] for row in work["rows"]))
    cells = []
    for case, rows in groupby(work["rows"], key=lambda row: row["case"]):
        by = {row["contender"]: row for row in rows}
        found = [by.get(name, {"seconds": None, "peak_mib": None}) for name in names]
        times = [_number(row["seconds"], "{:.3g}", 1e3) for row in found]
        cells.append([case, *times, *(_number(row["peak_mib"], "{:.0f}") for row in found)])
    columns = ["", *(f"{name}, ms" for name in names), *(f"{name}, MiB" for name in names)]
    title = work["title"][:1].upper() + work["title"][1:]
    return f"{title}.\n\n{table(columns, cells)}\n{_circumstances(work)} Printed by `{command} --only {SCALING}`.\n"


def _circumstances(work: dict[str, Any]) -> str:
    """When and where a workload was measured, in one sentence."""
    facts = {**work["machine"], **work["versions"]}
    shown = [f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if isinstance(value, str | int | float)]
    return f"Measured on {work['date']}: {', '.join(shown)}."


def _race(rows: list[dict[str, Any]]) -> list[str]:
    """The table of those that ran, and a sentence about those that did not."""
    ran = [row["error"] is not None or row["seconds"] is not None for row in rows]
    absent = [f"{_name(row)} ({row['note'].removeprefix('cannot: ')})" for row, yes in zip(rows, ran) if not yes]
    rows = [row for row, yes in zip(rows, ran) if yes]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": _name,
        "steps": lambda row: row["steps"],
        "error": lambda row: _number(row["error"], "{:.0e}"),
        "ms": lambda row: _number(row["seconds"], "{:.3g}", 1e3),
        "ratio": lambda row: _number(row["ratio"], "{:.3g}"),
        "target": lambda row: _number(row["target"], "≤ {:.3g}"),
        "compile, s": lambda row: _number(row["first_seconds"], "{:.1f}"),
        "memory, MiB": lambda row: _number(row["peak_mib"], "{:.0f}"),
        "note": lambda row: row["note"],
    }
    cells = {heading: [show(row) for row in rows] for heading, show in columns.items()}
    shown = [heading for heading in cells if any(cells[heading])]
    result = table(shown, zip(*(cells[heading] for heading in shown)))
    return [result, f"Not timed: {'; '.join(absent)}.\n"] if absent else [result]


def _name(row: dict[str, Any]) -> str:
    """Our rows are in bold."""
    name = f"**{row['contender']}**" if row["contender"].startswith("energynet") else row["contender"]
    return name if row["right"] or row["seconds"] is None else f"{name} (wrong)"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(unit * value)


def write(results: Path, folder: Path, notebooks: Iterable[str]) -> None:
    """The generated parts of pages, each a file that a page includes."""
    choosing = "python -m tests.benchmarks.choosing --json docs/results/choosing.json"
    parts = {f"choosing-{name}": NONE_YET.format(command=choosing) for name in ("solvers", "adjoints", "tolerances")}
    parts["choosing-drivers"] = ""  # times, which only a quiet machine should record
    parts |= {f"choosing-{name}": text for name, text in measured(results / "choosing.json", choosing).items()}
    parts["benchmarks"] = races(results / "benchmarks.json", "python -m tests.benchmarks")
    parts["accelerator"] = races(results / "accelerator.json", "python -m tests.benchmarks.accelerator")
    parts["scaling"] = scaling(results / "benchmarks.json", "python -m tests.benchmarks")
    parts["compile-times"] = compile_times(results / "benchmarks.json", "python -m tests.benchmarks")
    parts["notebooks"] = "".join(f"- {{download}}`{name}.ipynb <tutorials/notebooks/{name}.ipynb>`\n" for name in notebooks)
    folder.mkdir(exist_ok=True)
    for name, text in parts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")

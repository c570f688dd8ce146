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
    for name, seen in json.loads(path.read_text()).items():
        if name == SCALING:
            continue
        parts.append(f"## {name}: {seen['title']}\n")
        for (case, task), rows in groupby(seen["rows"], key=lambda row: (row["case"], row["task"])):
            heading = (task if case == name else f"{case}, {task}").replace("*", "\\*")
            parts += [f"**{heading}**\n", *_race(list(rows))]
        parts.append(f"{seen['date']}; {_told(seen['machine'])}; {_told(seen['versions'])}. Printed by `{command}`.\n")
    return "\n".join(parts)


SCALING = "W6"
"""The workload that is a table of its own: what it costs at each size."""


def scaling(path: Path, command: str) -> str:
    """Time and memory of each contender at each size, one row a size."""
    seen = json.loads(path.read_text()).get(SCALING) if path.is_file() else None
    if seen is None:
        return NONE_YET.format(command=f"{command} --only {SCALING}")
    names = list(dict.fromkeys(row["contender"] for row in seen["rows"]))
    cells = []
    for case, rows in groupby(seen["rows"], key=lambda row: row["case"]):
        by = {row["contender"]: row for row in rows}
        found = [by.get(name, {"seconds": None, "peak_mib": None}) for name in names]
        times = [_number(row["seconds"], "{:.3g}", 1e3) for row in found]
        cells.append([case, *times, *(_number(row["peak_mib"], "{:.0f}") for row in found)])
    columns = ["", *(f"{name}, ms" for name in names), *(f"{name}, MiB" for name in names)]
    told = f"{seen['date']}; {_told(seen['machine'])}; {_told(seen['versions'])}. Printed by `{command} --only {SCALING}`."
    title = seen["title"][:1].upper() + seen["title"][1:]
    return f"{title}.\n\n{table(columns, cells)}\n{told}\n"


def _told(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if isinstance(value, str | int | float))


def _race(rows: list[dict[str, Any]]) -> list[str]:
    """The table of those that ran, and a sentence about those that did not."""
    ran = [row["error"] is not None or row["seconds"] is not None for row in rows]
    absent = [f"{row['contender']} {row['note']}" for row, yes in zip(rows, ran) if not yes]
    rows = [row for row, yes in zip(rows, ran) if yes]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: row["contender"] if row["right"] or row["seconds"] is None else f"{row['contender']} (wrong)",
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
    return [result, "; ".join(absent) + ".\n"] if absent else [result]


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
    parts["notebooks"] = "".join(f"- {{download}}`{name}.ipynb <tutorials/notebooks/{name}.ipynb>`\n" for name in notebooks)
    folder.mkdir(exist_ok=True)
    for name, text in parts.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")

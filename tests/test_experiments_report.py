"""Tables over runs in four formats, the paired test, and the command that prints them."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from energynet.experiments import cli
from energynet.experiments.find import place_of
from energynet.experiments.multilabel import MultiLabel
from energynet.experiments.report import ReportError, by_method, compare, find_runs, result_table
from energynet.experiments.results import write_json, write_tensors
from energynet.experiments.trainer import Round


def run_of(method: str = "fpi-gd", seed: int = 0, f1: float = 0.5, **changes: Any) -> dict[str, Any]:
    figure = {"example_f1": f1, "micro_f1": 0.5, "macro_f1": 0.25, "exact_match": 0.125}
    solves = {"forward_steps": 5.0, "adjoint_steps": 4.0, "converged": 1.0} if method == "fpi-gd" else dict.fromkeys(
        ("forward_steps", "adjoint_steps", "converged")
    )  # fmt: skip
    return {
        "data": "tiny", "method": method, "options": {"experts": 3}, "test": figure, "held_out": figure, "seed": seed,
        "seconds": 2.0, "still_rising": False, "failed_updates": 0, "diagnostics": {}, **solves, **changes,
    }  # fmt: skip


def six_runs() -> list[dict[str, Any]]:
    values = {"fpi-gd": (0.47, 0.48, 0.49), "mlp": (0.46, 0.48, 0.47)}
    return [run_of(method, seed, f1) for method, own in values.items() for seed, f1 in enumerate(own)]


def test_table_fits_a_narrow_terminal() -> None:
    runs = [run_of(), run_of(seed=1, still_rising=True, tuning_seconds=7.0, failed_updates=2)]
    console = Console(width=80, record=True, file=io.StringIO(), no_color=True)
    result_table(MultiLabel, runs, logged=5).show(console)
    assert max(len(line) for line in console.export_text().splitlines()) <= 80
    narrow = Console(width=40, record=True, file=io.StringIO(), no_color=True)
    result_table(MultiLabel, runs).show(narrow)
    told = narrow.export_text()
    assert "…" not in told and "  steps 5.0+4.0\n" in told and "fpi-gd ×3 ↑\n" in told and "still rising" in told
    assert "2 updates had a solve" in " ".join(told.split())
    assert max(len(line) for line in told.splitlines()) <= 40


def test_mean_deviation_and_steps_in_four_formats() -> None:
    table = result_table(MultiLabel, six_runs(), logged=6)
    (head, first, second) = csv.reader(io.StringIO(table.csv()))
    assert head == ["method", "ex-F1", "mi-F1", "ma-F1", "exact", "s", "steps", "conv."]
    assert first == ["fpi-gd ×3", "48.0±1.0", "50.0±0.0", "25.0±0.0", "12.5±0.0", "2", "5.0+4.0", "100.0"]
    assert second[:2] == ["mlp ×3", "47.0±1.0"] and second[-2:] == ["–", "–"]
    assert "| fpi-gd ×3 | 48.0±1.0 |" in table.markdown() and table.markdown().startswith("**tiny, test rows, 3 seeds**")
    assert r"fpi-gd $\times$3 & 48.0$\pm$1.0 &" in table.latex() and table.latex().count(r"\\") == 3
    assert "log so far: 6." in table.markdown()


def test_test_rows_are_reported_only_where_all_have_them() -> None:
    one, other = run_of(), run_of(seed=1)
    del other["test"]
    assert "held-out rows" in result_table(MultiLabel, [one, other]).title


def test_runs_with_other_options_are_rows_of_their_own() -> None:
    runs = [run_of(options={"experts": 1, "loss": loss}) for loss in ("bce", "f1")]
    assert list(by_method(runs)) == ["fpi-gd (loss bce)", "fpi-gd (loss f1)"]


def test_paired_test_equals_scipy_and_pairs_by_seed() -> None:
    runs = six_runs()
    expected = ttest_rel([47, 48, 49], [46, 48, 47]).pvalue
    told = compare(MultiLabel, [*reversed(runs), run_of("mlp", 7)], "fpi-gd ×3", "mlp ×3")
    assert told == f"fpi-gd ×3 − mlp ×3: +1.00 ± 1.00 ex-F1 over 3 seeds, p = {expected:.2g} (paired t test, test rows)."
    with pytest.raises(ReportError, match="no run of 'icnn'; there are runs of fpi-gd ×3, mlp ×3"):
        compare(MultiLabel, runs, "icnn", "mlp ×3")
    with pytest.raises(ReportError, match="1 seeds in common"):
        compare(MultiLabel, [run_of(), run_of("mlp")], "fpi-gd ×3", "mlp ×3")
    same = [run_of(method, seed) for method in ("a", "b") for seed in (0, 1)]
    assert "p = 1 " in compare(MultiLabel, same, "a ×3", "b ×3")


def write_runs(folder: Path) -> None:
    history = [Round(1, 50, 1.0, {"example_f1": 0.4}, {}), Round(2, 100, 0.5, {"example_f1": 0.5}, {})]
    for run in six_runs():
        path = folder / "out" / run["method"] / f"seed-{run['seed']}"
        path.mkdir(parents=True)
        write_json(path / "metrics.json", run)
        write_json(path / "config.json", {"task": place_of(MultiLabel)})
        progress = {"history": [vars(one) for one in history], "best": 2}
        write_tensors(path / "checkpoint.safetensors", {}, {"progress": json.dumps(progress)})
    tuning = folder / "out" / "tuning" / "point" / "mlp" / "seed-0"
    tuning.mkdir(parents=True)
    write_json(tuning / "metrics.json", run_of("mlp", 9))


def test_the_command_prints_tables_and_writes_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path)
    assert len(find_runs([tmp_path, tmp_path / "out"])) == 6
    plots = tmp_path / "plots"
    options = ["--compare", "fpi-gd ×3", "mlp ×3", "--plots", str(plots)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["energynet", "report", str(tmp_path), "--format", "markdown", *options])
        cli.main()
        told = capsys.readouterr().out
        assert "| mlp ×3 | 47.0±1.0 |" in told and "paired t test" in told
        assert {path.name for path in plots.iterdir()} == {"tiny-curves.png", "tiny-times.png"}
        patch.setattr(sys, "argv", ["energynet", "report", str(tmp_path / "plots")])
        with pytest.raises(SystemExit):
            cli.main()
    assert "no finished run below" in capsys.readouterr().err

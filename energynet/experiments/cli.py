"""The command line: ``energynet run multilabel``."""

import os
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from energynet import __version__

from .data import MultiLabelData, digits, load
from .models import MethodName
from .multilabel import Plan, read_log, run_one
from .plot import plot_curves
from .report import Display, agreement_lines, result_table, show
from .results import ResumeError, RunFolder, write_json
from .training import LossName, Trainer

LOG_FOLDER = Path("docs/results")

# Plain help and errors: boxes and columns cut words short in a narrow window.
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
run = typer.Typer(help="Run an experiment.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(run, name="run")


class MethodChoice(StrEnum):
    """The methods, or all of them."""

    FPI_GD = "fpi-gd"
    FPI_NN = "fpi-nn"
    MLP = "mlp"
    LOGISTIC = "logistic"
    ALL = "all"

    def methods(self) -> tuple[MethodName, ...]:
        """The methods that the choice stands for."""
        return tuple(MethodName) if self is MethodChoice.ALL else (MethodName(self.value),)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"energynet {__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    """Define an energy, get a differentiable solver: the experiments."""


@run.callback()
def _run() -> None:
    """Run an experiment."""


@run.command(short_help="Multi-label classification.")
def multilabel(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", envvar="ENERGYNET_DATA", help="Folder with NAME.npz or Mulan's files. Default: scikit-learn's digits."
        ),
    ] = None,
    method: Annotated[MethodChoice, typer.Option(help="What to train.")] = MethodChoice.ALL,
    loss: Annotated[LossName, typer.Option(help="Cross-entropy, or soft F1 with a little of it.")] = LossName.BCE,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Train with the seeds 0 … N-1.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Epochs; held-out rows choose the best.")] = 20,
    experts: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            show_default=False,
            help="Networks whose scores a method combines. Default: five for fpi-gd and fpi-nn, one for mlp.",
        ),
    ] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Results folder. Default: a new one under results/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    threads: Annotated[
        int, typer.Option(min=0, metavar="N", show_default=False, help="CPU threads of PyTorch. Default: its own choice.")
    ] = 0,
    test: Annotated[bool, typer.Option("--test/--no-test", help="Evaluate on test rows, once, at the end.")] = True,
    test_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Log of test evaluations. With --data and a folder docs/results: test_log.json in it."),
    ] = None,
) -> None:
    """Multi-label classification: an energy, a fixed-point network and their rivals under one protocol.

    Trains each method with each seed, prints a table, and writes figures, weights and curves into a folder.

    A first look: energynet run multilabel --seeds 1 --epochs 5
    """
    console = Console()
    if resume and out is None:
        raise typer.BadParameter("--resume needs --out, the folder of the run to go on with.")
    if threads:
        torch.set_num_threads(threads)
    data_set = _load(data)
    if test_log is None and data is not None and LOG_FOLDER.is_dir():
        test_log = LOG_FOLDER / "test_log.json"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = out or Path("results") / f"multilabel-{data_set.name}-{loss.value}-{stamp}"
    plan = Plan(method.methods(), loss, seeds, epochs, experts, folder, resume, test, test_log)
    _finish(console, plan, data_set, _train(console, plan, data_set))


def _load(folder: Path | None) -> MultiLabelData:
    try:
        return digits() if folder is None else load(folder)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def _train(console: Console, plan: Plan, data: MultiLabelData) -> list[dict[str, Any]]:
    try:
        with Display(console) as display:
            return [run_one(data, plan, recipe, display.watcher()) for recipe in plan.recipes()]
    except ResumeError as error:
        console.print(f"Error: {error}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as interrupt:
        message = f"Interrupted. Finished epochs are saved; continue with the same options and --resume --out {plan.out}"
        console.print(message, soft_wrap=True, markup=False)
        raise typer.Exit(130) from interrupt


def _finish(console: Console, plan: Plan, data: MultiLabelData, metrics: list[dict[str, Any]]) -> None:
    """Write the summary of all runs and show it."""
    logged = None if plan.test_log is None else len(read_log(plan.test_log))
    write_json(plan.out / "metrics.json", metrics)
    histories = {}
    for recipe in plan.recipes():
        trainer = Trainer(data, recipe)
        RunFolder(plan.out / recipe.method.value / f"seed-{recipe.seed}").restore(trainer)
        histories[recipe.method.value, recipe.seed] = trainer.history
    plot_curves(histories, f"{data.name} · {plan.loss.value} loss", plan.out / "curves.png")
    show(console, result_table(plan, data.name, metrics, logged))
    for line in agreement_lines(metrics):
        console.print(line, highlight=False)
    console.print(f"Results in {plan.out}{os.sep}, curves in {plan.out / 'curves.png'}", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command line."""
    app()

"""The command line: ``energynet run multilabel``, ``energynet list``."""

import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from energynet import __version__

from .board import TensorBoardMissingError
from .data import Data
from .denoise_command import denoise
from .display import QUIET, Display
from .find import TASKS, NotFoundError, find_rival, find_task
from .fits import Setup
from .jobs import Job, JobError, run_jobs
from .log import read_log
from .picture_files import PictureError
from .plot import plot_curves
from .processes import started_processes
from .report import ReportError, diagnosis_lines, result_table
from .report_command import report
from .results import ResumeError, read_json, write_json
from .runs import Plan, run_one
from .task import Rival, Task
from .tuning import tuned_rates

LOG_FOLDER = Path("docs/results")

USAGE = """usage: energynet COMMAND ...

Define an energy, get a differentiable
solver: the experiments.

  energynet run TASK [OPTIONS]
      Train and compare methods. TASK is
      one of ours, FILE.py:CLASS or
      MODULE:CLASS.
  energynet run TASK --help
      The options of a task.
  energynet run denoise [--image FILE]
      Denoise, deblur or inpaint a picture
      with a trained energy.
  energynet list
      Tasks, methods and data sets.
  energynet report FOLDER... [OPTIONS]
      Tables, tests and plots over runs.
  energynet --version
      The versions."""


@dataclass(frozen=True)
class Where:
    """What is run, on what, and where results go."""

    method: tuple[str, ...] = ()
    """Methods to train, or all."""
    data: Path | None = None
    """Folder of a data set; none: ENERGYNET_DATA, or the embedded one."""
    seeds: int = 3
    """Train with this many seeds."""
    first_seed: int = 0
    """The first of the seeds."""
    out: Path | None = None
    """Results folder; none: a new one under results."""
    resume: bool = False
    """Continue the run in --out."""
    tune: bool = False
    """Choose each method's learning rate and weight decay on held-out rows first, from one small grid."""
    jobs: int = 1
    """Processes; each trains one method with one seed at a time."""
    test: bool = True
    """Evaluate on test rows, once, at the end."""
    test_log: Path | None = None
    """Log of test evaluations; none: test_log.json in docs/results if that folder exists and --data is given."""
    threads: int = 1
    """CPU threads of PyTorch; 0: its own choice. More than one pay for large models only."""
    device: str = ""
    """Such as cpu or cuda; none: cuda where there is one."""
    compile: bool = False
    """Run solves as compiled programs, and compile networks."""
    tensorboard: bool = False
    """Write curves as TensorBoard's events into each run's folder."""


PART = "--part"
"""Marks the processes of --jobs, which leave the summary to the one that started them."""
INTERRUPTED = "Interrupted. Finished rounds are saved; continue with the same options and --resume --out {out}"


class CommandError(Exception):
    """What the user asked for cannot be done; printed without a traceback."""


def run(arguments: Sequence[str]) -> None:
    """``energynet run TASK ...``."""
    part = PART in arguments
    arguments = [word for word in arguments if word != PART]
    if arguments and arguments[0] == "denoise":
        return denoise(arguments[1:])
    if not arguments or arguments[0].startswith("-"):
        print(USAGE)
        raise SystemExit(0 if "--help" in arguments or "-h" in arguments else 2)
    task_class = find_task(arguments[0])
    where, options = parse(task_class, arguments)
    if where.resume and where.out is None:
        raise CommandError("--resume needs --out, the folder of the run to go on with.")
    if where.threads:
        torch.set_num_threads(where.threads)
    task = task_class(options)
    if _used(task, where, named=bool(where.method) or _data_named(arguments)):
        return
    rivals = rivals_of(task_class, where.method)
    device = torch.device(where.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data, processes = _load(task, where.data).to(device), started_processes()
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = where.out or Path("results") / f"{task.name}-{data.name}-{stamp}"
    log = LOG_FOLDER / "test_log.json" if where.test_log is None and where.data and LOG_FOLDER.is_dir() else where.test_log
    seeds = range(where.first_seed, where.first_seed + where.seeds)
    setups = [
        Setup(task, data, rival, options.rates(rival), seed, processes, where.compile) for rival in rivals for seed in seeds
    ]
    plan = Plan(out, where.resume, where.test, log, where.tune, where.tensorboard)
    console = Console(quiet=not processes.is_main)
    if where.jobs > 1:
        run_jobs(console, jobs_of(arguments, where, setups, out), where.jobs)
        setups = [replace(setup, rates=tuned_rates(setup, plan, QUIET)) for setup in setups] if where.tune else setups
        metrics = [read_json(plan.folder(setup).metrics) for setup in setups]
    else:
        metrics = train(console, plan, setups, tune=where.tune)
    if not part and processes.is_main:
        finish(console, plan, setups, metrics)


def parse(task: type[Task], arguments: Sequence[str]) -> tuple[Where, Any]:
    """The options of a task's command line, made from the dataclasses."""
    if {"-h", "--help"} & set(arguments):
        print(describe(task) + "\n")  # tyro would not wrap it
    usual = task.options_class() if _data_named(arguments) else task.first_look()
    parts: list[Any] = [("where", Where, field(default_factory=Where)), ("training", task.options_class, field(default=usual))]
    parsed: Any = tyro.cli(
        make_dataclass("Command", parts, frozen=True), args=list(arguments[1:]), prog=f"energynet run {arguments[0]}",
        description="", config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    return parsed.where, parsed.training


def describe(task: type[Task]) -> str:
    """A task and its methods, wrapped at the width of the terminal."""
    names = ", ".join(rival.name for rival in task.rivals())
    told = [*(inspect.getdoc(task) or task.name).split("\n\n"), f"Methods: {names}; yours: FILE.py:CLASS or MODULE:CLASS."]
    width = shutil.get_terminal_size().columns - 1
    return "\n\n".join(textwrap.fill(part, width) for part in told)


def rivals_of(task: type[Task], names: Sequence[str]) -> list[Rival]:
    """The rivals that the command line names."""
    if not names:
        return list(task.usual())
    return [rival for name in names for rival in (task.rivals() if name == "all" else [find_rival(name, task)])]


def train(console: Console, plan: Plan, setups: Sequence[Setup], *, tune: bool) -> list[dict[str, Any]]:
    """All runs, one after the other; their `metrics.json`."""
    metrics = []
    try:
        with Display(console) as display:
            for setup in setups:
                if tune:
                    setup = replace(setup, rates=tuned_rates(replace(setup, seed=0), plan, display.watcher()))
                metrics.append(run_one(setup, plan, display.watcher()))
    except KeyboardInterrupt as interrupt:
        console.print(INTERRUPTED.format(out=plan.out), soft_wrap=True, markup=False)
        raise SystemExit(130) from interrupt
    return metrics


def jobs_of(arguments: Sequence[str], where: Where, setups: Sequence[Setup], out: Path) -> list[Job]:
    """One process per method and seed; with --tune the first seed of a method comes first, and tunes it."""
    jobs: dict[str, Job] = {}
    for setup in setups:
        own = ["--method", setup.place, "--seeds", "1", "--first-seed", str(setup.seed), "--out", str(out)]
        first = jobs.get(setup.rival.name) if where.tune else None
        job = Job(f"{setup.rival.name} seed {setup.seed}", (*arguments, *own, "--jobs", "1", PART), after=first)
        jobs[setup.rival.name if first is None else job.name] = job
    return list(jobs.values())


def finish(console: Console, plan: Plan, setups: Sequence[Setup], metrics: list[dict[str, Any]]) -> None:
    """Write the summary of all runs and show it."""
    task, data = setups[0].task, setups[0].data
    write_json(plan.out / "metrics.json", metrics)
    histories = {(setup.rival.name, setup.seed): plan.folder(setup).history() for setup in setups}
    plot_curves(histories, type(task), data.name, plan.out / "curves.png")
    logged = None if plan.test_log is None else len(read_log(plan.test_log))
    result_table(type(task), metrics, logged).show(console)
    for line in diagnosis_lines(metrics):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"Results in {plan.out}{os.sep}, curves in {plan.out / 'curves.png'}", soft_wrap=True, highlight=False)


def list_all(arguments: Sequence[str]) -> None:
    """``energynet list``: tasks, their methods, data sets in a folder."""
    for name in TASKS:
        task = find_task(name)
        print(f"{name}: {(task.__doc__ or '').splitlines()[0]}")
        for rival in task.rivals():
            print(f"  {rival.name}: {(type(rival).__doc__ or '').splitlines()[0]}")
    folder = Path(arguments[0] if arguments else os.environ.get("ENERGYNET_DATA", "."))
    found = sorted({path.parent for pattern in ("*.npz", "*-train.arff") for path in folder.glob(f"*/{pattern}")})
    print(f"data sets under {folder}: {', '.join(path.name for path in found) or 'none'}")


def _load(task: Task, folder: Path | None) -> Data:
    given = os.environ.get("ENERGYNET_DATA")
    try:
        return task.load(Path(given) if folder is None and given else folder)
    except (OSError, ValueError) as error:
        raise CommandError(f"--data: {error}") from error


def _used(task: Task, where: Where, *, named: bool) -> bool:
    """Whether finished weights were applied to what the options name."""
    console = Console()
    try:
        return task.use(
            where.out, named=named, say=lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False)
        )
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error


def _data_named(arguments: Sequence[str]) -> bool:
    return bool(os.environ.get("ENERGYNET_DATA")) or any(word.split("=")[0] == "--data" for word in arguments)


def main() -> None:
    """Run the command line."""
    command, arguments = (sys.argv[1:] or ["--help"])[0], sys.argv[2:]
    commands = {"run": run, "list": list_all, "report": report}
    try:
        if command == "--version":
            print(f"energynet {__version__}, torch {torch.__version__}")
        elif command in commands:
            commands[command](arguments)
        else:
            print(USAGE)
            raise SystemExit(0 if command in ("--help", "-h") else 2)
    except (CommandError, JobError, NotFoundError, PictureError, ReportError, ResumeError, TensorBoardMissingError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from error

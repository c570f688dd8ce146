"""What a person sees while methods are trained: a progress bar, and plain lines where the output is not a terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .fits import Setup
from .runs import Watcher
from .task import Task
from .trainer import Round

QUIET = Watcher(lambda setup, done: None, lambda: None, lambda setup, one: None)
"""Shows nothing."""


class Display:
    """A progress bar on a terminal, one line per round elsewhere; a context manager.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=8), TextColumn("{task.percentage:3.0f} %"))
        self.progress = Progress(*columns, TextColumn("{task.fields[figures]}"), console=console, transient=True)
        self.bar: TaskID | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def watcher(self) -> Watcher:
        """The callbacks that training is given."""
        return Watcher(self._run, self._update, self._round)

    def _run(self, setup: Setup, done: int) -> None:
        if self.bar is not None:
            self.progress.remove_task(self.bar)
        name = f"{setup.rival.name} seed {setup.seed}"
        self.bar = self.progress.add_task(name, total=setup.task.options.updates, completed=done, figures="")

    def _update(self) -> None:
        pass

    def _round(self, setup: Setup, one: Round) -> None:
        text = describe(setup.task, one)
        if self.bar is not None:
            self.progress.update(self.bar, completed=one.updates, figures=text)
        if not self.console.is_terminal:
            run = f"{setup.rival.name} seed {setup.seed} update {one.updates}/{setup.task.options.updates}"
            self.console.print(f"{run}: {text}", soft_wrap=True, highlight=False)


def describe(task: Task, one: Round) -> str:
    """One round's figures in a line.

    >>> from energynet.experiments.multilabel import MultiLabel, MultiLabelOptions
    >>> describe(MultiLabel(MultiLabelOptions()), Round(1, 50, 0.5, {"example_f1": 0.25}, {}, 6.0, 4.0, 1.0))
    'loss 0.500, ex-F1 25.0, steps 6.0 + 4.0, converged 100.0 %'
    """
    column = task.columns[task.choice]
    text = f"loss {one.loss:.3f}, {column.heading} {column.write(one.figures[task.choice])}"
    if one.forward_steps is None or one.converged is None:
        return text
    adjoint = 0.0 if one.adjoint_steps is None else one.adjoint_steps
    failed = f", {one.failed} updates failed" if one.failed else ""
    return f"{text}, steps {one.forward_steps:.1f} + {adjoint:.1f}, converged {100 * one.converged:.1f} %{failed}"

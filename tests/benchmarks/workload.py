"""What the command line runs: a workload states its title, its targets and its rows."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from .contenders.handwritten import HandWritten
from .contenders.ours import OursCompiled, OursEager
from .contenders.plain import Plain
from .contenders.unrolled import Unrolled
from .harness import Contender, Options, Row, Watcher, compete
from .work import Problem, Task, prepare


class Workload(ABC):
    """One of W1 to W6."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def run(self, options: Options, watch: Watcher) -> list[Row]:
        """Check and time everybody."""


class FixedStepWorkload(Workload):
    """Everybody takes the same gradient steps; ratios to the plain eager loop are compared with the targets."""

    tasks: ClassVar[dict[Task, float | None]]

    @abstractmethod
    def problem(self, options: Options) -> Problem:
        """The data, of toy size if the options say quick."""

    def run(self, options: Options, watch: Watcher) -> list[Row]:
        watch.doing(f"{self.name}: the float64 reference, by dense Hessians")
        work = prepare(self.problem(options), [Task.FORWARD, *(t for t in self.tasks if t is not Task.FORWARD)])
        return compete(self.name, work, self.tasks, contenders(options), options, watch)


def contenders(options: Options) -> Sequence[Contender]:
    return [Plain(), HandWritten(), Unrolled(), OursEager(), OursCompiled()]

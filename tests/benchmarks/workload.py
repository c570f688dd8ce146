"""What the command line runs: a workload states its title, its targets and its rows."""

import importlib.util
from abc import ABC, abstractmethod
from typing import ClassVar

from .contenders.handwritten import HandWritten
from .contenders.jaxopt import JaxOpt
from .contenders.optimistix import Optimistix
from .contenders.ours import OursCompiled, OursEager
from .contenders.plain import Plain
from .contenders.torchdeq import TorchDEQ
from .contenders.torchopt import TorchOpt
from .contenders.unrolled import Unrolled
from .contenders.xitorch import XiTorch
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


def contenders(options: Options) -> list[Contender]:
    """All that take part: the peers that are installed come last."""
    own: list[Contender] = [Plain(), HandWritten(), Unrolled(), OursEager(), OursCompiled()]
    return own if options.skip_peers else [*own, *installed_peers()]


PEERS = {"torchdeq": TorchDEQ, "torchopt": TorchOpt, "xitorch": XiTorch, "jaxopt": JaxOpt, "optimistix": Optimistix}


def installed_peers() -> list[Contender]:
    return [peer() for module, peer in PEERS.items() if importlib.util.find_spec(module)]


def missing_peers() -> list[str]:
    return [module for module in PEERS if not importlib.util.find_spec(module)]

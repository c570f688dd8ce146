"""What a solver is: a pure rule for moving, which knows nothing of tolerances and adjoints."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from energynet.step import Kind

_REMEDY = {
    Kind.MAP: "Picard, Anderson, Broyden or Nesterov",
    Kind.ENERGY: "LBFGS, Newton, NewtonCG, GradientDescent, Nesterov, Anderson, Broyden or Picard",
    Kind.BOUNDED: "ProjectedLBFGS, Nesterov, Anderson, Broyden or Picard",
    Kind.LINEAR: "GMRES, BiCGSTAB, Dense, Picard, Anderson or Broyden",
    Kind.SYMMETRIC: "ConjugateGradient, MINRES, GMRES, BiCGSTAB, Dense, Picard, Anderson or Broyden",
}


class Solver(ABC):
    """How to move. Stateless; `init` and `update` are pure functions on tensors of fixed shapes.

    A state is a named tuple with at least ``residual``, the optimality condition at the current point.
    """

    solves: ClassVar[frozenset[Kind]] = frozenset(Kind)
    exact_residual: ClassVar[bool] = True
    """Whether ``state.residual`` was evaluated at the current point and not carried along by a recurrence."""

    descends: ClassVar[bool] = False
    """Whether the energy never rises for long, so that a large gradient is no sign of divergence."""

    follows: ClassVar[bool] = False
    """Whether its steps are those of the map, so that what is left of F is soon its slowest part."""

    sees_saddles: ClassVar[bool] = False
    """Whether, of a symmetric linear equation, it fails where it meets a direction of negative curvature."""

    contracts: ClassVar[bool] = False
    """Whether, of a map, it converges only where that contracts."""

    measures_first: ClassVar[bool] = False
    """Whether it finds the length of its first step by itself, so that no step size is estimated where none is given."""

    unrollable: ClassVar[bool] = True
    """Whether derivatives may be taken through its updates."""

    @abstractmethod
    def init(self, problem: Any, x0: Tensor) -> Any:
        """The state at ``x0``, ``(*batch, n)``; the `Problem` is of a kind in ``solves``."""

    @abstractmethod
    def update(self, problem: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next point and its state."""

    def merit(self, state: Any, size: Tensor) -> Tensor:
        """What decides which iterate is best, ``(*batch)``: the smaller, the better. ``size`` is the residual's norm."""
        return size

    def breakdown(self, state: Any) -> Tensor | None:
        """``(*batch)`` bool: samples for which the solver has detected that there is no answer; None: it cannot detect that."""
        return None

    def stalled(self, state: Any) -> Tensor | None:
        """``(*batch)`` bool: samples that cannot be improved further in this dtype; None: it cannot detect that."""
        return None

    def check(self, kind: Kind) -> None:
        """Raise for a problem that this solver cannot solve, before its first step.

        Raises:
            TypeError: naming the solvers that can.
        """
        if kind not in self.solves:
            raise TypeError(f"{type(self).__name__} cannot solve {kind.value}. Use {_REMEDY[kind]}.")

"""The interface of solvers: pure update rules, independent of tolerances and adjoints."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from energynet.energy import EnergyLike
from energynet.step import Kind

_REMEDY = {
    Kind.MAP: "Picard, Anderson, Broyden or Nesterov",
    Kind.ENERGY: "LBFGS, Newton, NewtonCG, GradientDescent, Nesterov, Anderson, Broyden or Picard",
    Kind.BOUNDED: "ProjectedLBFGS, Nesterov, Anderson, Broyden or Picard",
    Kind.LINEAR: "GMRES, BiCGSTAB, Dense, Picard, Anderson or Broyden",
    Kind.SYMMETRIC: "ConjugateGradient, MINRES, GMRES, BiCGSTAB, Dense, Picard, Anderson or Broyden",
}


class Solver(ABC):
    """A stateless update rule: `init` and `update` are pure functions on tensors of fixed shapes.

    A state is a named tuple with at least the field ``residual``, the optimality condition at the current point.
    """

    solves: ClassVar[frozenset[Kind]] = frozenset(Kind)
    exact_residual: ClassVar[bool] = True
    """Whether ``state.residual`` is evaluated at the current point, rather than updated by a recurrence."""

    descends: ClassVar[bool] = False
    """Whether the solver enforces a decrease of the energy, so that a large gradient does not indicate divergence."""

    follows: ClassVar[bool] = False
    """Whether its steps are those of the map, so that F is soon dominated by its slowest component."""

    sees_saddles: ClassVar[bool] = False
    """Whether it reports failure at a direction of negative curvature of a symmetric linear equation."""

    contracts: ClassVar[bool] = False
    """Whether it converges for a map only if the map contracts."""

    measures_first: ClassVar[bool] = False
    """Whether it determines the length of its first step itself, so that no step size has to be estimated."""

    unrollable: ClassVar[bool] = True
    """Whether its updates can be differentiated."""

    @abstractmethod
    def init(self, problem: Any, x0: Tensor) -> Any:
        """The state at ``x0``, ``(*batch, n)``; the `Problem` is of a kind in ``solves``."""

    @abstractmethod
    def update(self, problem: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next point and its state."""

    def merit(self, state: Any, size: Tensor) -> Tensor:
        """A measure of the quality of an iterate, ``(*batch)``; smaller is better. ``size`` is the norm of the residual."""
        return size

    def breakdown(self, state: Any) -> Tensor | None:
        """``(*batch)`` bool: samples for which the solver has detected that no solution exists; None: it cannot detect that."""
        return None

    def stalled(self, state: Any) -> Tensor | None:
        """``(*batch)`` bool: samples that cannot be improved further in this dtype; None: it cannot detect that."""
        return None

    def check(self, kind: Kind) -> None:
        """Raise an error, before the first step, for a problem that this solver cannot solve.

        Raises:
            TypeError: with the names of solvers that can solve it.
        """
        if kind not in self.solves:
            raise TypeError(f"{type(self).__name__} cannot solve {kind.value}. Use {_REMEDY[kind]}.")

    def require(self, energy: EnergyLike | None) -> None:
        """Raise TypeError for an energy that does not offer what this solver asks for, before its first step."""

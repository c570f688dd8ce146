"""Forward solvers, one a file."""

from energynet.solvers.anderson import Anderson
from energynet.solvers.base import Solver
from energynet.solvers.picard import Picard

__all__ = ["Anderson", "Picard", "Solver"]

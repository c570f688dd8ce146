"""Forward solvers, one per file."""

from energynet.solvers.anderson import Anderson
from energynet.solvers.base import Solver
from energynet.solvers.broyden import Broyden
from energynet.solvers.gradient_descent import BacktrackingStep, BarzilaiBorwein, FixedStep, GradientDescent, StepRule
from energynet.solvers.lagged_weights import LaggedWeights
from energynet.solvers.lbfgs import LBFGS
from energynet.solvers.line_search import Backtracking, LineSearch, StrongWolfe
from energynet.solvers.nesterov import Nesterov
from energynet.solvers.newton import Newton
from energynet.solvers.newton_cg import NewtonCG
from energynet.solvers.picard import Picard
from energynet.solvers.preconditioner import HessianBlocks, HessianDiagonal
from energynet.solvers.problem import Linear, Map, Minimization, Problem, Proximal
from energynet.solvers.projected_lbfgs import ProjectedLBFGS

__all__ = [
    "Anderson",
    "Backtracking",
    "BacktrackingStep",
    "BarzilaiBorwein",
    "Broyden",
    "FixedStep",
    "GradientDescent",
    "HessianBlocks",
    "HessianDiagonal",
    "LBFGS",
    "LaggedWeights",
    "Linear",
    "LineSearch",
    "Map",
    "Minimization",
    "Nesterov",
    "Newton",
    "NewtonCG",
    "Picard",
    "Problem",
    "ProjectedLBFGS",
    "Proximal",
    "Solver",
    "StepRule",
    "StrongWolfe",
]

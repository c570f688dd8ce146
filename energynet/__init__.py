"""energynet: define an energy, get a differentiable solver."""

from energynet.adjoint import ImplicitAdjoint, OneStepAdjoint, UnrolledAdjoint
from energynet.energy import Energy, gradient
from energynet.derivative import Adjoint, AdjointRecord, AdjointReport
from energynet.layer import FPI_GD, FPI_NN
from energynet.linear import ConjugateGradient
from energynet.probe import ImpureFunctionError, LostGradientError
from energynet.problem import Problem
from energynet.solution import ConvergenceError, ConvergenceWarning, Solution, Status
from energynet.solve import fixed_point, minimize
from energynet.solvers import Anderson, Picard, Solver
from energynet.step import DampedStep, GradientStep, MapStep, Step
from energynet.termination import Termination

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "AdjointRecord",
    "AdjointReport",
    "Anderson",
    "ConjugateGradient",
    "ConvergenceError",
    "ConvergenceWarning",
    "DampedStep",
    "Energy",
    "FPI_GD",
    "FPI_NN",
    "GradientStep",
    "ImplicitAdjoint",
    "ImpureFunctionError",
    "LostGradientError",
    "MapStep",
    "OneStepAdjoint",
    "Picard",
    "Problem",
    "Solution",
    "Solver",
    "Status",
    "Step",
    "Termination",
    "UnrolledAdjoint",
    "fixed_point",
    "gradient",
    "minimize",
]

"""energynet: define an energy, get a differentiable solver."""

from energynet import constraints, diagnostics, regularisers
from energynet.adjoint import ImplicitAdjoint, NeumannAdjoint, OneStepAdjoint, UnrolledAdjoint
from energynet.black_box import implicit
from energynet.compiled import CompilationError, Compiled
from energynet.derivative import Adjoint, AdjointRecord, AdjointReport
from energynet.driver import Driver, Eager
from energynet.energy import Energy, gradient
from energynet.layer import FPI_GD, FPI_NN
from energynet.linear import GMRES, MINRES, BiCGSTAB, ConjugateGradient, Dense
from energynet.probe import ImpureFunctionError, LostGradientError
from energynet.problem import Problem
from energynet.solution import ConvergenceError, ConvergenceWarning, Solution, Status, Trace
from energynet.solve import MultiStart, fixed_point, minimize
from energynet.solvers import (
    LBFGS,
    Anderson,
    Backtracking,
    BacktrackingStep,
    BarzilaiBorwein,
    Broyden,
    FixedStep,
    GradientDescent,
    LineSearch,
    Nesterov,
    Newton,
    NewtonCG,
    Picard,
    Solver,
    StepRule,
    StrongWolfe,
)
from energynet.step import DampedStep, GradientStep, Kind, MapStep, OptimalityStep, Prox, ProximalStep, Step
from energynet.termination import Termination
from energynet.warm_start import WarmStart

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "AdjointRecord",
    "AdjointReport",
    "Anderson",
    "Backtracking",
    "BacktrackingStep",
    "BarzilaiBorwein",
    "BiCGSTAB",
    "Broyden",
    "CompilationError",
    "Compiled",
    "ConjugateGradient",
    "ConvergenceError",
    "ConvergenceWarning",
    "DampedStep",
    "Dense",
    "Driver",
    "Eager",
    "Energy",
    "FPI_GD",
    "FPI_NN",
    "FixedStep",
    "GMRES",
    "GradientDescent",
    "GradientStep",
    "ImplicitAdjoint",
    "ImpureFunctionError",
    "Kind",
    "LBFGS",
    "LineSearch",
    "LostGradientError",
    "MINRES",
    "MapStep",
    "MultiStart",
    "Nesterov",
    "NeumannAdjoint",
    "Newton",
    "NewtonCG",
    "OneStepAdjoint",
    "OptimalityStep",
    "Picard",
    "Problem",
    "Prox",
    "ProximalStep",
    "Solution",
    "Solver",
    "Status",
    "Step",
    "StepRule",
    "StrongWolfe",
    "Termination",
    "Trace",
    "UnrolledAdjoint",
    "WarmStart",
    "constraints",
    "diagnostics",
    "fixed_point",
    "gradient",
    "implicit",
    "minimize",
    "regularisers",
]

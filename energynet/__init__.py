"""energynet: define an energy, get a differentiable solver."""

import contextlib

from energynet import constraints, diagnostics, losses, regularizers
from energynet.energy import Energy, gradient
from energynet.engine.adjoint import ImplicitAdjoint, NeumannAdjoint, OneStepAdjoint, UnrolledAdjoint
from energynet.engine.driver import Driver, Eager, Progress
from energynet.engine.purity import ImpureFunctionError, LostGradientError
from energynet.engine.root_gradient import Adjoint, AdjointReport
from energynet.engine.shared_state import ChangedFunctionError
from energynet.implicit import implicit
from energynet.layer import FPI_GD, FPI_NN
from energynet.linear import GMRES, MINRES, BiCGSTAB, ConjugateGradient, Dense
from energynet.proximal import Prox, ProximalStep
from energynet.solution import ConvergenceError, ConvergenceWarning, Solution, Status
from energynet.solve import MultiStart, fixed_point, minimize
from energynet.solvers import (
    LBFGS,
    Anderson,
    Backtracking,
    BarzilaiBorwein,
    Broyden,
    GradientDescent,
    HessianBlocks,
    HessianDiagonal,
    LaggedWeights,
    Nesterov,
    Newton,
    NewtonCG,
    Picard,
    ProjectedLBFGS,
    Solver,
    StrongWolfe,
)
from energynet.step import DampedStep, GradientStep, MapStep, OptimalityStep, Step
from energynet.termination import Termination
from energynet.warm_start import WarmStart

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "AdjointReport",
    "Anderson",
    "Backtracking",
    "BarzilaiBorwein",
    "BiCGSTAB",
    "Broyden",
    "ChangedFunctionError",
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
    "GMRES",
    "GradientDescent",
    "GradientStep",
    "HessianBlocks",
    "HessianDiagonal",
    "ImplicitAdjoint",
    "ImpureFunctionError",
    "LBFGS",
    "LaggedWeights",
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
    "Progress",
    "ProjectedLBFGS",
    "Prox",
    "ProximalStep",
    "Solution",
    "Solver",
    "Status",
    "Step",
    "StrongWolfe",
    "Termination",
    "UnrolledAdjoint",
    "WarmStart",
    "constraints",
    "diagnostics",
    "fixed_point",
    "gradient",
    "implicit",
    "losses",
    "minimize",
    "regularizers",
]

with contextlib.suppress(ModuleNotFoundError):  # everything else works without the compiler
    from energynet.compiled import CompilationError, Compiled

    __all__ += ["CompilationError", "Compiled"]

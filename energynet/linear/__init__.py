"""Linear solvers for the adjoint equation, one per file; the same loop runs them."""

from energynet.linear.bicgstab import BiCGSTAB
from energynet.linear.conjugate_gradient import ConjugateGradient
from energynet.linear.dense import Dense
from energynet.linear.gmres import GMRES
from energynet.linear.minres import MINRES

__all__ = ["GMRES", "MINRES", "BiCGSTAB", "ConjugateGradient", "Dense"]

"""Linear solvers of the adjoint equation, one a file, run by the same loop."""

from energynet.linear.conjugate_gradient import ConjugateGradient

__all__ = ["ConjugateGradient"]

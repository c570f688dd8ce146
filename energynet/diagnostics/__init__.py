"""Measures the conditioning of a problem and its solution: contraction, curvature, errors; and describes a solve in words.

Everything is measured per sample through products with A = ∂F/∂x, where F is the optimality condition of a step g(x) =
x − γ F(x); a matrix is formed only for a few unknowns.
"""

from .errors import GradientError, gradient_error, solution_error
from .spectrum import Curvature, contraction_factor, curvature
from .summary import explain
from .uncertainty import laplace

__all__ = [
    "Curvature",
    "GradientError",
    "contraction_factor",
    "curvature",
    "explain",
    "gradient_error",
    "laplace",
    "solution_error",
]



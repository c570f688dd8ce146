"""jaxopt: its fixed-point iteration, with conjugate gradients backward."""

import functools
from typing import Any, ClassVar

from ..work import Work
from .jax_based import JaxBased, step


class JaxOpt(JaxBased):
    """The batch is one large problem to it: it stops by the norm of all steps together."""

    name: ClassVar[str] = "jaxopt"

    def solve(self, work: Work, x0: Any, inputs: Any) -> tuple[Any, Any]:
        from jaxopt import FixedPointIteration, linear_solve

        solver = FixedPointIteration(
            lambda x, inputs: step(work, x, inputs), maxiter=work.problem.max_steps, tol=work.whole,
            implicit_diff_solve=functools.partial(linear_solve.solve_cg, tol=work.problem.adjoint_tolerance),
        )  # fmt: skip
        found = solver.run(x0, inputs)
        return found.params, found.state.iter_num

"""TorchOpt: a loop of one's own, and its implicit gradients by conjugate gradients."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..work import Work
from .plain import Plain
from .torch_based import Differentiable


class TorchOpt(Differentiable):
    """``custom_root`` around the plain loop: the library leaves the forward to the user."""

    name: ClassVar[str] = "TorchOpt"

    def solver(self, work: Work) -> Callable[..., Tensor]:
        from torchopt.diff.implicit import custom_root
        from torchopt.linear_solve import solve_cg

        problem, plain = work.problem, Plain()

        # Its argnums must be the first arguments in a row, so the other inputs are closed over.
        def optimality(x: Tensor, *wanted: Tensor) -> Tensor:
            inputs = problem.with_wanted(wanted)
            slope: Tensor = torch.func.grad(lambda x: problem.energy(x, *inputs).sum())(x)
            return slope

        def loop(x: Tensor, *wanted: Tensor) -> Tensor:
            with torch.enable_grad():
                return plain.solve_from(work, x, problem.with_wanted([t.detach() for t in wanted]))[0]

        argnums = tuple(range(1, len(problem.wanted) + 1))
        rooted = custom_root(optimality, argnums=argnums, solve=solve_cg(rtol=problem.adjoint_tolerance))(loop)
        return lambda *inputs: rooted(problem.x0, *(inputs[k] for k in problem.wanted))

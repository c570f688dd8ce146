"""xitorch: a loop of one's own as its method, and its implicit gradients by conjugate gradients."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..work import Work
from .plain import Plain
from .torch_based import Differentiable


class XiTorch(Differentiable):
    """``rootfinder`` on ∇E = 0; none of its own methods is the plain iteration, so that comes along."""

    name: ClassVar[str] = "xitorch"

    def solver(self, work: Work) -> Callable[..., Tensor]:
        from xitorch.optimize import rootfinder

        problem, plain = work.problem, Plain()

        def slope(x: Tensor, *inputs: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                return torch.autograd.grad(problem.energy(x, *inputs).sum(), x, create_graph=True)[0]

        def loop(function: Any, x0: Tensor, inputs: tuple[Tensor, ...], **_: Any) -> Tensor:
            with torch.enable_grad():
                return plain.solve_from(work, x0, tuple(t.detach() for t in inputs))[0]

        # Its default number of iterations is less than this problem needs in float64.
        backward = {"method": "cg", "posdef": True, "rtol": problem.adjoint_tolerance, "atol": 0.0, "max_niter": 500}
        return lambda *inputs: rootfinder(slope, problem.x0, inputs, bck_options=backward, method=loop)

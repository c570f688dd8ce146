"""torchdeq: fixed-point iteration forward and backward."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..work import Task, Work
from .torch_based import Differentiable, incoming


class TorchDEQ(Differentiable):
    """Its own solver, exact implicit gradients (``ift=True``).

    The tolerance backward is absolute, so it is scaled here: by the incoming gradient, or by 1, as of a row of a Jacobian.
    """

    name: ClassVar[str] = "torchdeq"

    def solver(self, work: Work) -> Callable[..., Tensor]:
        from torchdeq import get_deq

        problem = work.problem
        single = problem.x0.ndim == 1  # it wants a batch dimension
        v = problem.rows(incoming(problem, work.answers[Task.FORWARD][0].to(problem.x0)))
        deq = get_deq(
            f_solver="fixed_point_iter", f_tol=problem.tolerance, f_max_iter=2 * work.steps, f_stop_mode="abs",
            b_solver="fixed_point_iter", b_tol=problem.adjoint_tolerance * min(1.0, float(v.norm(dim=1).min())),
            b_max_iter=4 * work.steps, b_stop_mode="abs", ift=True,
        )  # fmt: skip

        def solve(*inputs: Tensor) -> Tensor:
            def step(x: Tensor) -> Tensor:
                with torch.enable_grad():
                    x = x if x.requires_grad else x.detach().requires_grad_()
                    recording = any(t.requires_grad for t in inputs)
                    energy = problem.energy(x, *inputs).sum()
                    (slope,) = torch.autograd.grad(energy, x, create_graph=recording)
                return x - work.step_size * slope

            x0 = problem.x0.unsqueeze(0) if single else problem.x0
            found: Tensor = deq(step, x0)[0][-1]
            return found.squeeze(0) if single else found

        return solve

"""The floor: what an expert writes by hand for this one energy."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..ops import TORCH
from ..work import Tensors, Work
from .torch_based import ByHand


class HandWritten(ByHand):
    """Gradient, Hessian and its pullback on paper, what does not depend on x computed once, conjugate gradients."""

    name: ClassVar[str] = "hand-written"

    @torch.no_grad()
    def solve(self, work: Work) -> tuple[Tensor, int]:
        problem, x = work.problem, work.problem.x0
        code = problem.formula.encode(TORCH, *problem.inputs)
        for k in range(problem.max_steps):
            move = work.step_size * problem.formula.gradient(x, *code)
            x = x - move
            if problem.rows(move).norm(dim=1).max() <= problem.tolerance:
                return x, k + 1
        raise RuntimeError("ran out of steps")

    def adjoint(self, work: Work, x: Tensor) -> Callable[[Tensor], tuple[Tensors, int]]:
        problem = work.problem
        with torch.no_grad():
            product = problem.formula.curvature(x, *problem.formula.encode(TORCH, *problem.inputs))

        @torch.no_grad()
        def pull(v: Tensor) -> tuple[Tensors, int]:
            goal = (problem.adjoint_tolerance * problem.rows(v).norm(dim=1)) ** 2
            u, left, direction = torch.zeros_like(v), v, v
            squared = _dot(work, left, left)
            for k in range(problem.max_steps):
                image = product(direction)
                # A sample whose residual is zero stays where it is.
                length = squared / _dot(work, direction, image).clamp(min=TINY)
                u, left = u + length * direction, left - length * image
                squared, before = _dot(work, left, left), squared
                if (squared.flatten() <= goal).all():
                    return problem.formula.pullback(x, u, *problem.inputs), k + 1
                direction = left + squared / before.clamp(min=TINY) * direction
            raise RuntimeError("ran out of backward steps")

        return pull


TINY = 1e-30


def _dot(work: Work, a: Tensor, b: Tensor) -> Tensor:  # -> (B, 1, ...), broadcasts to x
    sums = work.problem.rows(a * b).sum(1)
    return sums.reshape(()) if a.ndim == 1 else sums.reshape(-1, *[1] * (a.ndim - 1))

"""The measure of all: what one writes without a library. Its ratio is 1."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..harness import BASE
from ..work import Tensors, Work
from .torch_based import ByHand


class Plain(ByHand):
    """x ← x - γ ∇E by ``torch.autograd.grad`` until the longest step is short, then the paper's backward iteration.

    c ← (∂g/∂x)ᵀ c + v with the vector-Jacobian product of one step g = x - γ ∇E, recorded once.
    """

    name: ClassVar[str] = BASE

    def solve(self, work: Work) -> tuple[Tensor, int]:
        return self.solve_from(work, work.problem.x0, work.problem.inputs)

    def solve_from(self, work: Work, x: Tensor, inputs: Tensors) -> tuple[Tensor, int]:
        problem = work.problem
        for k in range(problem.max_steps):
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(problem.energy(leaf, *inputs).sum(), leaf)
            moved = x - work.step_size * slope
            longest = problem.rows(moved - x).norm(dim=1).max()
            x = moved
            if longest <= problem.tolerance:
                return x, k + 1
        raise RuntimeError("ran out of steps")

    def adjoint(self, work: Work, x: Tensor) -> Callable[[Tensor], tuple[Tensors, int]]:
        problem = work.problem
        inputs, wanted = problem.leaves()
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(problem.energy(leaf, *inputs).sum(), leaf, create_graph=True)
        step = leaf - work.step_size * slope

        def pull(v: Tensor) -> tuple[Tensors, int]:
            c, goal = v, problem.adjoint_tolerance * problem.rows(v).norm(dim=1)
            for k in range(problem.max_steps):
                moved = torch.autograd.grad(step, leaf, c, retain_graph=True)[0] + v
                short = problem.rows(moved - c).norm(dim=1) <= goal
                c = moved
                if short.all():
                    return torch.autograd.grad(step, wanted, c, retain_graph=True), k + 1
            raise RuntimeError("ran out of backward steps")

        return pull

"""Ordinary backpropagation through the iterations."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..harness import SECOND_BASE
from ..work import Task, Work
from .torch_based import Differentiable


class Unrolled(Differentiable):
    """The plain loop with every step recorded."""

    name: ClassVar[str] = SECOND_BASE

    def solver(self, work: Work) -> Callable[..., Tensor]:
        problem = work.problem

        def solve(*inputs: Tensor) -> Tensor:
            x = problem.x0.detach().requires_grad_()
            for _ in range(problem.max_steps):
                (slope,) = torch.autograd.grad(problem.energy(x, *inputs).sum(), x, create_graph=True)
                moved = x - work.step_size * slope
                longest = problem.rows(moved.detach() - x.detach()).norm(dim=1).max()
                x = moved
                if longest <= problem.tolerance:
                    return x
            raise RuntimeError("ran out of steps")

        return solve

    def call(self, work: Work, task: Task) -> Callable[[], object]:
        if task is Task.FORWARD:
            raise NotImplementedError("without gradients it is the plain loop")
        return super().call(work, task)

    def steps(self, work: Work, task: Task) -> str:
        return str(work.steps)

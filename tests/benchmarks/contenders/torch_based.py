"""What contenders written in PyTorch share."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..harness import Call, Contender
from ..work import Problem, Task, Tensors, Work


class ByHand(Contender):
    """A loop and an adjoint of one's own: no autograd through the solve."""

    @abstractmethod
    def solve(self, work: Work) -> tuple[Tensor, int]:
        """x*, and how many iterations it took."""

    @abstractmethod
    def adjoint(self, work: Work, x: Tensor) -> Callable[[Tensor], tuple[Tensors, int]]:
        """v -> vᵀ ∂x*/∂θ of the wanted inputs and how many iterations it took; linearized once."""

    def call(self, work: Work, task: Task) -> Call:
        if task is Task.FORWARD:
            return lambda: self.solve(work)[0]
        if task is Task.GRADIENT:
            return lambda: self._gradient(work)[0]
        if task is Task.JACOBIAN:
            return lambda: self._jacobian(work)
        raise NotImplementedError("its adjoint is of first order")

    def steps(self, work: Work, task: Task) -> str:
        forward = self.solve(work)[1]
        return str(forward) if task is Task.FORWARD else f"{forward} + {self._gradient(work)[1]}"

    def _gradient(self, work: Work) -> tuple[Tensors, int]:
        x, _ = self.solve(work)
        return self.adjoint(work, x)(incoming(work.problem, x))

    def _jacobian(self, work: Work) -> Tensor:
        x, _ = self.solve(work)
        pull = self.adjoint(work, x)
        return torch.stack([pull(row)[0][0] for row in torch.eye(x.numel(), dtype=x.dtype, device=x.device)])


def incoming(problem: Problem, x: Tensor) -> Tensor:
    """The gradient of the loss in x."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(problem.loss(leaf), leaf)[0]


class Differentiable(Contender):
    """A solve through which autograd differentiates."""

    @abstractmethod
    def solver(self, work: Work) -> Callable[..., Tensor]:
        """(\\*inputs) -> x*, differentiable in the inputs."""

    def call(self, work: Work, task: Task) -> Call:
        solve, problem = self.solver(work), work.problem
        if task is Task.FORWARD:
            return lambda: _detached(solve(*problem.inputs))
        if task is Task.GRADIENT:
            return lambda: gradient(solve, problem)
        return (lambda: self.jacobian(solve, problem)) if task is Task.JACOBIAN else (lambda: self.hessian(solve, problem))

    def jacobian(self, solve: Callable[..., Tensor], problem: Problem) -> Any:
        """Row by row, as where ``torch.func`` does not work."""
        inputs, wanted = problem.leaves()
        return _rows(solve(*inputs), wanted)

    def hessian(self, solve: Callable[..., Tensor], problem: Problem) -> Any:
        inputs, wanted = problem.leaves()
        (first,) = torch.autograd.grad(problem.loss(solve(*inputs)), wanted, create_graph=True)
        return _rows(first, wanted)


def _detached(x: Tensor) -> Tensor:
    return x.detach()


def gradient(solve: Callable[..., Tensor], problem: Problem) -> Tensors:
    inputs, wanted = problem.leaves()
    return torch.autograd.grad(problem.loss(solve(*inputs)), wanted)


def _rows(values: Tensor, wanted: Tensors) -> Tensor:
    return torch.stack([torch.autograd.grad(value, wanted[0], retain_graph=True)[0] for value in values])

"""W3: a training step of multi-label classification, of the size of Bibtex."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from .harness import Options
from .ops import Ops
from .work import Formula, Problem, Task, Tensors
from .workload import FixedStepWorkload


@dataclasses.dataclass(frozen=True)
class LabelCost(Formula):
    """mean_k relu(Wz z + Wx sigmoid(x) + b)² + ½ ridge ‖x‖²: x are logits of labels, z features."""

    ridge: float

    def encode(self, ops: Ops, z: Any, Wz: Any, Wx: Any, b: Any) -> tuple[Any, ...]:
        return z @ Wz.T + b, Wx

    def evaluate(self, ops: Ops, x: Any, h: Any, Wx: Any) -> Any:
        return (ops.relu(h + ops.sigmoid(x) @ Wx.T) ** 2).mean(-1) + 0.5 * self.ridge * (x**2).sum(-1)

    def loss(self, ops: Ops, x: Any, y: Any) -> Any:
        return (ops.softplus(x) - y * x).sum(-1).mean()

    def gradient(self, x: Tensor, h: Tensor, Wx: Tensor) -> Tensor:
        s = x.sigmoid()
        active = torch.relu(torch.addmm(h, s, Wx.T))
        return (2 / len(Wx)) * (active @ Wx) * (s * (1 - s)) + self.ridge * x

    def curvature(self, x: Tensor, h: Tensor, Wx: Tensor) -> Any:
        s = x.sigmoid()
        slope = s * (1 - s)
        active = torch.relu(torch.addmm(h, s, Wx.T))
        diagonal = (2 / len(Wx)) * (active @ Wx) * slope * (1 - 2 * s) + self.ridge
        on = (2 / len(Wx)) * (active > 0).to(x.dtype)
        return lambda p: ((on * ((slope * p) @ Wx.T)) @ Wx) * slope + diagonal * p

    def pullback(self, x: Tensor, u: Tensor, z: Tensor, Wz: Tensor, Wx: Tensor, b: Tensor) -> Tensors:
        s = x.sigmoid()
        active = torch.relu(torch.addmm(z @ Wz.T + b, s, Wx.T))
        weighted = u * s * (1 - s)
        inner = (-2 / len(Wx)) * (active > 0).to(x.dtype) * (weighted @ Wx.T)  # through the activations
        return inner.T @ z, inner.T @ s + (-2 / len(Wx)) * active.T @ weighted, inner.sum(0)


class Labels(FixedStepWorkload):
    name: ClassVar[str] = "W3"
    title: ClassVar[str] = "Bibtex-sized training step: batch 80, 159 unknowns, 512 hidden, 1,836 features, float32, all weights"
    tasks: ClassVar[dict[Task, float | None]] = {Task.GRADIENT: 0.08}

    def problem(self, options: Options) -> Problem:
        torch.manual_seed(0)
        size, labels, hidden, features = (4, 5, 8, 12) if options.quick else (80, 159, 512, 1836)
        z = (torch.rand(size, features) < 68 / 1836).float()  # as many words as a Bibtex entry has
        y = (torch.rand(size, labels) < 2.4 / 159).float()
        Wz, Wx, b = torch.randn(hidden, features) / 8, torch.randn(hidden, labels) / 4, torch.zeros(hidden)
        inputs = tuple(t.to(options.device) for t in (z, Wz, Wx, b))
        return Problem(
            LabelCost(ridge=1e-2 if options.quick else 6e-5), inputs[0].new_zeros(size, labels), inputs, (1, 2, 3),
            tolerance=1e-4, adjoint_tolerance=1e-2, targets=(y.to(options.device),),
        )  # fmt: skip

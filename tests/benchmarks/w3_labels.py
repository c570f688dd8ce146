"""W3: a training step of multi-label classification, of the size of Bibtex."""

import dataclasses
from abc import ABC
from typing import Any, ClassVar

import torch
from torch import Tensor

from .harness import Options
from .ops import Ops
from .work import Formula, Problem, Task, Tensors
from .workload import FixedStepWorkload


@dataclasses.dataclass(frozen=True)
class LabelCost(Formula):
    """mean_k relu(W [z; sigmoid(x)] + b)² + ½ ridge ‖x‖²: x are logits of labels, z features.

    ``energy`` is the formula as it stands, or, where it is not joined, with a weight for each part. `encode`, which energynet
    calls once per solve, takes out what does not depend on x in both.
    """

    ridge: float
    joined: bool

    def encode(self, ops: Ops, z: Any, W: Any, b: Any) -> tuple[Any, ...]:
        Wz, Wx = ops.split(W, z.shape[-1])
        return z @ Wz.T + b, Wx

    def evaluate(self, ops: Ops, x: Any, h: Any, Wx: Any) -> Any:
        return self._cost(ops, x, h + ops.sigmoid(x) @ Wx.T)

    def energy(self, ops: Ops, x: Any, z: Any, W: Any, b: Any) -> Any:
        if self.joined:
            return self._cost(ops, x, ops.cat([z, ops.sigmoid(x)]) @ W.T + b)
        return self.evaluate(ops, x, *self.encode(ops, z, W, b))

    def _cost(self, ops: Ops, x: Any, hidden: Any) -> Any:
        return (ops.relu(hidden) ** 2).mean(-1) + 0.5 * self.ridge * (x**2).sum(-1)

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

    def pullback(self, x: Tensor, u: Tensor, z: Tensor, W: Tensor, b: Tensor) -> Tensors:
        s, Wx = x.sigmoid(), W[:, z.shape[-1] :]
        both = torch.cat([z, s], -1)
        active = torch.relu(torch.addmm(b, both, W.T))
        weighted = u * s * (1 - s)
        inner = (-2 / len(W)) * (active > 0).to(x.dtype) * (weighted @ Wx.T)  # through the activations
        slope = inner.T @ both
        slope[:, z.shape[-1] :] += (-2 / len(W)) * active.T @ weighted
        return slope, inner.sum(0)


class _Labels(FixedStepWorkload, ABC):
    joined: ClassVar[bool]

    def problem(self, options: Options) -> Problem:
        torch.manual_seed(0)
        size, labels, hidden, features = (4, 5, 8, 12) if options.quick else (80, 159, 512, 1836)
        z = (torch.rand(size, features) < 68 / 1836).float()  # as many words as a Bibtex entry has
        y = (torch.rand(size, labels) < 2.4 / 159).float()
        weights = torch.cat([torch.randn(hidden, features) / 8, torch.randn(hidden, labels) / 4], 1)
        inputs = tuple(t.to(options.device) for t in (z, weights, torch.zeros(hidden)))
        return Problem(
            LabelCost(ridge=1e-2 if options.quick else 6e-5, joined=self.joined), inputs[0].new_zeros(size, labels), inputs,
            (1, 2), tolerance=1e-4, adjoint_tolerance=1e-2, targets=(y.to(options.device),),
        )  # fmt: skip


class Labels(_Labels):
    name: ClassVar[str] = "W3"
    title: ClassVar[str] = (
        "Bibtex-sized training step: batch 80, 159 unknowns, 512 hidden, 1,836 features, float32, all weights; "
        "energynet (encode) and the loop by hand take what does not depend on x out of the iteration"
    )
    tasks: ClassVar[dict[Task, float | None]] = {Task.GRADIENT: 0.08}
    joined: ClassVar[bool] = True


class LabelsApart(_Labels):
    name: ClassVar[str] = "W3b"
    title: ClassVar[str] = "W3 with a weight of its own for the features, a product that XLA moves out of its loop by itself"
    tasks: ClassVar[dict[Task, float | None]] = {Task.GRADIENT: 0.08}
    joined: ClassVar[bool] = False

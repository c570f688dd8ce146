"""A task of one's own, and a rival for the multi-label task."""

import torch
from torch import nn

from energynet import FPI_GD
from energynet.experiments.data import Data, Rows
from energynet.experiments.task import Column, Rival, Task


class Energy(Rival):
    name = "energy"

    def build(self, size):  # the minimizer of ½(x − a z)² + log cosh x, with a learned
        energy = lambda x, az: (0.5 * (x - az).square() + x.cosh().log()).sum(-1)  # noqa: E731
        return nn.Sequential(nn.Linear(1, 1), FPI_GD(energy, 0.5, start=torch.zeros_like))


class Slopes(Task):
    """Find the slope of y = 3 x."""

    name, choice, larger_is_better = "slopes", "error", False
    columns = {"error": Column("error", digits=3)}  # noqa: RUF012

    @classmethod
    def rivals(cls):
        return [Energy()]

    def load(self, folder):
        x = torch.linspace(-1, 1, 2000)[:, None]
        return Data("line", train=Rows(x[::2], 3 * x[::2]), test=Rows(x[1::2], 3 * x[1::2]))

    def loss(self, output, batch):
        return (output - batch.targets).square().mean()

    def evaluate(self, output, rows, calibration):
        return {"error": self.loss(output, rows).sqrt().item()}


class TwoLayers(Rival):
    name = "two-layers"

    def build(self, size):
        return nn.Sequential(nn.Linear(size.num_features, 64), nn.ReLU(), nn.Linear(64, size.num_labels))

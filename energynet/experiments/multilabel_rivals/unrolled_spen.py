"""End-to-end SPEN: the same energy, learned by differentiating through the steps of its inference."""

import torch
from torch import Tensor, nn

from energynet.experiments.models import Size

from .base import FeatureNetwork, LabelEnergy, LabelModel, Loss, descend


class UnrolledSPEN(LabelModel):
    """A SPEN whose inference is a network of T layers, each a descent step, trained by backpropagation through all of them.

    Taken: the entropic descent with learned step sizes; the loss of every iterate, weighted by 1/(T − t + 1), so that early
    iterates count too.

    What differs: the descent starts at the scores of the feature network and not at a constant; the loss is the experiment's.

    Args:
        size: sizes.
        num_steps: T.

    Source: Belanger, Yang and McCallum (2017), End-to-end learning for structured prediction energy networks.
    """

    def __init__(self, size: Size, *, num_steps: int = 5) -> None:
        super().__init__()
        self.features, self.energy = FeatureNetwork(size), LabelEnergy(size)
        self.step_sizes = nn.Parameter(torch.full((num_steps,), 0.5))

    def forward(self, z: Tensor) -> Tensor:
        return self.iterates(z)[-1]

    def training_loss(self, z: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        iterates = self.iterates(z)
        weights = [1 / (len(iterates) - t) for t in range(len(iterates))]
        return torch.stack([w * loss(u, labels) for w, u in zip(weights, iterates, strict=True)]).sum() / sum(weights)

    def iterates(self, z: Tensor) -> list[Tensor]:  # (B, D) -> T × (B, L)
        """The logits after each step."""
        hidden, scores = self.features(z)
        return descend(lambda y: self.energy(y, scores, hidden), scores, list(self.step_sizes))

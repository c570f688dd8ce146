"""SPEN: an energy over labels, learned by the structured hinge loss."""

import torch
from torch import Tensor

from energynet.experiments.models import Size
from energynet.losses import hinge

from .base import FeatureNetwork, LabelEnergy, LabelModel, Loss, descend

STEPS = (0.5,) * 10


class SPEN(LabelModel):
    """A structured prediction energy network.

    Taken: the energy, local scores and a global term of softplus units, over relaxed labels in [0, 1]; the structured hinge
    loss, whose most violating answer is found by the same descent on E − Δ with Δ(y, t) = ‖y − t‖²; inference by a fixed
    number of entropic descent steps.

    What differs: the input enters the global term too; the feature network is trained by the loss of its scores, beside the
    energy and not before it, and not by the hinge (held-out rows of Bibtex: 43.2 with the hinge, 47.7 without); inference is
    smoothed by an entropy of weight 1, starts at the scores, and its last logits meet the threshold that held-out rows choose.

    Args:
        size: sizes.

    Source: Belanger and McCallum (2016), Structured prediction energy networks.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.features, self.energy = FeatureNetwork(size), LabelEnergy(size)

    def forward(self, z: Tensor) -> Tensor:
        hidden, scores = self.features(z)
        with torch.no_grad():
            return descend(lambda y: self.energy(y, scores, hidden), scores, STEPS)[-1]

    def training_loss(self, z: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        hidden, scores = self.features(z)
        return self.hinge(labels, scores.detach(), hidden.detach()).mean() + loss(scores, labels)

    def hinge(self, labels: Tensor, scores: Tensor, hidden: Tensor) -> Tensor:  # -> (B,)
        """max(0, Δ(ŷ, t) + E(t) − E(ŷ)) with ŷ the answer that violates the margin most."""
        with torch.no_grad():
            worst = descend(lambda y: self.energy(y, scores, hidden) - cost(y, labels), scores, STEPS)[-1].sigmoid()
        truth, wrong = (self.energy(y, scores, hidden) for y in (labels, worst))
        return hinge(truth, wrong, cost(worst, labels))


def cost(y: Tensor, labels: Tensor) -> Tensor:  # (B, L), (B, L) -> (B,)
    """Δ: the squared distance, which for sets of labels is the number of labels in one of them only."""
    return (y - labels).square().sum(-1)

"""DVN: a network that says how good a set of labels is, climbed to find the best."""

import torch
from torch import Tensor, nn

from energynet.experiments.models import Size
from energynet.losses import soft_f1, value_regression

from .base import FeatureNetwork, LabelModel, Loss, descend

STEPS = (1.0,) * 10


class ValueNetwork(nn.Module):
    r"""The energy −logit of the value of labels y, for an input with hidden units h and scores s.

    The value begins as the F1 that y would have if the labels were independent with probabilities p = σ(s), about
    2 pᵀy / Σ (p + y); units that see y, h and this estimate correct it.

    Example:
        >>> ValueNetwork(Size(6, 3, hidden=4))(torch.rand(5, 3), torch.ones(5, 3), torch.ones(5, 4)).shape
        torch.Size([5])
    """

    def __init__(self, size: Size, *, num_units: int = 64) -> None:
        super().__init__()
        self.labels = nn.Linear(size.num_labels, num_units)
        self.inputs = nn.Linear(size.hidden, num_units, bias=False)
        self.second, self.weight = nn.Linear(num_units + 3, num_units), nn.Linear(num_units, 1)
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, y: Tensor, scores: Tensor, hidden: Tensor) -> Tensor:  # (B, L), (B, L), (B, hidden) -> (B,)
        softplus, p = nn.functional.softplus, scores.sigmoid()
        size, expected = y.sum(-1), p.sum(-1)
        estimate = 2 * (p * y).sum(-1) / (size + expected).clamp(min=1e-6)
        seen = torch.stack([estimate, size.log1p(), expected.log1p()], -1)
        units = softplus(self.second(torch.cat([softplus(self.labels(y) + self.inputs(hidden)), seen], -1)))
        return -(self.weight(units).squeeze(-1) + self.scale * (estimate - 0.5))


class DVN(LabelModel):
    """A deep value network: it is trained to predict the F1 of any labels, and inference climbs it.

    Taken: the value of an answer is the F1 between it and the truth, extended to labels in [0, 1]; the network learns it by
    cross-entropy on what its own inference meets, on adversarial answers where it errs most, and on the truth, whose value
    is 1; inference is gradient ascent.

    What differs: the network is told the F1 that independent labels would have; ascent is on logits, from the scores of the
    feature network, which are trained by a loss of their own in place of pretraining.

    Args:
        size: sizes.

    Source: Gygli, Norouzi and Angelova (2017), Deep value networks learn to evaluate and iteratively refine structured outputs.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.features, self.energy = FeatureNetwork(size), ValueNetwork(size)

    def forward(self, z: Tensor) -> Tensor:
        hidden, scores = self.features(z)
        with torch.no_grad():
            return self.ascent(scores, hidden)[-1]

    def training_loss(self, z: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        hidden, scores = self.features(z)
        read = (scores.detach(), hidden.detach())
        errors = [self.error(y, labels, *read).mean() for y in self.answers(labels, *read)]
        return torch.stack(errors).sum() + loss(scores, labels)

    def ascent(self, scores: Tensor, hidden: Tensor) -> list[Tensor]:  # -> logits, each (B, L)
        """The logits after each step up."""
        return descend(lambda y: self.energy(y, scores, hidden), scores, STEPS, smoothing=0.0)

    def error(self, y: Tensor, labels: Tensor, scores: Tensor, hidden: Tensor) -> Tensor:  # -> (B,)
        """How far the value of an answer is from its F1."""
        return value_regression(self.energy(y, scores, hidden), oracle(y, labels))

    @torch.no_grad()
    def answers(self, labels: Tensor, scores: Tensor, hidden: Tensor) -> list[Tensor]:  # each (B, L)
        """What the network is trained on: what its inference meets, where it errs most, and the truth."""
        met = self.ascent(scores, hidden)
        some = met[int(torch.randint(len(met), ()))]
        worst = descend(lambda y: -self.error(y, labels, scores, hidden), some, STEPS[:3], smoothing=0.0)[-1]
        return [some.sigmoid(), worst.sigmoid(), labels]


def oracle(y: Tensor, labels: Tensor) -> Tensor:  # (B, L), (B, L) -> (B,)
    """The value that is to be predicted: the F1 between an answer and the truth."""
    return soft_f1(y, labels)

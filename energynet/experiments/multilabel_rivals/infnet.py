"""InfNet: a network that is trained to minimize a SPEN's energy, in place of descent."""

from torch import Tensor, nn

from energynet.experiments.models import Size
from energynet.losses import hinge

from .base import FeatureNetwork, LabelEnergy, LabelModel, Loss
from .spen import cost


class InfNet(LabelModel):
    """A SPEN whose most violating answers and whose predictions are given by two inference networks.

    Taken: the hinge loss is a game: the energy descends max(0, Δ(ŷ, t) + E(t) − E(ŷ)), and the cost-augmented inference
    network, which gives ŷ, climbs it; the test-time network minimizes E. Local cross-entropy steadies both.

    What differs: both networks learn with the energy from the first update, as in the authors' later joint training, where the
    test-time network plays without a margin, and not one after the other; a game is one loss, whose gradient is reversed for
    the answer; the inference networks are heads on one body; the scores that the energy reads learn from their own loss.

    Args:
        size: sizes.
        strength: how strongly the inference networks play, beside the loss of their answers.

    Source: Tu and Gimpel (2018), Learning approximate inference networks for structured prediction; Tu et al. (2020), Improving
    joint training of inference networks and structured prediction energy networks.
    """

    def __init__(self, size: Size, *, strength: float = 0.05) -> None:
        super().__init__()
        self.features, self.energy, self.strength = FeatureNetwork(size), LabelEnergy(size), strength
        self.inference = FeatureNetwork(size)  # its scores are the answers for the test
        self.augmented = nn.Linear(size.hidden, size.num_labels)

    def forward(self, z: Tensor) -> Tensor:
        _, logits = self.inference(z)
        return logits

    def training_loss(self, z: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        hidden, scores = self.features(z)
        inner, logits = self.inference(z)
        worst, read = self.augmented(inner), (scores.detach(), hidden.detach())
        games = self.game(worst.sigmoid(), labels, read, margin=True) + self.game(logits.sigmoid(), labels, read, margin=False)
        return games.mean() + loss(logits, labels) + loss(worst, labels) + loss(scores, labels)

    def game(self, y: Tensor, labels: Tensor, read: tuple[Tensor, Tensor], *, margin: bool) -> Tensor:  # -> (B,)
        """The hinge, which the energy descends and the answer climbs; without a margin it climbs to the minimizer."""
        answer = reversed_gradient(y, self.strength)
        delta = cost(answer, labels) if margin else 0.0
        return hinge(self.energy(labels, *read), self.energy(answer, *read), delta)


def reversed_gradient(y: Tensor, strength: float = 1.0) -> Tensor:
    """The same value, whose gradient has the other sign, times a number.

    Example:
        >>> import torch
        >>> y = torch.ones(1, requires_grad=True)
        >>> torch.autograd.grad(reversed_gradient(y, 0.5).sum(), y)[0]
        tensor([-0.5000])

    Source: Ganin and Lempitsky (2015), Unsupervised domain adaptation by backpropagation.
    """
    return (1 + strength) * y.detach() - strength * y

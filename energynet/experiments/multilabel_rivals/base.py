"""What the rivals share: one interface, the network that reads the input, ensembles, and descent over label probabilities."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from energynet.experiments.models import Size

Loss = Callable[[Tensor, Tensor], Tensor]
"""The experiment's loss of logits (B, L) and labels (B, L), a mean over rows."""
INPUT_DROPOUT, HIDDEN_DROPOUT = 0.2, 0.5


class LabelModel(nn.Module, ABC):
    """Anything that scores the labels of an input and knows how it is trained."""

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:  # (B, D) -> (B, L)
        """The logit of each label."""

    def training_loss(self, z: Tensor, labels: Tensor, loss: Loss) -> Tensor:  # (B, D), (B, L) -> ()
        """The loss of a batch; that of the answer, unless a method has its own."""
        return loss(self(z), labels)


class Ensemble(LabelModel):
    """Several models of one kind, trained side by side on the same batches, whose logits are averaged.

    Args:
        members: the models.
    """

    def __init__(self, members: Sequence[LabelModel]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([member(z) for member in self.members]).mean(0)

    def training_loss(self, z: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        losses = [member.training_loss(z, labels, loss) for member in self.members if isinstance(member, LabelModel)]
        return torch.stack(losses).mean()


class FeatureNetwork(nn.Module):
    """The perceptron with which every method reads the input: its hidden units and its label scores, with dropout on both.

    Example:
        >>> hidden, scores = FeatureNetwork(Size(6, 3, hidden=4))(torch.ones(5, 6))
        >>> hidden.shape, scores.shape
        (torch.Size([5, 4]), torch.Size([5, 3]))
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Dropout(INPUT_DROPOUT), nn.Linear(size.num_features, size.hidden), nn.ReLU(), nn.Dropout(HIDDEN_DROPOUT)
        )
        self.head = nn.Linear(size.hidden, size.num_labels)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:  # (B, D) -> (B, hidden), (B, L)
        hidden = self.body(z)
        return hidden, self.head(hidden)


class LabelEnergy(nn.Module):
    r"""The energy of labels y in [0, 1] that SPEN, its unrolled form and the inference network learn:

    .. math::
        E(y; s, h) = -s^\top y + c^\top \mathrm{softplus}(A y + B h + b).

    The first term is local: s scores each label by itself. In the second, each unit sees all labels, and B lets the input say
    which of them belong together.

    Example:
        >>> LabelEnergy(Size(6, 3, hidden=4))(torch.rand(5, 3), torch.ones(5, 3), torch.ones(5, 4)).shape
        torch.Size([5])
    """

    def __init__(self, size: Size, *, num_units: int = 32) -> None:
        super().__init__()
        self.labels = nn.Linear(size.num_labels, num_units)
        self.inputs = nn.Linear(size.hidden, num_units, bias=False)
        self.weight = nn.Parameter(0.1 * torch.randn(num_units))

    def forward(self, y: Tensor, scores: Tensor, hidden: Tensor) -> Tensor:  # (B, L), (B, L), (B, hidden) -> (B,)
        units = nn.functional.softplus(self.labels(y) + self.inputs(hidden))
        return units @ self.weight - (scores * y).sum(-1)


def descend(
    energy: Callable[[Tensor], Tensor], logits: Tensor, step_sizes: Sequence[float | Tensor], *, smoothing: float = 1.0
) -> list[Tensor]:
    """Minimize E(y) − smoothing · H(y) over label probabilities y = σ(u) by mirror descent: u ← u − γ (∇E(y) + smoothing · u).

    The steps stay inside the cube, and do not fade where a probability nears 0 or 1. With an energy that is linear in y and
    smoothing 1, a step of size 1 leads to the minimizer. The iterates are differentiable if gradients are enabled.

    Example:
        >>> scores = torch.tensor([[2.0, -1.0]])
        >>> with torch.no_grad():
        ...     descend(lambda y: -(scores * y).sum(-1), torch.zeros(1, 2), [1.0])[-1]
        tensor([[ 2., -1.]])

    Args:
        energy: E(y) -> (B,).
        logits: where to start, (B, L).
        step_sizes: γ of each step.
        smoothing: the weight of the entropy H.

    Returns:
        The logits after each step.

    Source: Belanger and McCallum (2016); Belanger, Yang and McCallum (2017), both on entropic mirror descent.
    """
    iterates, keep = [], torch.is_grad_enabled()
    for step_size in step_sizes:
        with torch.enable_grad():
            if not logits.requires_grad:
                logits = logits.detach().requires_grad_()
            y = logits.sigmoid()
            (slope,) = torch.autograd.grad(energy(y).sum(), y, create_graph=keep)
        logits = logits - step_size * (slope + smoothing * logits)
        logits = logits if keep else logits.detach()
        iterates.append(logits)
    return iterates

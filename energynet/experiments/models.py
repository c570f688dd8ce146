"""The four methods to compare: an energy, a contracting network, a perceptron and a linear model, with one interface."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from energynet import FPI_GD, FPI_NN, AdjointReport, ConjugateGradient, ImplicitAdjoint, Picard, Solution, Termination
from energynet.energies import LabelContraction, LabelFeatures, MultiLabelEnergy

FORWARD = Termination(atol=0.0, rtol=1e-4, max_steps=200)
BACKWARD = Termination(rtol=1e-3, max_steps=200)


class MethodName(StrEnum):
    """The methods by the names they have on the command line."""

    FPI_GD = "fpi-gd"
    FPI_NN = "fpi-nn"
    MLP = "mlp"
    LOGISTIC = "logistic"


@dataclass(frozen=True)
class SolveCount:
    """What one batch cost: the mean number of forward steps and the fraction of samples that converged."""

    steps: float
    converged: float


@dataclass(frozen=True)
class Size:
    """Numbers of features, labels and experts."""

    num_features: int
    num_labels: int
    num_experts: int = 1


@dataclass(frozen=True)
class Scores:
    """Label logits (B, L), those of each expert (B, M, L) where there are several, and what the solve cost."""

    logits: Tensor
    experts: Tensor | None = None
    count: SolveCount | None = None


class Classifier(nn.Module, ABC):
    """Anything that scores the labels of an input."""

    @abstractmethod
    def forward(self, z: Tensor) -> Scores:  # (B, D)
        """Score each label of each row."""

    def adjoint_steps(self) -> float | None:
        """Mean steps of the adjoint solves since the last call; None if there were none."""
        return None


class Logistic(Classifier):
    """One linear score per label."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.scores = nn.Linear(size.num_features, size.num_labels)

    def forward(self, z: Tensor) -> Scores:
        return Scores(self.scores(z))


class Perceptron(Classifier):
    """One hidden layer of 512 units with dropout, or the mean of several: the features of the implicit models without the
    solve.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.features = LabelFeatures(size.num_features, size.num_labels, num_experts=size.num_experts)

    def forward(self, z: Tensor) -> Scores:
        experts = self.features(z)
        return Scores(_apart(experts, self).mean(1), experts)


class Implicit(Classifier):
    """A classifier whose answer is a fixed point, given the scores of experts; counts the steps of both directions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.features = LabelFeatures(size.num_features, size.num_labels, num_experts=size.num_experts)
        self.report = AdjointReport()

    @abstractmethod
    def solve(self, experts: Tensor) -> Solution:  # (B, M, L)
        """Find the fixed point."""

    def forward(self, z: Tensor) -> Scores:
        experts = self.features(z)
        solution = self.solve(_apart(experts, self))
        steps = solution.num_steps.double().mean().item()
        return Scores(solution.value, experts, SolveCount(steps, solution.converged.double().mean().item()))

    def adjoint_steps(self) -> float | None:
        records = self.report.records
        if not records:
            return None
        mean = sum(record.num_steps.double().mean().item() for record in records) / len(records)
        self.report.clear()
        return mean


class EnergyClassifier(Implicit):
    """FPI_GD on the ready-made multi-label energy: its minimizer is the answer."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        energy = MultiLabelEnergy(size.num_labels)
        adjoint = ImplicitAdjoint(ConjugateGradient(), termination=BACKWARD, report=self.report)
        self.layer = FPI_GD(energy, step_size=energy.step_size, solver=Picard(), termination=FORWARD,
                            adjoint=adjoint, on_failure="warn")  # fmt: skip

    def solve(self, experts: Tensor) -> Solution:
        return self.layer.solve(experts)


class ContractionClassifier(Implicit):
    """FPI_NN on a contracting network over the same features: its fixed point is the answer."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        adjoint = ImplicitAdjoint(Picard(), termination=BACKWARD, report=self.report)
        self.layer = FPI_NN(LabelContraction(size.num_labels), solver=Picard(), termination=FORWARD,
                            adjoint=adjoint, on_failure="warn")  # fmt: skip

    def solve(self, experts: Tensor) -> Solution:
        mean = experts.mean(1)
        return self.layer.solve(mean, x0=mean)


def _apart(experts: Tensor, model: nn.Module) -> Tensor:
    # In training each expert learns from its own loss, what combines them from the loss of the answer: through the
    # joint loss the experts would grow alike (held-out rows of Bibtex: 0.2 points of example-F1 worse for each loss).
    return experts.detach() if model.training else experts


_BUILDERS: dict[MethodName, Callable[[Size], Classifier]] = {
    MethodName.FPI_GD: EnergyClassifier,
    MethodName.FPI_NN: ContractionClassifier,
    MethodName.MLP: Perceptron,
    MethodName.LOGISTIC: Logistic,
}

DEFAULT_EXPERTS = {MethodName.FPI_GD: 5, MethodName.FPI_NN: 5, MethodName.MLP: 1, MethodName.LOGISTIC: 1}


def build(method: MethodName, size: Size) -> Classifier:
    """Make an untrained classifier; its weights are drawn from PyTorch's global generator.

    Args:
        method: which one.
        size: numbers of features, labels and experts.

    Returns:
        The classifier, in training mode.
    """
    return _BUILDERS[method](size)


def agreement(model: EnergyClassifier, z: Tensor) -> Tensor:  # (B, D) -> (B,)
    """How far the answers of a trained energy are from those of a float64 solve at tolerance 1e-10.

    Args:
        model: the classifier; it stays as it is.
        z: inputs, shape (B, D).

    Returns:
        ‖u − u₆₄‖ / ‖u₆₄‖ of each row, float64.
    """
    exact = deepcopy(model).double().eval()
    exact.layer.termination = Termination(atol=0.0, rtol=1e-10, max_steps=2000)
    with torch.no_grad():
        answer, reference = model.eval()(z).logits.double(), exact(z.double()).logits
    error: Tensor = torch.linalg.vector_norm(answer - reference, dim=1) / torch.linalg.vector_norm(reference, dim=1)
    return error

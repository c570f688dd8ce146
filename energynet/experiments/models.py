"""Four classifiers with one interface: an energy, a contracting network, a perceptron and a linear model.

Each takes features (B, D) and returns label logits (B, L).
"""

from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from energynet import FPI_GD, FPI_NN, Adjoint, ConjugateGradient, GradientStep, ImplicitAdjoint, Picard, Solution, Termination
from energynet.diagnostics import contraction_factor
from energynet.energies import LabelContraction, LabelFeatures, MultiLabelEnergy

from .solves import SolveLog

FORWARD = Termination(atol=0.0, rtol=1e-4, max_steps=200)
BACKWARD = Termination(rtol=1e-3, max_steps=200)


@dataclass(frozen=True)
class Size:
    """Numbers of features, labels, networks whose scores a method combines, and hidden units of each."""

    num_features: int
    num_labels: int
    num_experts: int = 1
    hidden: int = 512


class Logistic(nn.Module):
    """One linear score per label, zero at first."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.scores = nn.Linear(size.num_features, size.num_labels)
        nn.init.zeros_(self.scores.weight)

    def forward(self, z: Tensor) -> Tensor:  # (B, D) -> (B, L)
        return self.scores(z)


class Experts(nn.Module, ABC):
    """A classifier that combines the scores of M perceptrons."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.features = LabelFeatures(
            size.num_features, size.num_labels, num_experts=size.num_experts, hidden=size.hidden
        )  # (B, D) -> (B, M, L)

    @abstractmethod
    def combine(self, experts: Tensor) -> Tensor:  # (B, M, L) -> (B, L)
        """The logits of the answer."""

    def forward(self, z: Tensor) -> Tensor:  # (B, D) -> (B, L)
        return self.combine(self.features(z))


class Perceptron(Experts):
    """One hidden layer with dropout, or the mean of several: the features of the implicit models without the solve."""

    def combine(self, experts: Tensor) -> Tensor:
        return experts.mean(1)


class Implicit(Experts):
    """A classifier whose answer is a fixed point, given the scores of experts."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.solves = SolveLog()

    @abstractmethod
    def solve(self, experts: Tensor) -> Solution:  # (B, M, L)
        """Find the fixed point."""

    @abstractmethod
    def spectral_radius(self, z: Tensor) -> Tensor:  # (B, D) -> (B,)
        """The factor by which an iteration contracts at the answer."""

    def combine(self, experts: Tensor) -> Tensor:
        return self.solves.add(self.solve(experts)).value


class EnergyClassifier(Implicit):
    """FPI_GD on the ready-made multi-label energy: its minimizer is the answer.

    Args:
        size: sizes.
        adjoint: how gradients come back; none: exactly, by conjugate gradients.
    """

    def __init__(self, size: Size, adjoint: Adjoint | None = None) -> None:
        super().__init__(size)
        energy = MultiLabelEnergy(size.num_labels)
        adjoint = adjoint or ImplicitAdjoint(ConjugateGradient(), termination=BACKWARD, report=self.solves.report)
        self.layer = FPI_GD(energy, step_size=energy.step_size, solver=Picard(), termination=FORWARD,
                            adjoint=adjoint, on_failure="warn")  # fmt: skip

    def solve(self, experts: Tensor) -> Solution:
        return self.layer.solve(experts)

    def spectral_radius(self, z: Tensor) -> Tensor:
        energy, experts = self.layer.energy, self.features(z).detach()
        assert isinstance(energy, MultiLabelEnergy)
        return contraction_factor(GradientStep(energy, energy.step_size), self.solve(experts), experts)


class ContractionClassifier(Implicit):
    """FPI_NN on a contracting network over the same features: its fixed point is the answer."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        adjoint = ImplicitAdjoint(Picard(), termination=BACKWARD, report=self.solves.report)
        self.layer = FPI_NN(LabelContraction(size.num_labels), solver=Picard(), termination=FORWARD,
                            adjoint=adjoint, on_failure="warn")  # fmt: skip

    def solve(self, experts: Tensor) -> Solution:
        mean = experts.mean(1)
        return self.layer.solve(mean, x0=mean)

    def spectral_radius(self, z: Tensor) -> Tensor:
        network, experts = self.layer.network, self.features(z).detach()
        assert isinstance(network, LabelContraction)
        return contraction_factor(network, self.solve(experts), experts.mean(1))


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
        answer, reference = model.eval()(z).double(), exact(z.double())
    error: Tensor = torch.linalg.vector_norm(answer - reference, dim=1) / torch.linalg.vector_norm(reference, dim=1)
    return error

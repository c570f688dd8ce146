"""scikit-learn's linear models as rivals: fitted by themselves, tuned and judged as every other method."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix, hstack, issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from .data import Rows
from .models import Size
from .task import FittedRival, Rates

STRENGTHS = tuple(Rates(weight_decay=decay) for decay in (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03))
"""1/C of scikit-learn, from strong to weak."""


class LinearScores(nn.Module):
    """Holds the coefficients of one linear model per label, each of which may also see the labels before it."""

    weight: Tensor  # (L, D)
    coupling: Tensor  # (L, L), strictly lower triangular
    bias: Tensor  # (L,)

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(size.num_labels, size.num_features))
        self.register_buffer("coupling", torch.zeros(size.num_labels, size.num_labels))
        self.register_buffer("bias", torch.zeros(size.num_labels))

    def forward(self, z: Tensor) -> Tensor:  # (B, D) -> (B, L)
        scores = z @ self.weight.T + self.bias
        if not self.coupling.any():
            return scores
        for label in range(scores.shape[1]):
            decided = (scores[:, :label] > 0).to(scores.dtype)
            scores[:, label] += decided @ self.coupling[label, :label]
        return scores


class LogisticRegressions(FittedRival):
    """scikit-learn's LogisticRegression for each label; `weight_decay` is 1/C."""

    name = "sklearn-logistic"
    rates = Rates(weight_decay=0.1)
    grid: ClassVar[Sequence[Rates]] = STRENGTHS

    def build(self, size: Size) -> nn.Module:
        return LinearScores(size)

    def fit(self, model: nn.Module, rows: Rows, rates: Rates, seed: int) -> None:
        fit_linear(model, rows, rates.weight_decay, chained=False)


class Chain(FittedRival):
    """A classifier chain in the order of the labels, each a LogisticRegression that sees the labels before it.

    Equals scikit-learn's ClassifierChain: fitted on the true labels before, it predicts from the decisions before.
    """

    name = "sklearn-chain"
    rates = Rates(weight_decay=0.1)
    grid: ClassVar[Sequence[Rates]] = STRENGTHS

    def build(self, size: Size) -> nn.Module:
        return LinearScores(size)

    def fit(self, model: nn.Module, rows: Rows, rates: Rates, seed: int) -> None:
        fit_linear(model, rows, rates.weight_decay, chained=True)


def fit_linear(model: nn.Module, rows: Rows, strength: float, *, chained: bool) -> None:
    """Fit one LogisticRegression per label; a label that is always or never true gets a constant score."""
    assert isinstance(model, LinearScores)
    features, labels = rows.inputs.cpu().double().numpy(), rows.targets.cpu().double().numpy()
    sparse = (features != 0).mean() < 0.2
    base = csr_matrix(features) if sparse else features
    truth = csc_matrix(labels) if sparse else labels
    for label in range(labels.shape[1]):
        seen = _beside(base, truth[:, :label]) if chained else base
        weight, bias = _coefficients(seen, labels[:, label], strength)
        model.weight[label] = torch.from_numpy(weight[: features.shape[1]])
        model.coupling[label, : len(weight) - features.shape[1]] = torch.from_numpy(weight[features.shape[1] :])
        model.bias[label] = bias


def _beside(one: Any, other: Any) -> Any:
    return hstack([one, other], format="csr") if issparse(one) else np.concatenate([one, other], axis=1)


def _coefficients(features: Any, truth: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    if truth.min() == truth.max():
        return np.zeros(features.shape[1]), 20.0 if truth[0] else -20.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression = LogisticRegression(C=1 / strength, max_iter=500).fit(features, truth)
    return regression.coef_[0], float(regression.intercept_[0])

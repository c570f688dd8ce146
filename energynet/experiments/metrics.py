"""The metrics of multi-label classification, and the one decision threshold that a method is allowed."""

from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLDS = torch.arange(1, 100, dtype=torch.float64) / 100  # of the probability


@dataclass(frozen=True)
class Figures:
    """Four metrics of one set of predictions, each between 0 and 1."""

    example_f1: float
    micro_f1: float
    macro_f1: float
    exact_match: float


def figures(predicted: Tensor, labels: Tensor) -> Figures:
    """Compute all four metrics.

    Args:
        predicted: 0/1 or boolean decisions, shape (N, L).
        labels: 0/1 truth, shape (N, L).

    Returns:
        Example-F1, micro-F1, macro-F1 and exact match.

    Raises:
        ValueError: when the shapes differ.

    >>> figures(torch.tensor([[1, 0], [1, 1]]), torch.tensor([[1, 0], [1, 0]])).exact_match
    0.5
    """
    return Figures(
        example_f1(predicted, labels),
        micro_f1(predicted, labels),
        macro_f1(predicted, labels),
        exact_match(predicted, labels),
    )


def example_f1(predicted: Tensor, labels: Tensor) -> float:
    """The F1 of each row, averaged over rows; a row without labels that is predicted to have none counts 1.

    Args:
        predicted: 0/1 or boolean decisions, shape (N, L).
        labels: 0/1 truth, shape (N, L).

    Returns:
        A number between 0 and 1; equals scikit-learn's ``f1_score(average="samples", zero_division=1)``.

    Raises:
        ValueError: when the shapes differ.

    >>> example_f1(torch.tensor([[1, 1], [0, 1]]), torch.tensor([[1, 1], [1, 0]]))
    0.5
    """
    hits, total = _counts(predicted, labels, dim=1)
    return torch.where(total > 0, 2 * hits / total.clamp(min=1), 1.0).mean().item()


def micro_f1(predicted: Tensor, labels: Tensor) -> float:
    """The F1 of all decisions together.

    Args:
        predicted: 0/1 or boolean decisions, shape (N, L).
        labels: 0/1 truth, shape (N, L).

    Returns:
        A number between 0 and 1; 0 when nothing is true and nothing predicted.

    Raises:
        ValueError: when the shapes differ.

    >>> micro_f1(torch.tensor([[1, 1], [0, 1]]), torch.tensor([[1, 1], [1, 0]]))
    0.6666666666666666
    """
    hits, total = _counts(predicted, labels, dim=1)
    return (2 * hits.sum() / total.sum().clamp(min=1)).item()


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """The F1 of each label, averaged over labels; a label never true and never predicted counts 0.

    Args:
        predicted: 0/1 or boolean decisions, shape (N, L).
        labels: 0/1 truth, shape (N, L).

    Returns:
        A number between 0 and 1; equals scikit-learn's ``f1_score(average="macro", zero_division=0)``.

    Raises:
        ValueError: when the shapes differ.

    >>> macro_f1(torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1, 0], [1, 0]]))
    0.5
    """
    hits, total = _counts(predicted, labels, dim=0)
    return (2 * hits / total.clamp(min=1)).mean().item()


def exact_match(predicted: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose labels are all correct.

    Args:
        predicted: 0/1 or boolean decisions, shape (N, L).
        labels: 0/1 truth, shape (N, L).

    Returns:
        A number between 0 and 1.

    Raises:
        ValueError: when the shapes differ.

    >>> exact_match(torch.tensor([[1, 1], [0, 1]]), torch.tensor([[1, 1], [1, 0]]))
    0.5
    """
    _check_shapes(predicted, labels)
    return (predicted.bool() == labels.bool()).all(1).double().mean().item()


def best_threshold(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Choose the threshold of the probability that maximizes example-F1; among equals, the lowest.

    Args:
        logits: scores of held-out rows, shape (N, L).
        labels: 0/1 truth, shape (N, L).

    Returns:
        The threshold and the example-F1 it gives.

    Raises:
        ValueError: when the shapes differ.

    >>> best_threshold(torch.tensor([[2.0, -2.0]]), torch.tensor([[1.0, 0.0]]))
    (0.12, 1.0)
    """
    scores = [example_f1(decide(logits, threshold), labels) for threshold in THRESHOLDS.tolist()]
    best = max(range(len(scores)), key=scores.__getitem__)
    return THRESHOLDS[best].item(), scores[best]


def decide(logits: Tensor, threshold: float) -> Tensor:
    """Decide each label: is its probability above the threshold?

    Args:
        logits: scores, shape (N, L).
        threshold: between 0 and 1.

    Returns:
        Booleans of the same shape.
    """
    return logits.sigmoid() > threshold


def _counts(predicted: Tensor, labels: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """True positives, and predicted plus true positives, summed over one dimension."""
    _check_shapes(predicted, labels)
    predicted, labels = predicted.double(), labels.double()
    return (predicted * labels).sum(dim), predicted.sum(dim) + labels.sum(dim)


def _check_shapes(predicted: Tensor, labels: Tensor) -> None:
    if predicted.shape != labels.shape or predicted.dim() != 2:
        raise ValueError(
            f"predictions {tuple(predicted.shape)} cannot be compared with labels {tuple(labels.shape)}; "
            "both must be (rows, labels)."
        )

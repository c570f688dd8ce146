"""The metrics of multi-label classification, and the one decision threshold that a method is allowed."""

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

THRESHOLDS = torch.linspace(-9.0, 5.0, 141, dtype=torch.float64).sigmoid()  # of the probability, evenly spaced in log-odds


def figures(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Example-F1, micro-F1, macro-F1 and exact match, by scikit-learn.

    A row without labels that is predicted to have none counts 1 in example-F1; a label never true and never predicted
    counts 0 in macro-F1.

    Args:
        predicted: 0/1 or boolean decisions, shape (N, L).
        labels: 0/1 truth, shape (N, L).

    Returns:
        Four numbers between 0 and 1.

    Raises:
        ValueError: when the shapes differ.

    >>> figures(torch.tensor([[1, 0], [1, 1]]), torch.tensor([[1, 0], [1, 0]]))["exact_match"]
    0.5
    """
    _check_shapes(predicted, labels)
    truth, told = (tensor.cpu().numpy().astype(np.int8) for tensor in (labels, predicted))
    if truth.shape[1] == 1:
        truth, told = (np.concatenate([part, np.zeros_like(part)], axis=1) for part in (truth, told))
    macro = f1_score(truth, told, average=None, zero_division=0)[: labels.shape[1]].mean()
    return {
        "example_f1": float(f1_score(truth, told, average="samples", zero_division=1)),
        "micro_f1": float(f1_score(truth, told, average="micro", zero_division=0)),
        "macro_f1": float(macro),
        "exact_match": float(accuracy_score(truth, told)),
    }


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
    (0.1192..., 1.0)
    """
    curve = f1_curve(logits, labels)
    best = int((curve == curve.max()).nonzero()[0])
    return THRESHOLDS[best].item(), curve[best].item()


def f1_curve(logits: Tensor, labels: Tensor) -> Tensor:  # (N, L), (N, L) -> (141,)
    """The example-F1 at each threshold, all in one pass: each row counts in which interval its probabilities lie.

    Raises:
        ValueError: when the shapes differ.
    """
    _check_shapes(logits, labels)
    probabilities = logits.sigmoid()
    above = torch.bucketize(probabilities, THRESHOLDS.to(probabilities))  # how many thresholds it exceeds
    empty = probabilities.new_zeros(len(labels), len(THRESHOLDS) + 1, dtype=torch.float64)
    hits, predicted = (_exceeding(empty.scatter_add(1, above, w.double())) for w in (labels, torch.ones_like(labels)))
    total = predicted + labels.double().sum(1, keepdim=True)
    return torch.where(total > 0, 2 * hits / total.clamp(min=1), 1.0).mean(0)


def decide(logits: Tensor, threshold: float) -> Tensor:
    """Decide each label: is its probability above the threshold?

    Args:
        logits: scores, shape (N, L).
        threshold: between 0 and 1.

    Returns:
        Booleans of the same shape.
    """
    return logits.sigmoid() > threshold


def _exceeding(counts: Tensor) -> Tensor:  # (N, 142) by interval -> (N, 141) by threshold
    return counts.flip(1).cumsum(1).flip(1)[:, 1:]


def _check_shapes(predicted: Tensor, labels: Tensor) -> None:
    if predicted.shape != labels.shape or predicted.dim() != 2:
        raise ValueError(
            f"predictions {tuple(predicted.shape)} cannot be compared with labels {tuple(labels.shape)}; "
            "both must be (rows, labels)."
        )

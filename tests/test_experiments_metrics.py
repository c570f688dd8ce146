"""The figures equal those of scikit-learn and torchmetrics."""

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score

from energynet.experiments.metrics import THRESHOLDS, best_threshold, decide, f1_curve, figures


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predicted, labels = (torch.rand(2, 40, 7, generator=generator) > 0.7).long()
    predicted[:3], labels[:2] = 0, 0  # rows with nothing predicted, nothing true, and neither
    predicted[:, 0], labels[:, 0] = 0, 0  # a label that never occurs
    return predicted, labels


@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learn(seed: int) -> None:
    predicted, labels = random_case(seed)
    got = figures(predicted, labels)
    assert got["example_f1"] == pytest.approx(f1_score(labels, predicted, average="samples", zero_division=1))
    assert got["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro"))
    assert got["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    assert got["exact_match"] == pytest.approx(accuracy_score(labels, predicted))


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_torchmetrics(seed: int) -> None:
    predicted, labels = random_case(seed)
    got = figures(predicted, labels)
    assert got["micro_f1"] == pytest.approx(MultilabelF1Score(7, average="micro")(predicted, labels).item())
    assert got["exact_match"] == pytest.approx(MultilabelExactMatch(7)(predicted, labels).item())


def test_best_threshold_is_the_best_of_all() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(30, 5), (torch.rand(30, 5) > 0.6).float()
    labels[:3] = 0
    one_by_one = [figures(decide(logits, t), labels)["example_f1"] for t in THRESHOLDS.tolist()]
    assert f1_curve(logits, labels).tolist() == pytest.approx(one_by_one, abs=1e-14)
    threshold, score = best_threshold(logits, labels)
    assert score == pytest.approx(max(one_by_one), abs=1e-14)
    assert threshold == THRESHOLDS[one_by_one.index(max(one_by_one))].item()


def test_one_label_is_a_class_of_its_own() -> None:
    got = figures(torch.tensor([[1], [0], [1], [0]]), torch.tensor([[1], [0], [0], [1]]))
    assert got == {"example_f1": 0.5, "micro_f1": 0.5, "macro_f1": 0.5, "exact_match": 0.5}


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        figures(torch.zeros(2, 3), torch.zeros(2, 4))

"""The linear rival, trained as the networks are, is level with scikit-learn's; the chain equals scikit-learn's."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multioutput import ClassifierChain

from energynet.experiments.data import Data
from energynet.experiments.data.multilabel import digits, load
from energynet.experiments.find import find_rival
from energynet.experiments.fits import Setup
from energynet.experiments.models import Size
from energynet.experiments.multilabel import MultiLabel, MultiLabelOptions
from energynet.experiments.sklearn_rivals import Chain, LogisticRegressions
from energynet.experiments.task import Rates
from energynet.experiments.trainer import Trainer


def best_figure(data: Data, method: str, options: MultiLabelOptions, strength: float) -> float:
    rival = find_rival(method, MultiLabel)
    trainer = Trainer(Setup(MultiLabel(options), data, rival, Rates(rival.rates.learning_rate, strength), 0))
    while not trainer.finished:
        trainer.run_round()
    assert trainer.best is not None
    return trainer.best.figures["example_f1"]


@pytest.mark.slow
def test_linear_rival_is_level_with_scikit_learn_on_digits() -> None:
    options = MultiLabelOptions(updates=600, every=100, folds=3)
    ours, theirs = (best_figure(digits(), method, options, 1.0) for method in ("logistic", "sklearn-logistic"))
    assert ours == pytest.approx(theirs, abs=0.01) and ours > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emotions", "enron"])
def test_linear_rival_is_level_with_scikit_learn(name: str) -> None:
    folder = Path(os.environ.get("ENERGYNET_DATA_SETS", "absent")) / name
    if not folder.is_dir():
        pytest.skip("ENERGYNET_DATA_SETS is no folder with this data set")
    options, strengths = MultiLabelOptions(folds=5), (10.0, 3.0, 1.0)
    ours, theirs = (max(best_figure(load(folder), m, options, s) for s in strengths) for m in ("logistic", "sklearn-logistic"))
    assert ours > theirs - 0.01


@pytest.mark.parametrize("rival", [Chain(), LogisticRegressions()])
def test_scikit_learn_rivals_score_as_scikit_learn(rival: Chain | LogisticRegressions) -> None:
    rows = digits().train[torch.arange(200)]
    model = rival.build(Size(64, 7))
    rival.fit(model, rows, Rates(weight_decay=0.5), seed=0)
    features, labels = rows.inputs.double().numpy(), rows.targets.numpy()
    base = LogisticRegression(C=2.0, max_iter=500)
    if isinstance(rival, Chain):
        expected = ClassifierChain(base, order=list(range(7))).fit(features, labels).predict_proba(features)
    else:
        expected = np.stack([base.fit(features, labels[:, k]).predict_proba(features)[:, 1] for k in range(7)], axis=1)
    torch.testing.assert_close(model(rows.inputs).sigmoid().double(), torch.from_numpy(expected), atol=1e-5, rtol=0)

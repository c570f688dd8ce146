"""Partial labels: what is revealed stays, what is hidden follows from it, and figures count what was hidden only."""

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from energynet import Termination, minimize
from energynet.constraints import Box
from energynet.experiments.data import Rows
from energynet.experiments.models import Size
from energynet.experiments.multilabel_partial import (
    CERTAIN,
    SHARES,
    Clamped,
    Masked,
    PartialChain,
    PartialLabels,
    PartialScores,
    Plain,
    reveal,
)
from energynet.experiments.task import Rates

SIZE = Size(num_features=6, num_labels=4, hidden=8)


def rows(num: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 6, dtype=torch.float64), (torch.rand(num, 4) < 0.4).double()


def coupled(scale: float = 0.5) -> Clamped:
    model = Clamped(SIZE).double().eval()
    torch.nn.init.normal_(model.energy.pairs, std=scale)
    return model


def test_as_many_are_revealed_as_the_share_says_and_larger_shares_reveal_more() -> None:
    labels = torch.zeros(30, 20)
    masks = reveal(labels)
    assert [int(mask.sum(1).unique()) for mask in masks] == [round(20 * share) for share in SHARES]
    assert all(bool((low <= high).all()) for low, high in pairwise(masks))
    assert all(torch.equal(one, two) for one, two in zip(masks, reveal(torch.ones(30, 20)), strict=True))
    assert len({tuple(row.tolist()) for row in masks[0]}) > 10


def test_energy_holds_what_is_known_and_is_stationary_in_the_rest() -> None:
    model, (z, labels) = coupled(), rows(20)
    known = reveal(labels)[2]
    scores = model.features(z)[1].detach()
    u = model.complete(z, known, labels * known).detach()
    torch.testing.assert_close(u[known > 0], (CERTAIN * (2 * labels - 1))[known > 0])
    matrix = model.energy.matrix().detach()
    assert torch.equal(matrix, matrix.T) and not matrix.diagonal().any()
    mean_field = (model.energy.local(scores) + u.sigmoid() @ matrix).detach()
    assert float(((u - mean_field) * (1 - known)).abs().max()) < 2e-3
    u.requires_grad_()
    (slope,) = torch.autograd.grad(model.energy(u, scores).sum(), u)
    assert float((slope * (1 - known)).abs().max()) < 1e-3


def test_fixed_point_is_the_minimum_within_a_box_that_holds_what_is_known() -> None:
    model, (z, labels) = coupled(), rows(20)
    known = reveal(labels)[1]
    scores, value = model.features(z)[1].detach(), CERTAIN * (2 * labels - 1)
    box = Box(torch.where(known > 0, value, -torch.inf), torch.where(known > 0, value, torch.inf))
    expected = minimize(model.energy, scores, scores, prox=box, termination=Termination(rtol=1e-8)).value
    torch.testing.assert_close(model.complete(z, known, labels * known).detach(), expected.detach(), rtol=0, atol=2e-3)
    assert bool(model.solve(scores, known, labels).converged.all())


def test_with_all_others_known_the_answer_is_the_conditional() -> None:
    model, (z, labels) = coupled(), rows(20)
    known = torch.ones_like(labels)
    known[:, 2] = 0
    u = model.complete(z, known, labels * known)[:, 2]
    expected = model.conditional(model.features(z)[1], labels)[:, 2]
    torch.testing.assert_close(u, expected, rtol=1e-3, atol=1e-3)


def test_pairs_learn_over_scores_of_a_network_that_has_not_seen_the_row() -> None:
    model, (z, _) = Clamped(SIZE).double().eval(), rows(100)
    half = model.side(z)[:, 0]
    assert 20 < int(half.sum()) < 80 and torch.equal(half, torch.cat([model.side(row[None])[:, 0] for row in z]))
    seen, unseen = model.seen_and_unseen(z)
    first, second = (network(z)[1] for network in model.halves)
    assert torch.equal(seen[half], first[half]) and torch.equal(seen[~half], second[~half])
    assert torch.equal(unseen[half], second[half]) and torch.equal(unseen[~half], first[~half])
    assert not unseen.requires_grad
    (slope,) = torch.autograd.grad(seen[half].sum(), model.halves[1].head.weight)
    assert not slope.any()  # the second network learns nothing of the rows of the first


def test_plain_network_takes_no_notice_and_the_masked_one_does() -> None:
    z, labels = rows()
    known = reveal(labels)[2]
    nothing = torch.zeros_like(known)
    for make, same in ((Plain, True), (Masked, False)):
        model = make(SIZE).double().eval()
        one, two = model.complete(z, known, labels * known), model.complete(z, nothing, nothing)
        assert torch.equal(one, two) is same


def test_chain_takes_known_labels_and_decides_the_others() -> None:
    z, labels = rows(200)
    labels[:, 3] = labels[:, 0]  # a copy: where the first is known, the last is
    rival = PartialChain()
    model = rival.build(SIZE).double()
    assert isinstance(model, PartialScores)
    rival.fit(model, Rows(z, labels), Rates(weight_decay=0.01), seed=0)
    nothing, first = torch.zeros_like(labels), torch.zeros_like(labels)
    first[:, 0] = 1
    torch.testing.assert_close(model.complete(z, nothing, nothing), model.scores(z))
    assert torch.equal(model.complete(z, first, labels * first)[:, 3] > 0, labels[:, 0] > 0)


def test_figures_count_hidden_positions_only() -> None:
    task = PartialLabels(PartialLabels.first_look())
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    logits = torch.tensor([[math.nan, 0.0, 0.0, math.nan], [math.nan, 0.0, math.nan, 0.0]])
    output = logits[:, None].expand(2, 4, 4)
    half = {f"threshold_{share * 100:.0f}": 0.4 for share in SHARES}
    told = task.evaluate(output, Rows(torch.zeros(2, 6), labels), half)
    assert abs(told["f1_50"] - 2 / 3) < 1e-6  # of {1} and {1, 2}, of {3} and {1, 3}
    assert abs(told["log_loss_50"] - math.log(2)) < 1e-6
    none = {name: 0.6 for name in half}
    assert task.evaluate(output, Rows(torch.zeros(2, 6), labels), none)["f1_50"] == 0
    assert set(PartialLabels.columns) == set(told)
    assert set(task.calibrate(output, Rows(torch.zeros(2, 6), labels))) == set(half)


def test_every_rival_is_trained_predicts_and_is_judged() -> None:
    task = PartialLabels(replace(PartialLabels.first_look(), hidden=8))
    data = task.load(None)
    batch = data.train[torch.arange(40)]
    for rival in task.rivals():
        model = rival.build(task.size(data))
        if isinstance(rival, PartialChain):
            rival.fit(model, batch, rival.rates, seed=0)
        else:
            rival.training_loss(model, batch, task).backward()
            assert all(p.grad is not None for p in model.parameters()), rival.name
        output = task.predict(model, batch)
        told = task.evaluate(output, batch, task.calibrate(output, batch))
        assert all(0 <= value < 5 for value in told.values())

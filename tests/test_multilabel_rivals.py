"""Each rival of multi-label classification by what defines it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import relative_error
from torch import Tensor, nn

from energynet import GradientStep, Termination, minimize
from energynet.experiments.models import EnergyClassifier, Size
from energynet.experiments.multilabel import FpiGdOneStep, FpiGdTruncated, MultiLabel
from energynet.experiments.multilabel_rivals.base import Ensemble, LabelEnergy, LabelModel, descend
from energynet.experiments.multilabel_rivals.dvn import DVN, oracle
from energynet.experiments.multilabel_rivals.icnn import ICNN, ConvexLabelNetwork
from energynet.experiments.multilabel_rivals.infnet import InfNet
from energynet.experiments.multilabel_rivals.paper import PaperFPI
from energynet.experiments.multilabel_rivals.row_threshold import RowThreshold, ThresholdEnergy, threshold_loss
from energynet.experiments.multilabel_rivals.spen import SPEN, cost
from energynet.experiments.multilabel_rivals.unrolled_spen import UnrolledSPEN
from energynet.experiments.task import FittedRival, Rival

SIZE = Size(num_features=6, num_labels=4, hidden=8)
MODELS: list[Callable[[Size], LabelModel]] = [SPEN, UnrolledSPEN, ICNN, DVN, InfNet, PaperFPI]


def rows(num: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 6, dtype=torch.float64), (torch.rand(num, 4) < 0.4).double()


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]


def assert_derivatives(loss: Callable[[], Tensor], *parameters: Tensor) -> None:
    """Of the first number of each parameter, against central differences."""
    for parameter in parameters:
        (found,) = torch.autograd.grad(loss(), parameter)
        first, values = parameter.data.view(-1)[:1], []
        for h in (1e-5, -1e-5):
            first += h
            values.append(loss().item())
            first -= h
        assert abs(float(found.flatten()[0]) - (values[0] - values[1]) / 2e-5) < 1e-8


def learnable_rows() -> tuple[Tensor, Tensor]:
    z = torch.randn(64, 6, dtype=torch.float64)
    return z, (z[:, :4] + 0.5 * z[:, 1:5] > 0.3).double()


@pytest.mark.parametrize("make", MODELS)
def test_learns_and_answers_the_same_twice(make: Callable[[Size], LabelModel]) -> None:
    z, labels = learnable_rows()
    model = make(SIZE).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-2)
    before = bce(model.eval()(z), labels).item()
    model.train()
    for _ in range(15):
        optimizer.zero_grad()
        model.training_loss(z, labels, bce).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        answer = model(z)
        assert torch.equal(answer, model(z)) and answer.shape == labels.shape
        assert bce(answer, labels).item() < 0.9 * before


@pytest.mark.parametrize("make", MODELS)
def test_answer_of_a_row_does_not_depend_on_the_others(make: Callable[[Size], LabelModel]) -> None:
    if make is PaperFPI:
        pytest.skip("its stopping rule is one for the whole batch")
    z, _ = rows(7)
    model = make(SIZE).double().eval()
    with torch.no_grad():
        assert relative_error(model(z)[:3], model(z[:3])) < 1e-3


def test_every_weight_is_trained() -> None:
    z, labels = rows(32)
    for make in MODELS:
        model = make(SIZE).double()
        model.eval()  # without dropout, which may switch a hidden unit off for all rows
        model.training_loss(z, labels, bce).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not without, f"{make.__name__}: {without}"


def test_ensemble_averages_logits_and_losses() -> None:
    z, labels = rows()
    members = [SPEN(SIZE).double().eval() for _ in range(3)]
    ensemble = Ensemble(members).eval()
    torch.testing.assert_close(ensemble(z), sum(m(z) for m in members) / 3)
    mean = sum(m.training_loss(z, labels, bce) for m in members) / 3
    torch.testing.assert_close(ensemble.training_loss(z, labels, bce), mean)


# ------------------------------------------------------------------------------------------------- descent over labels


def test_descent_of_a_linear_energy_is_the_sigmoid_of_its_scores() -> None:
    scores, y = torch.randn(5, 4, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    (one,) = descend(lambda y: -(scores * y).sum(-1), y, [1.0])
    torch.testing.assert_close(one, scores, rtol=1e-15, atol=1e-15)
    *_, halves = descend(lambda y: -(scores * y).sum(-1), y, [0.5] * 3)
    torch.testing.assert_close(halves, (1 - 0.5**3) * scores)


def test_descent_lowers_energy_minus_entropy_and_keeps_no_graph() -> None:
    model, (z, _) = SPEN(SIZE).double().eval(), rows()
    hidden, scores = model.features(z)

    def free(u: Tensor) -> Tensor:
        y = u.sigmoid()
        entropy = -(y * y.log() + (1 - y) * (1 - y).log()).sum(-1)
        return model.energy(y, scores, hidden) - entropy

    with torch.no_grad():
        iterates = descend(lambda y: model.energy(y, scores, hidden), torch.zeros_like(scores), [0.3] * 40)
        values = torch.stack([free(u) for u in iterates])
    assert bool((values.diff(dim=0) < 1e-12).all()) and not iterates[-1].requires_grad
    u = iterates[-1].requires_grad_()
    assert torch.autograd.grad(free(u).sum(), u)[0].abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------- SPEN


def test_hinge_is_zero_for_a_perfect_margin_and_counts_what_is_violated() -> None:
    model, (z, labels) = SPEN(SIZE).double(), rows()
    hidden = model.features(z)[0].detach()
    nn.init.zeros_(model.energy.weight)  # the local term alone
    perfect = 1000 * (2 * labels - 1)
    assert torch.equal(model.hinge(labels, perfect, hidden), torch.zeros(5, dtype=torch.float64))
    # All scores 0: the most violating answer is the opposite of the truth as far as the entropy lets it go.
    found = model.hinge(labels, torch.zeros_like(perfect), hidden)
    assert bool((found > 0).all()) and bool((found <= 4).all())
    # All labels wrong by far: Δ = 4 and E(t) − E(ŷ) = 4 · 1000.
    torch.testing.assert_close(model.hinge(labels, -perfect, hidden), torch.full((5,), 4004.0, dtype=torch.float64))


def test_hinge_bounds_the_cost_of_the_answer() -> None:
    model, (z, labels) = SPEN(SIZE).double().eval(), rows(64)
    hidden, scores = model.features(z)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)  # (16, 4)
    energies = torch.stack([model.energy(c.expand(64, 4), 10 * scores, hidden) for c in corners])
    answer = corners[energies.argmin(0)]
    truth = model.energy(labels, 10 * scores, hidden)
    exact = (truth + torch.stack([cost(c.expand(64, 4), labels) for c in corners]) - energies).amax(0)
    assert bool((exact >= cost(answer, labels) - 1e-12).all())
    assert bool((model.hinge(labels, 10 * scores, hidden) <= exact + 0.5).all())


# ------------------------------------------------------------------------------------------------- unrolled SPEN


def test_unrolled_gradient_is_that_of_finite_differences() -> None:
    model, (z, labels) = UnrolledSPEN(SIZE, num_steps=3).double().eval(), rows()
    parameters = (model.step_sizes, model.energy.weight, model.features.head.bias)
    assert_derivatives(lambda: model.training_loss(z, labels, bce), *parameters)


def test_unrolled_loss_weights_later_iterates_more() -> None:
    model, (z, labels) = UnrolledSPEN(SIZE, num_steps=3).double().eval(), rows()
    first, second, third = (bce(u, labels) for u in model.iterates(z))
    expected = (first / 3 + second / 2 + third) / (1 / 3 + 1 / 2 + 1)
    torch.testing.assert_close(model.training_loss(z, labels, bce), expected)


# ------------------------------------------------------------------------------------------------- ICNN


@torch.no_grad()
def test_network_is_convex_in_the_labels_for_any_weights() -> None:
    for scale in (1.0, 5.0):
        energy = ConvexLabelNetwork(SIZE).double()
        for parameter in energy.parameters():
            nn.init.normal_(parameter, std=scale)
        scores, hidden = (torch.randn(200, n, dtype=torch.float64) for n in (4, 8))
        one, other, t = torch.rand(200, 4).double(), torch.rand(200, 4).double(), torch.rand(200, 1).double()
        chord = (t * energy(one, scores, hidden)[:, None] + (1 - t) * energy(other, scores, hidden)[:, None])[:, 0]
        middle = energy(t * one + (1 - t) * other, scores, hidden)
        assert bool((middle <= chord + 1e-9 * chord.abs()).all())
        assert bool(((chord - middle) > 1e-3).any())  # and not linear


def test_answer_is_the_minimum_of_network_minus_entropy() -> None:
    model, (z, _) = ICNN(SIZE).double().eval(), rows()
    hidden, scores = model.features(z)
    u = model(z).detach().requires_grad_()
    y = u.sigmoid()
    free = model.energy(y, scores, hidden) + (y * y.log() + (1 - y) * (1 - y).log()).sum(-1)
    assert torch.autograd.grad(free.sum(), y)[0].abs().max() < 1e-3
    assert bool(model.solve(z).converged.all())


def test_gradient_through_the_minimum_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    from energynet.experiments.multilabel_rivals import icnn

    monkeypatch.setattr(icnn, "FORWARD", Termination(rtol=1e-12, max_steps=500))
    monkeypatch.setattr(icnn, "BACKWARD", Termination(rtol=1e-12, max_steps=500))
    model, (z, labels) = ICNN(SIZE).double().eval(), rows()
    assert_derivatives(lambda: bce(model(z), labels), model.energy.weight, model.features.head.bias)


# ------------------------------------------------------------------------------------------------- DVN


def test_value_of_the_truth_is_one_and_of_an_answer_its_f1() -> None:
    _, labels = rows(20)
    torch.testing.assert_close(oracle(labels, labels), torch.ones(20, dtype=torch.float64))
    answer = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    truth = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert oracle(answer, truth).item() == 0.5


def test_network_is_trained_on_the_truth_with_value_one_and_on_what_it_gets_most_wrong() -> None:
    model, (z, labels) = DVN(SIZE).double().eval(), rows(20)
    read = [t.detach() for t in model.features(z)][::-1]
    met, worst, truth = model.answers(labels, *read)
    assert torch.equal(truth, labels)
    assert bool((model.error(worst, labels, *read) >= model.error(met, labels, *read)).double().mean() > 0.9)
    first, last = (model.energy(u.sigmoid(), *read) for u in (read[0], model.ascent(*read)[-1]))
    assert bool((last < first).all())


def test_trained_value_network_knows_good_from_bad() -> None:
    z, labels = learnable_rows()
    model = DVN(SIZE).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.training_loss(z, labels, bce).backward()
        optimizer.step()
    hidden, scores = model.eval().features(z)
    good, bad = ((-model.energy(y, scores, hidden)).sigmoid().mean().item() for y in (labels, 1 - labels))
    assert good > bad + 0.2


# ------------------------------------------------------------------------------------------------- InfNet


def test_game_is_descended_by_the_energy_and_climbed_by_the_answer() -> None:
    model, (z, labels) = InfNet(SIZE).double().eval(), rows()
    hidden, scores = model.features(z)
    logits = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    answer = logits.sigmoid()
    game = model.game(answer, labels, (scores, hidden), margin=True).sum()
    plain = (cost(answer, labels) + model.energy(labels, scores, hidden) - model.energy(answer, scores, hidden)).relu().sum()
    torch.testing.assert_close(game, plain)
    for wanted, sign in ((logits, -model.strength), (model.energy.weight, 1.0)):
        one, other = (torch.autograd.grad(loss, wanted, retain_graph=True)[0] for loss in (game, plain))
        torch.testing.assert_close(one, sign * other)


def test_inference_network_amortizes_the_minimization() -> None:
    """Playing against a fixed energy, its answers get nearly the energy that descent finds, on rows that it has not seen."""
    model, (z, _) = InfNet(SIZE, strength=1.0).double().eval(), rows(256)
    with torch.no_grad():
        hidden, scores = (3 * t for t in model.features(z))
        worse = 1 - (scores > 0).double()  # answers that every hinge is active against
    optimizer = torch.optim.AdamW(model.inference.parameters(), lr=4e-2)

    def play(part: slice) -> Tensor:
        logits = model.inference(z[part])[1]
        return model.game(logits.sigmoid(), worse[part], (scores[part], hidden[part]), margin=False).mean()

    for _ in range(100):
        optimizer.zero_grad()
        play(slice(128)).backward()
        optimizer.step()
    test = slice(128, None)
    with torch.no_grad():
        u = descend(lambda y: model.energy(y, scores[test], hidden[test]), scores[test], [0.5] * 50, smoothing=0.0)[-1]
        found, lowest, middle = (
            model.energy(y, scores[test], hidden[test]).mean()
            for y in (model.inference(z[test])[1].sigmoid(), u.sigmoid(), torch.full_like(u, 0.5))
        )
        assert found < lowest + 0.25 * (middle - lowest)


# ------------------------------------------------------------------------------------------------- the row's threshold


def test_threshold_chooses_the_set_of_largest_expected_f1() -> None:
    p = torch.rand(40, 6, dtype=torch.float64) ** 3
    threshold = minimize(ThresholdEnergy(), None, p, termination=Termination(rtol=1e-12)).value
    sets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6)  # (64, 6)
    expected = 2 * p @ sets.T / (p.sum(1, keepdim=True) + sets.sum(1))
    best, which = expected.max(1)
    torch.testing.assert_close(2 * threshold.squeeze(1), best, rtol=1e-9, atol=0)
    assert torch.equal((p > threshold).double(), sets[which])


def test_threshold_learns_through_the_solve() -> None:
    model, (z, labels) = RowThreshold(SIZE).double().eval(), rows()
    model.layer.termination = Termination(rtol=1e-12, max_steps=50)
    assert_derivatives(lambda: threshold_loss(model, z, labels, bce), model.scale, model.shift)


# ------------------------------------------------------------------------------------------------- inexact gradients


@pytest.mark.parametrize("rival, terms", [(FpiGdOneStep(), 1), (FpiGdTruncated(), 3)])
def test_inexact_gradient_is_that_of_its_formula(rival: Rival, terms: int) -> None:
    model, (z, _) = rival.build(SIZE).double().eval(), rows(1)
    assert isinstance(model, EnergyClassifier)
    experts = model.features(z).detach().requires_grad_()
    v = torch.randn(1, 4, dtype=torch.float64)
    u = model.combine(experts)
    (found,) = torch.autograd.grad(u, experts, v)
    step = GradientStep(model.layer.energy, model.layer.step_size)
    J = torch.func.jacrev(lambda u: step(u, experts))(u.detach())[0, :, 0].detach()
    c = sum(torch.linalg.matrix_power(J.T, k) @ v[0] for k in range(terms))
    (expected,) = torch.autograd.grad(step(u.detach(), experts), experts, c[None])
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------- the paper's setting


def test_paper_step_is_a_gradient_step_on_the_paper_energy() -> None:
    model, (z, _) = PaperFPI(SIZE).double(), rows()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.cat([model.inputs.weight, model.labels.weight], 1)  # W of [z; σ(x)]
    units = (torch.cat([z, x.sigmoid()], 1) @ weight.T + model.inputs.bias).relu()
    (slope,) = torch.autograd.grad(units.square().mean(1).sum(), x)
    torch.testing.assert_close(model.step(x.detach(), model.inputs(z)), x.detach() - slope)


def test_paper_backward_is_three_terms_of_the_series() -> None:
    model, (z, labels) = PaperFPI(SIZE, max_steps=20).double(), rows(1)
    code = model.inputs(z)
    x = model.solve(code.detach())
    J = torch.func.jacrev(lambda x: model.step(x, code.detach()))(x)[0, :, 0]
    answer = model.step(x, code).detach().requires_grad_()
    (v,) = torch.autograd.grad(bce(answer, labels), answer)
    c = (v[0] + J.T @ v[0] + J.T @ J.T @ v[0])[None]
    (expected,) = torch.autograd.grad(model.step(x, code), model.labels.weight, c)
    (found,) = torch.autograd.grad(bce(model(z), labels), model.labels.weight)
    torch.testing.assert_close(found, expected)


def test_paper_stops_when_the_whole_batch_moves_little_or_out_of_steps() -> None:
    model, (z, _) = PaperFPI(SIZE, max_steps=10_000, tolerance=1e-4).double(), rows()
    with torch.no_grad():
        code = model.inputs(z)
        x = model.solve(code)
        assert (model.step(x, code) - x).square().sum() < 1e-4
        short = PaperFPI(SIZE, max_steps=2).double()
        short.load_state_dict(model.state_dict())
        start = torch.zeros(5, 4, dtype=torch.float64)
        torch.testing.assert_close(short.solve(code), model.step(model.step(start, code), code))


def test_label_energy_is_that_of_its_formula() -> None:
    energy = LabelEnergy(SIZE, num_units=2).double()
    y, scores, hidden = (torch.randn(3, n, dtype=torch.float64) for n in (4, 4, 8))
    A, b, B, c = energy.labels.weight, energy.labels.bias, energy.inputs.weight, energy.weight
    expected = [c @ torch.log1p(torch.exp(A @ y[k] + B @ hidden[k] + b)) - scores[k] @ y[k] for k in range(3)]
    torch.testing.assert_close(energy(y, scores, hidden), torch.stack(expected))


# ------------------------------------------------------------------------------------------------- as the experiment sees them


def test_every_neural_method_is_also_an_ensemble() -> None:
    data = MultiLabel(MultiLabel.first_look()).load(None)
    task = MultiLabel(replace(MultiLabel.first_look(), experts=2, hidden=64))
    batch = data.train[torch.arange(16)]
    for rival in task.rivals():
        if isinstance(rival, FittedRival) or rival.name == "logistic":
            continue
        model = rival.build(task.size(data))
        one = rival.build(replace(task.size(data), num_experts=1))
        assert sum(p.numel() for p in model.parameters()) > 1.6 * sum(p.numel() for p in one.parameters()), rival.name
        rival.training_loss(model, batch, task).backward()
        assert task.predict(model, batch).shape == batch.targets.shape
        assert all(value >= 0 for value in rival.diagnose(model, batch).values())


def test_names_differ_and_docstrings_name_a_source() -> None:
    names = [rival.name for rival in MultiLabel.rivals()]
    assert len(names) == len({*names}) == 15
    for make in MODELS:
        assert "Source:" in (make.__doc__ or "")

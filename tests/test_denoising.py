"""The experiment on denoising: data, batches, every method, score matching before solves, weights that ship."""

from pathlib import Path

import pytest
import torch
from torch import nn

from energynet.energies import pretrained
from energynet.experiments.data import Data, Rows
from energynet.experiments.denoising import (
    Denoising,
    DenoisingOptions,
    EnergyRival,
    Restored,
    Ridge,
    Size,
    TotalVariation,
    noisy,
    restore,
)
from energynet.experiments.denoising_models import EnergyDenoiser
from energynet.experiments.denoising_rivals import ClassicalRival
from energynet.experiments.fits import Setup
from energynet.experiments.log import read_log
from energynet.experiments.results import RunFolder, read_json
from energynet.experiments.runs import save_model
from energynet.experiments.ship import ship
from energynet.experiments.task import Rates
from energynet.experiments.trainer import Trainer

OPTIONS = DenoisingOptions(updates=4, every=4, matching=2, batch_size=2, side=24, held_out=0.5, test_sigmas=(25.0, 50.0))


class Half(nn.Module):
    """Returns half of the noisy picture."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 0.5 * inputs[:, :1]


@pytest.fixture
def pictures() -> Data:
    torch.manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.rand(4, 1, 40, 40), 9, 1, 4)
    return Data("smooth", Rows(smooth, smooth), Rows(smooth[:2], smooth[:2]))


def test_batches_are_crops_with_noise_of_their_levels(pictures: Data) -> None:
    task = Denoising(OPTIONS)
    torch.manual_seed(1)
    batch = task.draw(pictures.train[torch.arange(4).repeat(30)])
    assert batch.inputs.shape == (120, 2, 24, 24) and batch.targets.shape == (120, 1, 24, 24)
    sigma = batch.inputs[:, 1, 0, 0]
    assert 12 / 255 <= sigma.min() < 14 / 255 and 47 / 255 < sigma.max() <= 55 / 255
    ratio = (batch.inputs[:, :1] - batch.targets).flatten(1).std(1) / sigma
    assert ratio.min() > 0.85 and ratio.max() < 1.15
    torch.manual_seed(1)
    torch.testing.assert_close(task.draw(pictures.train[torch.arange(4).repeat(30)]).inputs, batch.inputs)


def test_figures_are_those_of_the_protocol(pictures: Data) -> None:
    clean = pictures.test.targets
    restored = restore(Half(), clean, (25.0, 50.0))
    assert restored.pictures.shape == (2, 2, 1, 40, 40)
    generator = torch.Generator().manual_seed(25)
    first = clean[0] + 25 / 255 * torch.randn(1, 1, 40, 40, generator=generator)[0]
    torch.testing.assert_close(restored.pictures[0, 0], (0.5 * first).clamp(0, 1))
    told = Denoising(OPTIONS).evaluate(Restored((25.0,), (clean + 0.1)[None], (1.0,)), pictures.test, {})
    assert told["psnr_25"] == pytest.approx(20.0, abs=1e-4) and 0.5 < told["ssim_25"] < 1 and told["seconds_25"] == 1.0


@pytest.mark.parametrize("rival", Denoising.rivals(), ids=lambda rival: rival.name)
def test_every_method_takes_an_update_and_denoises(rival: EnergyRival | ClassicalRival, pictures: Data) -> None:
    torch.manual_seed(0)
    task, size = Denoising(OPTIONS), Size(0, 2e-2)
    model = rival.build(size)
    if isinstance(rival, ClassicalRival):
        rival.candidates = rival.candidates[:1]  # type: ignore[misc]
        rival.fit(model, pictures.train[torch.arange(1)], Rates(), 0)
    else:
        model.train()
        batch = task.draw(pictures.train[torch.arange(2)])
        loss = rival.training_loss(model, batch, task)
        loss.backward()
        learned = [p for name, p in model.named_parameters() if name != "log_step"]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learned)
    noisy_one = noisy(pictures.test.targets[:1, :, :24, :24], torch.tensor([0.1]))
    with torch.no_grad():
        answer = model.eval()(noisy_one)
    assert answer.shape == (1, 1, 24, 24) and torch.isfinite(answer).all()


def test_score_matching_comes_first_and_a_run_goes_on(pictures: Data, tmp_path: Path) -> None:
    task, rival = Denoising(OPTIONS), Ridge()
    setup = Setup(task, pictures, rival, rival.rates, 0)
    trainer = Trainer(setup)
    one = trainer.run_round()
    assert one.updates == 4 and one.forward_steps is not None and one.converged == 1.0
    model = trainer.chosen_model()
    assert isinstance(model, EnergyDenoiser) and int(model.updates) == 4
    assert one.figures["psnr_25"] > 21
    folder = tmp_path / "ridge" / "seed-0"
    folder.mkdir(parents=True)
    save_model(RunFolder(folder), setup, model, one)
    shipped = ship(folder, tmp_path)
    tensors, metadata = pretrained.read_weights(shipped)
    assert "--matching 2" in metadata["trained"] and shipped.stat().st_size < 200_000
    for name, value in model.prior.state_dict().items():
        torch.testing.assert_close(tensors[name].float(), value, rtol=1e-3, atol=1e-3)


def test_scales_are_fitted_to_the_fixed_point(pictures: Data) -> None:
    torch.manual_seed(0)
    model = Ridge().build(Size(2, 2e-2))
    batch = Denoising(OPTIONS).draw(pictures.train[torch.arange(2)])
    before = model.prior.raw_strength.detach().clone()
    strength, scale = model.fit_scales(batch.inputs, batch.targets)
    torch.testing.assert_close(model.prior.raw_strength[0] - before[0], torch.tensor(strength))
    assert abs(scale) <= 1.5


def test_total_variation_is_tuned_on_training_pictures(pictures: Data) -> None:
    rival = TotalVariation()
    model = rival.build(None)
    rival.fit(model, pictures.train, Rates(), 0)
    assert set(model.weights.tolist()) <= {torch.tensor(w).item() for w in rival.candidates}


def test_weights_that_ship_are_evaluated_and_logged(pictures: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from energynet.experiments import denoising_bsd68

    monkeypatch.setattr(denoising_bsd68, "load", lambda folder: pictures)
    monkeypatch.setattr(denoising_bsd68, "MIDDLE", 12)
    log, out = tmp_path / "log.json", tmp_path / "figures.json"
    wanted = denoising_bsd68.Wanted(tmp_path, ("ridge",), pictures=1, unsure=1, out=out, test_log=log)
    told = denoising_bsd68.evaluate(wanted)["ridge"]
    assert told["pictures"] == 1 and told["converged"] == 1.0 and told["solved_exactly_25"] < 0.01
    assert 0.5 < told["covered_90_25"] <= 1 and told["psnr_25"] > 24
    (entry,) = read_log(log)
    assert entry["method"] == "ridge" and entry["figures"]["psnr_25"] == told["psnr_25"]
    assert read_json(out)["ridge"] == told

"""The optical-flow experiment: models on one level, figures, tiles, and the command on a user's own frames."""

import json
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import energynet.experiments
from energynet.energies import FlowEnergy, OpticalFlow
from energynet.energies.flow_solver import Effort
from energynet.experiments.data.flow_files import LabeledPair, read_flow, write_flow
from energynet.experiments.flow import FlowOptions, OpticalFlowTask, pair_figures
from energynet.experiments.flow_models import EnergyFlow, Implicit, Unrolled, level_loss
from energynet.experiments.flow_tiles import in_tiles, ramp, shifted, starts
from energynet.experiments.flow_use import SMALLEST, trained


def textured(height: int, width: int, motion: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth random picture ``(1, H, W)`` and the same moved by whole pixels, (right, down)."""
    margin = max(map(abs, motion))
    size, generator = (height + 2 * margin, width + 2 * margin), torch.Generator().manual_seed(seed)
    layers = [torch.rand(1, 1, size[0] // k + 2, size[1] // k + 2, generator=generator) for k in (6, 12, 24)]
    smooth = sum(torch.nn.functional.interpolate(layer, size=size, mode="bicubic") for layer in layers)[0]
    smooth = ((smooth - smooth.mean()) / smooth.std() * 0.15 + 0.5).clamp(0, 1)
    x, y = motion
    first = smooth[:, margin : margin + height, margin : margin + width]
    return first, smooth[:, margin - y : margin - y + height, margin - x : margin - x + width]


def save(path: Path, image: Tensor, top: int = 255) -> Path:
    values = (image * top).round().movedim(0, -1).numpy().astype(np.uint8 if top == 255 else np.uint16)
    assert cv2.imwrite(str(path), values[..., ::-1] if values.shape[-1] == 3 else values)
    return path


@pytest.fixture
def frames(tmp_path: Path) -> list[Path]:
    return [save(tmp_path / f"{name}.png", image) for name, image in zip("ab", textured(48, 64, (2, -1)))]


def use(out: Path, *, named: bool = False, **options: object) -> list[str]:
    lines: list[str] = []
    OpticalFlowTask(FlowOptions(**options)).use(out, named=named, say=lines.append)  # type: ignore[arg-type]
    return lines


def test_the_flow_of_a_users_frames_is_written(tmp_path: Path, frames: list[Path]) -> None:
    truth = torch.tensor([2.0, -1.0])[:, None, None].expand(2, 48, 64)
    write_flow(tmp_path / "true.flo", truth)
    lines = use(tmp_path / "out", named=True, frames=tuple(map(str, frames)), ground_truth=str(tmp_path / "true.flo"))
    flow, valid = read_flow(tmp_path / "out" / "flow.flo")
    assert bool(valid.all()) and float((flow - truth).norm(dim=0)[8:-8, 8:-8].mean()) < 0.1
    names = {"flow.flo", "flow.png", "warped.png", "error.png", "comparison.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert any("end-point error 0." in line for line in lines) and "level 2 of 2" in lines
    warped = cv2.imread(str(tmp_path / "out" / "warped.png"), cv2.IMREAD_GRAYSCALE).astype(float)
    assert np.abs(warped - cv2.imread(str(frames[0]), cv2.IMREAD_GRAYSCALE))[8:-8, 8:-8].mean() < 4


@pytest.mark.parametrize("top", [255, 65535])
def test_gray_and_color_odd_sizes_and_16_bits(tmp_path: Path, top: int) -> None:
    first, second = textured(37, 51, (1, 1))
    paths = save(tmp_path / "a.png", first.expand(3, -1, -1), top), save(tmp_path / "b.png", second, top)
    use(tmp_path / "out", frames=tuple(map(str, paths)))
    flow, _ = read_flow(tmp_path / "out" / "flow.flo")
    assert float((flow - 1).norm(dim=0)[8:-8, 8:-8].mean()) < 0.2
    assert not (tmp_path / "out" / "comparison.png").exists()


def test_frames_that_cannot_be_used_are_named(tmp_path: Path, frames: list[Path]) -> None:
    small = save(tmp_path / "small.png", torch.rand(1, 48, 60))
    tiny = save(tmp_path / "tiny.png", torch.rand(1, 8, 8))
    text = tmp_path / "text.png"
    text.write_text("hello")
    write_flow(tmp_path / "other.flo", torch.zeros(2, 9, 9))
    for given, truth, said in [
        ((frames[0],), None, "two pictures, got 1"),
        ((frames[0], small), None, "48 × 64 pixels, .* 48 × 60"),
        ((tiny, tiny), None, f"at least {SMALLEST} × {SMALLEST}"),
        ((frames[0], text), None, "no picture"),
        ((frames[0], tmp_path / "absent.png"), None, "no file"),
        (tuple(frames), tmp_path / "other.flo", "9 × 9 pixels"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            use(tmp_path / "out", frames=tuple(map(str, given)), ground_truth=str(truth or ""))


def test_with_data_or_methods_it_trains() -> None:
    assert not OpticalFlowTask(FlowOptions()).use(None, named=True, say=print)


@pytest.mark.slow
def test_a_large_pair_is_cut_into_tiles_that_fit_together() -> None:
    first, second = textured(150, 260, (8, 3))
    lines: list[str] = []
    model = OpticalFlow(FlowEnergy(), Effort())
    estimate = in_tiles(model, first, second, lines.append, tile=128)
    assert "tile 12 of 12" in lines
    error = (estimate.flow[0] - torch.tensor([8.0, 3.0])[:, None, None]).norm(dim=0)
    assert float(error[16:-16, 16:-32].mean()) < 0.2


def test_tiles_cover_everything() -> None:
    for length in (100, 128, 129, 1000):
        begun = starts(length, 128)
        assert begun[0] == 0 and begun[-1] + 128 >= length and all(b - a <= 32 for a, b in pairwise(begun))
    assert bool((ramp(200) > 0).all())
    image = torch.arange(6.0).reshape(1, 2, 3)
    assert shifted(image, -1, 2, 2, 2).tolist() == [[[2, 2], [2, 2]]]


def test_figures_by_hand() -> None:
    truth = torch.tensor([[[0.0, 100.0, 0.0, 5.0]], [[0.0, 0.0, 0.0, 0.0]]])
    flow = torch.tensor([[[4.0, 104.0, 0.0, 9.0]], [[0.0, 0.0, 1.0, 0.0]]])
    pair = LabeledPair("p", truth, truth, truth, torch.tensor([[True, True, True, False]]))
    figures = pair_figures(flow, pair)
    assert figures["epe"] == pytest.approx(3.0) and figures["far"] == pytest.approx(1 / 3)  # 104 for 100 is within 5 %


def test_the_loss_of_a_level_is_in_pixels_of_the_frame() -> None:
    truth = torch.zeros(1, 2, 8, 8)
    truth[:, 0] = 4.0
    assert float(level_loss(torch.zeros(1, 2, 4, 4), truth)) == pytest.approx(2**0.5 * (4.01**0.4 - 0.01**0.4))
    assert float(level_loss(truth, truth)) == pytest.approx(0, abs=1e-7)


def batch_of(task: OpticalFlowTask) -> tuple[Tensor, Tensor, Tensor]:
    rows = task.draw(task.load(None).train[torch.tensor([0])])
    first, second = rows.inputs.split(1, 1)
    return first[..., :48, :64], second[..., :48, :64], rows.targets[..., :48, :64]


@pytest.mark.parametrize("name", ["energy", "energy-one-step", "fpi-nn", "fpi-nn-from-zero", "pyramid"])
def test_every_model_learns_on_a_level(name: str) -> None:
    task = OpticalFlowTask(FlowOptions(pairs=2, judged=1))
    torch.manual_seed(0)
    model = next(rival for rival in task.rivals() if rival.name == name).build(None)
    loss = model.step_loss(*batch_of(task))
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    assert any(float(p.grad.abs().sum()) > 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
def test_exact_gradients_are_those_of_long_unrolling() -> None:
    """At the minimum, unrolling long enough and solving the adjoint equation agree."""
    torch.manual_seed(1)
    first, second, truth = batch_of(OpticalFlowTask(FlowOptions(pairs=2, judged=1)))
    first, second, truth = (t[..., :16, :16].double() for t in (first, second, truth))
    gradients = []
    for how in (Implicit(rounds=60, inner=30, rtol=1e-8, budget=400), Unrolled(60, rounds=60, inner=30)):
        torch.manual_seed(0)
        model = EnergyFlow.small(how).double()
        with torch.no_grad():
            model.flow.energy.ridge = 0.05
            model.flow.energy.correction.layers[-1].weight.normal_(0, 0.1)
        code = model.flow.energy.encode(first, second, torch.zeros_like(truth))
        loss = level_loss(how.minimum(model, code), truth)
        found = torch.autograd.grad(loss, list(model.flow.energy.correction.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5 * float(gradients[1].abs().max()))


def test_weights_of_the_package_are_small_and_used() -> None:
    path = Path(energynet.experiments.__file__).parent / "weights" / "flow.safetensors"
    assert (trained().energy.correction is not None) == path.is_file()
    assert not path.is_file() or path.stat().st_size <= 200_000


@pytest.mark.slow
def test_the_command_trains_and_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from energynet.experiments import cli

    folder = tmp_path / "set"
    folder.mkdir()
    first, second = textured(48, 64, (2, 1))
    flow = torch.tensor([2.0, 1.0])[:, None, None].expand(2, 48, 64).movedim(0, -1).numpy()
    np.savez(folder / "one.npz", frame0=first[0].numpy(), frame1=second[0].numpy(), flow=flow)
    methods = ["--method", "hand-energy", "energy", "dis"]
    small = ["--seeds", "1", "--updates", "2", "--every", "1", "--pairs", "2", "--judged", "1"]
    places = ["--data", str(folder), "--out", str(tmp_path / "out"), "--test-log", str(tmp_path / "log.json")]
    monkeypatch.setattr("sys.argv", ["energynet", "run", "flow", *methods, *small, *places])
    cli.main()
    metrics = {one["method"]: one["test"] for one in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    assert metrics["hand-energy"]["epe"] < 0.3 and metrics["energy"]["epe/one"] < 0.3
    assert len(json.loads((tmp_path / "log.json").read_text())) == 3
    assert trained(tmp_path / "out" / "energy" / "seed-0")(first[None], second[None]).shape == (1, 2, 48, 64)

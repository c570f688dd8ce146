"""`energynet run denoise`: pictures in, pictures out, and what is refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from energynet.energies import CosineStart, Denoiser, Huber, RidgePrior, denoiser, pretrained
from energynet.experiments import denoise_command
from energynet.experiments.cli import run
from energynet.experiments.denoise_command import Problem, restore_picture, tiles
from energynet.experiments.picture_files import Picture, PictureError, estimated_noise, read_kernel, read_mask

GENERATOR = np.random.default_rng(0)


def write(path: Path, values: np.ndarray) -> Path:
    code = cv2.imencode(path.suffix, values)[1]
    code.tofile(path)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small prior in place of the one that ships, so that a solve takes a moment."""
    torch.manual_seed(0)
    monkeypatch.setattr(denoise_command, "denoiser", lambda name: Denoiser(RidgePrior(CosineStart(3), Huber(8))))
    monkeypatch.setattr(denoise_command, "UNSURE", 12)


@pytest.mark.parametrize("shape", [(20, 18), (20, 18, 3), (20, 18, 4)])
@pytest.mark.parametrize("ending, depth", [(".png", np.uint8), (".png", np.uint16), (".tiff", np.uint16), (".tiff", np.uint8)])
def test_pictures_are_written_as_they_were_read(tmp_path: Path, shape: tuple[int, ...], ending: str, depth: type) -> None:
    values = GENERATOR.integers(0, np.iinfo(depth).max, shape).astype(depth)
    path = write(tmp_path / f"a{ending}", values)
    picture = Picture.read(path)
    assert picture.values.shape == (min(shape[2], 3) if len(shape) > 2 else 1, 20, 18)
    picture.write(tmp_path / f"b{ending}", picture.values)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / f"b{ending}"), cv2.IMREAD_UNCHANGED), values)


def test_jpeg_is_read(tmp_path: Path) -> None:
    assert Picture.read(write(tmp_path / "a.jpg", np.full((9, 8, 3), 128, np.uint8))).values.shape == (3, 9, 8)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    write(tmp_path / "black.png", np.zeros((5, 5), np.uint8))
    for name, match in (("text.png", "no picture that can be read"), ("empty.png", "is empty"), ("none.png", "not a file")):
        with pytest.raises(PictureError, match=match):
            Picture.read(tmp_path / name)
    with pytest.raises(PictureError, match="black: a kernel"):
        read_kernel(tmp_path / "black.png")
    with pytest.raises(PictureError, match="no pixel is known"):
        read_mask(tmp_path / "black.png", (5, 5))
    with pytest.raises(PictureError, match="5 × 5 pixels, the picture 6 × 5"):
        read_mask(tmp_path / "black.png", (6, 5))
    with pytest.raises(PictureError, match="give --sigma"):
        estimated_noise(np.zeros((1, 1, 1), np.float32))


def test_noise_is_estimated() -> None:
    ramp = np.linspace(0, 1, 200, dtype=np.float32) * np.ones((1, 200, 1), np.float32)
    ramp[..., 120:] += 0.5
    noisy = ramp + 0.05 * GENERATOR.standard_normal(ramp.shape, dtype=np.float32)
    assert estimated_noise(noisy) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("height, width, side, reach", [(10, 7, 4, 2), (5, 5, 5, 3), (1, 9, 4, 0)])
def test_tiles_cover_each_pixel_once(height: int, width: int, side: int, reach: int) -> None:
    count, whole = np.zeros((height, width), int), np.arange(height * width).reshape(height, width)
    for wide, inner, narrow in tiles(height, width, side, reach):
        count[inner] += 1
        np.testing.assert_array_equal(whole[wide][narrow], whole[inner])
    assert (count == 1).all()


def test_tiles_give_what_the_whole_picture_gives() -> None:
    from rich.console import Console

    torch.manual_seed(0)
    layer = Denoiser(RidgePrior(CosineStart(3), Huber(8)))
    picture = Picture(GENERATOR.random((1, 60, 50), dtype=np.float32), None, np.dtype(np.uint8))
    results = [restore_picture(layer, picture, 0.1, Problem(denoise_command.Identity()), tile, Console(quiet=True))[0]
               for tile in (64, 30)]  # fmt: skip
    np.testing.assert_allclose(*results, atol=5e-3)


def test_the_command_denoises_deblurs_and_inpaints(tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]) -> None:
    picture = write(tmp_path / "p.png", GENERATOR.integers(90, 160, (24, 20, 4)).astype(np.uint8))
    kernel = write(tmp_path / "k.png", np.full((2, 3), 255, np.uint8))
    mask = write(tmp_path / "m.png", np.where(GENERATOR.random((24, 20)) > 0.3, 255, 0).astype(np.uint8))
    before = cv2.imread(str(picture), cv2.IMREAD_UNCHANGED)
    for options in ([], ["--sigma", "20", "--kernel", str(kernel)], ["--sigma", "20", "--mask", str(mask)]):
        out = tmp_path / f"out{len(options)}{options[2:3]}"
        run(["denoise", "--image", str(picture), "--out", str(out), *options])
        after = cv2.imread(str(out / "p.png"), cv2.IMREAD_UNCHANGED)
        assert after.shape == before.shape and (after[..., 3] == before[..., 3]).all()
        assert after[..., :3].std() < before[..., :3].std()
        assert (out / "figure.png").stat().st_size > 5000
    assert "(estimated)" in capsys.readouterr().out
    for options, match in ((["--sigma", "0"], "between 0 and 255"), (["--kernel", "a", "--mask", "b"], "together")):
        with pytest.raises(PictureError, match=match):
            run(["denoise", "--image", str(picture), *options])


def test_a_single_pixel_is_served(tmp_path: Path, small: None) -> None:
    picture = write(tmp_path / "p.png", np.full((1, 1), 77, np.uint8))
    run(["denoise", "--image", str(picture), "--sigma", "10", "--out", str(tmp_path / "out")])
    assert cv2.imread(str(tmp_path / "out" / "p.png"), cv2.IMREAD_UNCHANGED) == 77


def test_weights_that_ship_are_small_and_denoise() -> None:
    names = pretrained.available()
    assert "ridge" in names
    torch.manual_seed(0)
    clean = torch.zeros(1, 1, 32, 32)
    clean[..., 8:24, 10:26] = 0.8
    noisy = clean + 0.1 * torch.randn_like(clean)
    for name in names:
        assert (pretrained.WEIGHTS / f"{name}.safetensors").stat().st_size < 200_000
        assert "energynet run denoising" in pretrained.trained_by(name)
        with torch.no_grad():
            error = (denoiser(name)(noisy, 0.1) - clean).square().mean()
        assert error < 0.35 * 0.01, (name, error)
    with pytest.raises(ValueError, match="there are"):
        denoiser("none")


def test_the_embedded_picture(tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]) -> None:
    run(["denoise", "--out", str(tmp_path)])
    assert "dB before" in capsys.readouterr().out and (tmp_path / "camera.png").is_file()

"""Reading and writing flows and pictures, and the folders of the usual data sets, on files of a few pixels."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from energynet.experiments.data.flow_files import find_pairs, read_flow, read_picture, write_flow
from energynet.experiments.data.flow_pairs import HELD_OUT, FlowPairs, gray


@pytest.fixture
def flow() -> Tensor:
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)) * 20


def picture(path: Path, channels: int = 3, dtype: type = np.uint8, size: tuple[int, int] = (4, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(path.name.encode()))
    values = rng.integers(0, np.iinfo(dtype).max, (*size, channels), endpoint=True).astype(dtype)
    assert cv2.imwrite(str(path), values if channels > 1 else values[..., 0])
    return path


def test_flo_is_what_middlebury_says(tmp_path: Path) -> None:
    """A magic number, width, height, then u and v of each pixel, row by row, little-endian."""
    path = tmp_path / "a.flo"
    path.write_bytes(struct.pack("<fii8f", 202021.25, 2, 2, 1, 2, 3, 4, 5, 6, 1e10, 1e10))
    flow, valid = read_flow(path)
    assert flow.tolist() == [[[1, 3], [5, 0]], [[2, 4], [6, 0]]] and valid.tolist() == [[True, True], [True, False]]
    write_flow(tmp_path / "b.flo", flow, valid)
    assert (tmp_path / "b.flo").read_bytes() == path.read_bytes()


def test_flows_are_read_as_they_were_written(tmp_path: Path, flow: Tensor) -> None:
    valid = flow[0] > -10
    write_flow(tmp_path / "a.flo", flow, valid)
    write_flow(tmp_path / "a.png", flow, valid)
    for name, error in (("a.flo", 0.0), ("a.png", 1 / 128)):
        read, known = read_flow(tmp_path / name)
        assert torch.equal(known, valid)
        torch.testing.assert_close(read[:, valid], flow[:, valid], rtol=0, atol=error)


def test_kitti_is_what_its_kit_says(tmp_path: Path) -> None:
    """R is 64 u + 2¹⁵, G is 64 v + 2¹⁵, B is whether it is known."""
    image = np.zeros((1, 2, 3), np.uint16)
    image[0, 0] = (1, 32768 - 64, 32768 + 128)  # OpenCV writes B, G, R
    cv2.imwrite(str(tmp_path / "k.png"), image)
    flow, valid = read_flow(tmp_path / "k.png")
    assert flow[:, 0, 0].tolist() == [2, -1] and valid.tolist() == [[True, False]]


def test_damaged_flows_are_named(tmp_path: Path, flow: Tensor) -> None:
    (tmp_path / "short.flo").write_bytes(struct.pack("<fii", 202021.25, 9, 9))
    (tmp_path / "empty.flo").write_bytes(b"")
    picture(tmp_path / "picture.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, said in [("short.flo", "660 bytes, and has 12"), ("empty.flo", "no .flo file"), ("picture.png", "16 bits"),
                       ("text.png", "no flow of KITTI"), ("flow.txt", "no file")]:  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            read_flow(tmp_path / name)
    with pytest.raises(ValueError, match="below 512"):
        write_flow(tmp_path / "far.png", flow * 100)
    with pytest.raises(ValueError, match="flo file or a"):
        write_flow(tmp_path / "flow.jpg", flow)
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 5\)"):
        write_flow(tmp_path / "a.flo", flow[None])


@pytest.mark.parametrize("channels, dtype, expected", [(1, np.uint8, 1), (3, np.uint8, 3), (4, np.uint8, 3), (3, np.uint16, 3)])
def test_pictures_of_all_kinds(tmp_path: Path, channels: int, dtype: type, expected: int) -> None:
    path = picture(tmp_path / "p.png", channels, dtype)
    image = read_picture(path)
    written = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).reshape(4, 5, channels)
    assert image.shape == (expected, 4, 5)
    reversed_channels = written[..., : min(channels, 3)][..., ::-1].astype(np.float32) / np.iinfo(dtype).max
    np.testing.assert_allclose(image.movedim(0, -1).numpy(), reversed_channels, rtol=1e-6)
    torch.testing.assert_close(gray(torch.ones(3, 2, 2)), torch.ones(1, 2, 2))


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    (tmp_path / "b.png").write_bytes(b"")
    for name, said in (("a.png", "no picture"), ("b.png", "0 bytes"), ("c.png", "no file")):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            read_picture(tmp_path / name)


def test_the_folders_of_the_usual_data_sets(tmp_path: Path, flow: Tensor) -> None:
    chairs, sintel, kitti, middlebury = (tmp_path / name for name in ("chairs", "sintel", "kitti", "middlebury"))
    for folder in (chairs, sintel / "flow" / "alley", kitti / "flow_occ", middlebury / "other-gt-flow" / "Urban"):
        folder.mkdir(parents=True)
    for frame in (1, 2):
        picture(chairs / f"00001_img{frame}.ppm")
        for kind in ("clean", "final"):
            picture(sintel / kind / "alley" / f"frame_000{frame}.png")
        picture(kitti / "image_2" / f"000000_1{frame - 1}.png")
        picture(middlebury / "other-data" / "Urban" / f"frame1{frame - 1}.png")
    write_flow(chairs / "00001_flow.flo", flow)
    write_flow(sintel / "flow" / "alley" / "frame_0001.flo", flow)
    write_flow(kitti / "flow_occ" / "000000_10.png", flow)
    write_flow(middlebury / "other-gt-flow" / "Urban" / "flow10.flo", flow)
    names = {}
    for folder in (chairs, sintel, kitti, middlebury):
        pairs = [source.load() for source in find_pairs(folder)]
        names[folder.name] = [pair.name for pair in pairs]
        assert all(pair.first.shape == (3, 4, 5) and not torch.equal(pair.first, pair.second) for pair in pairs)
        torch.testing.assert_close(pairs[0].flow, flow, rtol=0, atol=1 / 128)
    assert names == {"chairs": ["00001"], "sintel": ["clean/alley/0001", "final/alley/0001"], "kitti": ["000000_10"],
                     "middlebury": ["Urban"]}  # fmt: skip


def test_archives_hold_one_pair_or_several(tmp_path: Path, flow: Tensor) -> None:
    frames, value = np.zeros((4, 5), np.uint8), flow.movedim(0, -1).numpy()
    np.savez(tmp_path / "one.npz", frame0=frames, frame1=frames + 255, flow=value, valid=np.eye(4, 5, dtype=bool))
    np.savez(tmp_path / "two.npz", **{name: np.stack([v, v]) for name, v in
                                      (("frame0", frames), ("frame1", frames), ("flow", value))})  # fmt: skip
    np.savez(tmp_path / "other.npz", x=frames)
    one, *two = (source.load() for source in find_pairs(tmp_path))
    assert [pair.name for pair in (one, *two)] == ["one", "two-0", "two-1"]
    assert one.second.unique().tolist() == [1.0] and int(one.valid.sum()) == 4 and bool(two[1].valid.all())
    torch.testing.assert_close(two[0].flow, flow)


def test_folders_without_pairs_and_pairs_that_do_not_fit(tmp_path: Path, flow: Tensor) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_pairs(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="FlyingChairs"):
        find_pairs(tmp_path)
    picture(tmp_path / "1_img1.ppm")
    picture(tmp_path / "1_img2.ppm", size=(4, 6))
    write_flow(tmp_path / "1_flow.flo", flow)
    with pytest.raises(ValueError, match=r"1_img2.ppm has shape \(3, 4, 6\)"):
        find_pairs(tmp_path)[0].load()


def test_training_and_held_out_pairs_are_made_of_different_pictures() -> None:
    pictures = [torch.full((1, 40, 40), k / 10) for k in range(10)]
    pairs = FlowPairs(pictures, (), size=(16, 24))
    levels = {float(pairs.pair(n).first.median()) for n in range(HELD_OUT, HELD_OUT + 6)}
    assert levels and pairs.cached(3) is pairs.cached(3)
    assert torch.equal(pairs.pair(5).flow, FlowPairs(pictures, (), size=(16, 24)).pair(5).flow)

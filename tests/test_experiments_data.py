"""Loading data sets: npz, dense and sparse ARFF, the embedded digits, and what is said when it fails."""

from pathlib import Path

import numpy as np
import pytest
import torch

from energynet.experiments.data import Data, Rows
from energynet.experiments.data.arff import read_arff
from energynet.experiments.data.multilabel import digits, load, load_npz, standardized
from energynet.experiments.splits import draw_splits

XML = """<?xml version="1.0"?>
<labels xmlns="http://mulan.sourceforge.net/labels"><label name="it's"><label name="b"/></label></labels>"""
HEADER = """% a comment
@relation 'x: -C 2'

@attribute size numeric
@ATTRIBUTE 'two words' {0,1}
@attribute color {red,'dark blue'}
"""
LABELS = "@attribute 'it\\'s' {0,1}\n@attribute b {0,1}\n@data\n"


def write_mulan(folder: Path, train: str, test: str) -> Path:
    folder.mkdir()
    (folder / f"{folder.name}-train.arff").write_text(HEADER + LABELS + train)
    (folder / f"{folder.name}-test.arff").write_text(HEADER + LABELS + test)
    (folder / f"{folder.name}.xml").write_text(XML)
    return folder


def write_npz(path: Path, **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    arrays = {"X_train": rng.random((6, 9)) > 0.5, "Y_train": rng.random((6, 3)) > 0.5,
              "X_test": rng.random((4, 9)) > 0.5, "Y_test": rng.random((4, 3)) > 0.5}  # fmt: skip
    packed = {name: np.packbits(value, axis=1) for name, value in arrays.items()}
    np.savez(path, **{**packed, "n_features": np.array(9), "n_labels": np.array(3), **changes})
    return path


def test_dense_and_sparse_arff_give_the_same_rows(tmp_path: Path) -> None:
    dense = write_mulan(tmp_path / "dense", "1.5,0,red,1,0\n0,1,'dark blue',0,1\n3,0,red,0,0\n", "2,1,red,1,1\n")
    sparse = write_mulan(tmp_path / "sparse", "{0 1.5, 3 1}\n{1 1,2 'dark blue',4 1}\n{ 0 3 }\n", "{0 2,1 1,3 1,4 1}\n")
    one, other = load(dense), load(sparse)
    assert one.target_names == ("it's", "b")
    assert torch.equal(one.train.targets, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(one.train.inputs[:, 1:], torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    for name in ("inputs", "targets"):
        assert torch.equal(getattr(one.train, name), getattr(other.train, name))
        assert torch.equal(getattr(one.test, name), getattr(other.test, name))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("1,0,red,1", "Bad @DATA instance"),
        ("1,0,green,1,0", "green not found"),
        ("x,0,red,1,0", "Invalid numerical value"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: str, said: str) -> None:
    folder = write_mulan(tmp_path / "bad", f"0,0,red,0,0\n{row}\n", "0,0,red,0,0\n")
    with pytest.raises(ValueError, match=r"bad-train\.arff, line 11: cannot read .*") as caught:
        load(folder)
    assert said in str(caught.value)


def test_text_columns_and_empty_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arff"
    path.write_text("@relation x\n@attribute name string\n@data\nx\n")
    with pytest.raises(ValueError, match="column 'name' is of type string"):
        read_arff(path)
    path.write_text("@relation x\n@attribute size numeric\n@data\n?\n")
    with pytest.raises(ValueError, match=r"a value of column 'size' is missing"):
        read_arff(path)
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match=r"[iI]s it an ARFF file"):
        read_arff(path)


def test_packed_npz_is_unpacked(tmp_path: Path) -> None:
    data = load(write_npz(tmp_path / "some.npz").parent)
    assert (data.name, data.train.inputs.shape, data.test.targets.shape) == ("some", (6, 9), (4, 3))
    assert data.target_names == ("label 0", "label 1", "label 2")


def test_npz_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"X_test has shape \(4, 5\); expected \(rows, 9\)"):
        load_npz(write_npz(tmp_path / "a.npz", X_test=np.zeros((4, 5))))
    with pytest.raises(ValueError, match="neither 0 nor 1, 2 first"):
        load_npz(write_npz(tmp_path / "b.npz", Y_test=np.full((4, 3), 2.0)))
    np.savez(tmp_path / "c.npz", X_train=np.zeros(3))
    with pytest.raises(ValueError, match="lacks"):
        load_npz(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="pickle"):
        load_npz(write_npz(tmp_path / "d.npz", X_test=np.array([{"a": 1}], dtype=object)))


def test_folder_errors_say_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load(tmp_path / "absent")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"holds notes\.txt"):
        load(tmp_path)
    write_npz(tmp_path / "a.npz")
    write_npz(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"several data sets \(a\.npz, b\.npz\)"):
        load(tmp_path)


def test_numeric_features_are_standardized_by_training_rows() -> None:
    features = torch.tensor([[0.0, 1.0, 5.0], [1.0, 3.0, 5.0], [1.0, 5.0, 5.0]])
    labels = torch.zeros(3, 1)
    data = standardized(Data("x", Rows(features, labels), Rows(features + 1, labels), ("a",)))
    train, test = data.train.inputs, data.test.inputs
    assert torch.equal(train[:, 0], features[:, 0])
    torch.testing.assert_close(train[:, 1], torch.tensor([-1.0, 0.0, 1.0]))
    assert torch.equal(train[:, 2], torch.zeros(3))
    torch.testing.assert_close(test[:, 1], torch.tensor([-0.5, 0.5, 1.5]))


def test_digits_and_their_segments() -> None:
    data = digits()
    assert data.train.inputs.shape == (1198, 64) and data.test.inputs.shape == (599, 64)
    assert len(data.train.targets.unique(dim=0)) == 10
    assert data.fingerprint == digits().fingerprint


def test_split_depends_on_the_seed_alone_and_loses_no_row() -> None:
    (first,), (again,), (other,) = (draw_splits(100, seed, folds=1) for seed in (3, 3, 4))
    assert torch.equal(first.held_out, again.held_out) and not torch.equal(first.held_out, other.held_out)
    assert len(first.held_out) == 10
    assert torch.equal(torch.cat([first.fit, first.held_out]).sort().values, torch.arange(100))
    with pytest.raises(ValueError, match="would be empty"):
        draw_splits(5, 0, folds=1)


def test_folds_hold_out_every_row_once_and_small_sets_get_them() -> None:
    folds = draw_splits(103, 0)
    assert len(folds) == 5 and len(draw_splits(1000, 0)) == 1
    assert torch.equal(torch.cat([fold.held_out for fold in folds]).sort().values, torch.arange(103))
    for fold in folds:
        assert torch.equal(torch.cat([fold.fit, fold.held_out]).sort().values, torch.arange(103))
    with pytest.raises(ValueError, match="would be empty"):
        draw_splits(3, 0, folds=4)


def test_a_share_of_the_rows_is_drawn_with_the_seed() -> None:
    (part,), (whole,) = draw_splits(4000, 0, share=0.5), draw_splits(4000, 0)
    assert len(part.fit) == 1800 and len(part.held_out) == 200 and len(whole.fit) == 3600


def test_data_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in rows"):
        Rows(torch.zeros(3, 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="do not fit together"):
        Data("x", Rows(torch.zeros(3, 2), torch.zeros(3, 1)), Rows(torch.zeros(3, 2), torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="2 names do not fit together"):
        Data("x", Rows(torch.zeros(3, 2), torch.zeros(3, 1)), Rows(torch.zeros(3, 2), torch.zeros(3, 1)), ("a", "b"))

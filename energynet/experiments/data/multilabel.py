"""Multi-label data sets: a folder that the user names, or scikit-learn's digits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import Data, Rows
from .arff import read_mulan

# The segments a (top), b, c (right), d (bottom), e, f (left), g (middle) that a seven-segment display lights for 0..9.
_SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


def digits() -> Data:
    """The embedded default: scikit-learn's 8×8 digits, labeled with the display segments that show the digit.

    Returns:
        1,198 training and 599 test rows, 64 features, 7 labels; the split is fixed.

    Source: UCI Optical Recognition of Handwritten Digits, as shipped by scikit-learn.

    >>> digits().train.targets.shape
    torch.Size([1198, 7])
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    features = torch.from_numpy(bunch.data.astype(np.float32))
    table = torch.tensor([[float(segment in lit) for segment in "abcdefg"] for lit in _SEGMENTS])
    labels = table[torch.from_numpy(bunch.target).long()]
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]
    rows = Rows(features, labels)
    return standardized(Data("digits", rows[train], rows[test], tuple("abcdefg")))


def load(folder: Path) -> Data:
    """Load the data set that a folder holds: NAME.npz, or NAME-train.arff, NAME-test.arff and NAME.xml.

    Args:
        folder: the folder; NAME is the folder's name, or that of its only data set.

    Returns:
        The data set, columns that are not 0/1 standardized by the training rows.

    Raises:
        FileNotFoundError: when the folder holds no data set; the message names what was looked for and what is there.
        ValueError: when it holds several, or a file cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder} is not a folder; give the folder that holds NAME.npz or NAME-train.arff.")
    archives = _preferred(sorted(folder.glob("*.npz")), folder, "")
    if archives is not None:
        return standardized(load_npz(archives))
    train = _preferred(sorted(folder.glob("*-train.arff")), folder, "-train")
    if train is None:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder} holds neither NAME.npz nor NAME-train.arff, NAME-test.arff and NAME.xml; it holds {names}."
        )
    return standardized(load_mulan(train))


def load_npz(path: Path) -> Data:
    """Load a NumPy archive without pickle.

    Args:
        path: an archive with the keys X_train, Y_train, X_test, Y_test, n_features, n_labels and, if known,
            label_names; binary matrices may be bit-packed by ``np.packbits(axis=1)``.

    Returns:
        The data set, features as stored.

    Raises:
        ValueError: when a key is missing or a matrix has another width than n_features or n_labels says.
    """
    with np.load(path, allow_pickle=False) as archive:
        missing = {"X_train", "Y_train", "X_test", "Y_test", "n_features", "n_labels"} - set(archive.files)
        if missing:
            raise ValueError(f"{path} lacks {sorted(missing)}; it holds {archive.files}. Write those arrays with np.savez.")
        widths = {"X": int(archive["n_features"]), "Y": int(archive["n_labels"])}
        train, train_labels, test, test_labels = (
            _matrix(archive[key], widths[key[0]], f"{path}: {key}") for key in ("X_train", "Y_train", "X_test", "Y_test")
        )
        names = [str(name) for name in archive["label_names"]] if "label_names" in archive.files else None
    names = names or [f"label {k}" for k in range(widths["Y"])]
    _check_binary(train_labels, test_labels, path)
    return Data(path.stem, Rows(train, train_labels), Rows(test, test_labels), tuple(names))


def load_mulan(train: Path) -> Data:
    """Load a Mulan data set: NAME-train.arff with NAME-test.arff and NAME.xml beside it.

    Args:
        train: path of NAME-train.arff.

    Returns:
        The data set, features as stored; the XML file says which attributes are labels.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file cannot be read; the message names file and line.
    """
    stem = train.name.removesuffix("-train.arff")
    test, xml = train.with_name(f"{stem}-test.arff"), train.with_name(f"{stem}.xml")
    for path in (train, test, xml):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; a Mulan data set is NAME-train.arff, NAME-test.arff and NAME.xml.")
    fitted, held = read_mulan(train, xml), read_mulan(test, xml)
    _check_binary(fitted.labels, held.labels, train)
    return Data(stem, Rows(fitted.features, fitted.labels), Rows(held.features, held.labels), fitted.label_names)


def standardized(data: Data) -> Data:
    """Scale each feature that is not 0/1 to zero mean and unit variance on the training rows.

    Args:
        data: a data set.

    Returns:
        The same set, with its 0/1 features, labels and order unchanged.
    """
    features = data.train.inputs
    binary = ((features == 0) | (features == 1)).all(0)
    mean = torch.where(binary, 0.0, features.mean(0))
    deviation = features.std(0)
    scale = torch.where(binary | (deviation == 0), 1.0, deviation)
    train, test = (Rows((rows.inputs - mean) / scale, rows.targets) for rows in (data.train, data.test))
    return replace(data, train=train, test=test)


def _preferred(paths: Sequence[Path], folder: Path, suffix: str) -> Path | None:
    """The file named after its folder, or the only one."""
    named = [path for path in paths if path.stem == folder.resolve().name + suffix]
    if len(paths) > 1 and not named:
        raise ValueError(f"{folder} holds several data sets ({', '.join(p.name for p in paths)}); give each its own folder.")
    found = named or list(paths)
    return found[0] if found else None


def _matrix(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]", width: int, where: str) -> Tensor:
    if array.ndim == 2 and array.dtype == np.uint8 and array.shape[1] == -(-width // 8) != width:
        array = np.unpackbits(array.astype(np.uint8), axis=1, count=width)
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"{where} has shape {array.shape}; expected (rows, {width}), or (rows, {-(-width // 8)}) bit-packed.")
    return torch.from_numpy(array.astype(np.float32))


def _check_binary(labels: Tensor, test_labels: Tensor, path: Path) -> None:
    values = torch.cat([labels.flatten(), test_labels.flatten()])
    values = values[(values != 0) & (values != 1)]
    if len(values):
        raise ValueError(f"{path}: {len(values)} labels are neither 0 nor 1, {values[0]:g} first; write 0 or 1.")

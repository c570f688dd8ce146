"""Mulan's files: ARFF, dense and sparse, and the XML that names the labels."""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import arff
import torch
from torch import Tensor


@dataclass(frozen=True)
class MulanRows:
    """The rows of one ARFF file, its columns divided into features and labels."""

    features: Tensor  # (N, D)
    labels: Tensor  # (N, L)
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Attribute:
    """One column of an ARFF file; `values` are the names of a nominal column, empty for a numeric one."""

    name: str
    values: tuple[str, ...]

    def number(self, text: str) -> float:
        """The value as a number: itself if it reads as one, else its position among the nominal values."""
        try:
            return float(text)
        except ValueError:
            return float(self.values.index(text))


def read_mulan(path: Path, xml: Path) -> MulanRows:
    """Read one ARFF file and divide its columns into features and labels.

    Args:
        path: the ARFF file, dense or sparse.
        xml: Mulan's XML file, which names the labels.

    Returns:
        Features and labels in the order of the ARFF file's columns.

    Raises:
        ValueError: when a line cannot be read, or a label of the XML is not a column; names file and line.

    Source: the ARFF page of the Weka wiki and Mulan's page on its data format.
    """
    attributes, rows = read_arff(path)
    wanted = read_label_names(xml)
    names = [attribute.name for attribute in attributes]
    absent = sorted(wanted - set(names))
    if absent:
        raise ValueError(f"{xml} names {len(absent)} labels that {path} has no column for, {absent[0]!r} first.")
    label_columns = [k for k, name in enumerate(names) if name in wanted]
    feature_columns = [k for k, name in enumerate(names) if name not in wanted]
    return MulanRows(rows[:, feature_columns], rows[:, label_columns], tuple(names[k] for k in label_columns))


def read_label_names(path: Path) -> set[str]:
    """The labels that a Mulan XML file names, at every level of its hierarchy.

    Args:
        path: the XML file.

    Returns:
        The names.

    Raises:
        ValueError: when the file is not XML or names no label.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not well-formed XML: {error}.") from error
    names = {element.get("name", "") for element in root.iter() if element.tag.rsplit("}", 1)[-1] == "label"}
    if not names:
        raise ValueError(f'{path} names no label; expected <labels><label name="..."/></labels>.')
    return names


def read_arff(path: Path) -> tuple[list[Attribute], Tensor]:
    """Read an ARFF file of numeric and nominal columns with liac-arff.

    Args:
        path: the file; its data lines may be dense (``1,0,2``) or sparse (``{0 1, 2 2}``).

    Returns:
        The attributes (one a column) and the values, float32 of shape (rows, columns).

    Raises:
        ValueError: when a line cannot be read; the message names file and line and shows it.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        content = arff.loads("\n".join(lines))
    except arff.ArffException as error:
        number = error.line
        shown = lines[number - 1].strip() if 0 < number <= len(lines) else ""
        told = str(error).split(", at line")[0].split(" in line")[0]
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ValueError(f"{path}, line {number}: cannot read {shown!r} ({told}). Is it an ARFF file?") from error
    attributes = [_attribute(path, name, kind) for name, kind in content["attributes"]]
    if not attributes or not content["data"]:
        raise ValueError(f"{path} has {len(attributes)} attributes and {len(content['data'])} data rows; is it an ARFF file?")
    return attributes, torch.tensor([_numbers(path, attributes, row) for row in content["data"]])


def _attribute(path: Path, name: str, kind: str | list[str]) -> Attribute:
    if isinstance(kind, list):
        return Attribute(_plain(name), tuple(kind))
    if kind not in ("NUMERIC", "REAL", "INTEGER"):
        raise ValueError(f"{path}: column {name!r} is of type {kind.lower()}; numeric and nominal columns can be read.")
    return Attribute(_plain(name), ())


def _numbers(path: Path, attributes: list[Attribute], row: list[str | float | None]) -> list[float]:
    if None in row:
        raise ValueError(f"{path}: a value of column {attributes[row.index(None)].name!r} is missing ('?'); fill it in first.")
    return [value if isinstance(value, float) else a.number(str(value)) for a, value in zip(attributes, row)]


def _plain(name: str) -> str:
    return name.replace("\\", "")

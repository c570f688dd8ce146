"""Mulan's files: ARFF, dense and sparse, and the XML that names the labels."""

import csv
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
            return float(self.values.index(_unquoted(text)))


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
    """Read an ARFF file of numeric and nominal columns.

    Args:
        path: the file; its data lines may be dense (``1,0,2``) or sparse (``{0 1, 2 2}``).

    Returns:
        The attributes (one a column) and the values, float32 of shape (rows, columns).

    Raises:
        ValueError: when a line cannot be read; the message names file and line and shows it.
    """
    attributes: list[Attribute] = []
    rows: list[Tensor] = []
    in_data = False
    for number, line in _lines(path):
        try:
            if in_data:
                rows.append(_row(line, attributes))
            elif line.lower().startswith("@attribute"):
                attributes.append(_attribute(line))
            in_data = in_data or line.lower().startswith("@data")
        except (ValueError, IndexError) as error:
            shown = line if len(line) <= 60 else line[:57] + "..."
            raise ValueError(f"{path}, line {number}: cannot read {shown!r} ({error}).") from error
    if not attributes or not rows:
        raise ValueError(f"{path} has {len(attributes)} attributes and {len(rows)} data rows; is it an ARFF file?")
    return attributes, torch.stack(rows)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            stripped = line.strip()
            if stripped and not stripped.startswith("%"):
                yield number, stripped


def _attribute(line: str) -> Attribute:
    rest = line[len("@attribute") :].strip()
    name, kind = _name_and_kind(rest)
    if kind.startswith("{"):
        return Attribute(name, tuple(_fields(kind.strip("{} \t"))))
    if kind.split()[0].lower() not in ("numeric", "real", "integer"):
        raise ValueError(f"column {name!r} is of type {kind!r}; numeric and nominal columns can be read")
    return Attribute(name, ())


def _name_and_kind(rest: str) -> tuple[str, str]:
    if rest[0] not in "'\"":
        name, kind = rest.split(None, 1)
        return name, kind
    end = 1
    while rest[end] != rest[0] or rest[end - 1] == "\\":
        end += 1
    return _unquoted(rest[: end + 1]), rest[end + 1 :].strip()


def _row(line: str, attributes: list[Attribute]) -> Tensor:
    values = torch.zeros(len(attributes))
    if line.startswith("{"):
        # What a sparse row leaves out is 0, also for a nominal column, where it is the first value.
        for field in filter(None, _fields(line.strip("{} \t"))):
            column, text = field.split(None, 1)
            if not 0 <= int(column) < len(attributes):
                raise ValueError(f"column {column} of {len(attributes)}")
            values[int(column)] = attributes[int(column)].number(text)
        return values
    fields = _fields(line)
    if len(fields) != len(attributes):
        raise ValueError(f"{len(fields)} values for {len(attributes)} columns")
    return torch.tensor([attribute.number(text) for attribute, text in zip(attributes, fields, strict=True)])


def _fields(text: str) -> list[str]:
    quote = "'" if "'" in text else '"'
    fields = next(csv.reader([text], quotechar=quote, escapechar="\\", skipinitialspace=True), [])
    return [field.strip() for field in fields]


def _unquoted(text: str) -> str:
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return text.replace("\\", "")

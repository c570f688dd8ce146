"""Data sets as the experiments see them, and one reader a kind."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of a data set, or a batch of them.

    >>> Rows(torch.zeros(4, 2), torch.ones(4, 3))[torch.tensor([0, 2])].targets.shape
    torch.Size([2, 3])
    """

    inputs: Tensor  # (N, ...)
    targets: Tensor  # (N, ...)

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"inputs {tuple(self.inputs.shape)} and targets {tuple(self.targets.shape)} differ in rows.")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, numbers: Tensor) -> "Rows":
        return Rows(self.inputs[numbers], self.targets[numbers])

    def to(self, device: torch.device) -> "Rows":
        """The rows on another device."""
        return Rows(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Data:
    """Training and test rows of one data set."""

    name: str
    train: Rows
    test: Rows
    target_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.train.inputs, self.train.targets, self.test.inputs, self.test.targets)]
        fit = shapes[0][1:2] == shapes[2][1:2] and shapes[1][1:2] == shapes[3][1:2]  # pictures may differ in size
        if not fit or (self.target_names and len(self.target_names) != shapes[1][1]):
            raise ValueError(
                f"data set {self.name!r}: train {shapes[0]} and {shapes[1]}, test {shapes[2]} and {shapes[3]}, "
                f"{len(self.target_names)} names do not fit together. Likely the files belong to different sets."
            )

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of the SHA-256 of all rows, so that a resumed run sees that the data are the same."""
        digest = hashlib.sha256()
        for tensor in (self.train.inputs, self.train.targets, self.test.inputs, self.test.targets):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> "Data":
        """The data set on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

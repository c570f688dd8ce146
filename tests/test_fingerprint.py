"""What a program is told apart by: all that its code may read."""

import array
import collections
import contextvars
import copy
import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from energynet.compiled.fingerprint import Fingerprint

SCALE = 1.0


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.factor = 3.0

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return SCALE * self.weight * (x - self.factor * z).square().sum(-1)


def test_a_fingerprint_sees_what_the_code_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = Scaled()
    before = Fingerprint(energy, [energy.weight]).key
    assert Fingerprint(copy.deepcopy(energy)).key != before  # its weight is no input
    assert Fingerprint(energy, [energy.weight]).key == before
    energy.factor = 4.0
    assert Fingerprint(energy, [energy.weight]).key != before
    energy.factor = 3.0
    assert Fingerprint(energy.eval(), [energy.weight]).key != before
    assert Fingerprint(energy.train(), [energy.weight]).key == before
    monkeypatch.setattr("test_fingerprint.SCALE", 2.0)
    assert Fingerprint(energy, [energy.weight]).key != before


class Settings:
    class inner:
        scale = 1.0

    weights: ClassVar[list[float]] = [1.0, 2.0]
    scale = torch.tensor(1.0)

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * self.weights[0] * x


class Other(Settings):
    pass


@dataclasses.dataclass(slots=True)
class Slotted:
    scale: float = 1.0


def settings(x: Tensor) -> Tensor:
    return Settings.inner.scale * x


def imports(x: Tensor) -> Tensor:
    from outer.inner import scale  # type: ignore[import-not-found]

    return scale * outer.inner.scale * x  # type: ignore[name-defined]  # noqa: F821


def asks(x: Tensor) -> Tensor:
    import outer.inner  # type: ignore[import-not-found]

    return getattr(outer.inner, "scale") * x  # noqa: B009


def choosy(x: Tensor, z: Tensor) -> Tensor:
    return (x - z).square().sum(-1) if x.sum() < 1e9 else x.sum(-1)


VARIABLE = contextvars.ContextVar("VARIABLE", default="")


FACTOR: Any = 1.0


CHANGES: dict[str, Callable[[], tuple[Any, Callable[[], object]]]] = {
    "a list of the class": lambda: (Settings(), lambda: Settings.weights.__setitem__(0, 5.0)),
    "another list of the class": lambda: (Settings(), lambda: setattr(Settings, "weights", [1.0, 3.0])),
    "another tensor of the class": lambda: (Settings(), lambda: setattr(Settings, "scale", torch.tensor(2.0))),
    "a method of a subclass": lambda: (Other(), lambda: setattr(Other, "__call__", choosy)),
    "another class": lambda: (made := Settings(), lambda: setattr(made, "__class__", Other)),
    "an attribute of a class in a class": lambda: (settings, lambda: setattr(Settings.inner, "scale", 3.0)),
    "an attribute of a module in a module": lambda: (imports, lambda: setattr(sys.modules["outer.inner"], "scale", 3.0)),
    "a slot": lambda: (made := Slotted(), lambda: setattr(made, "scale", 3.0)),
    "an element of a set": lambda: (made := {1, 2}, lambda: made.add(3)),
    "a number in an array": lambda: (made := array.array("d", [1.0, 2.0]), lambda: made.__setitem__(0, 3.0)),
    "defaults": lambda: (made := types.FunctionType(choosy.__code__, {}), lambda: setattr(made, "__defaults__", (1.0,))),
    "code": lambda: (made := types.FunctionType(choosy.__code__, {}), lambda: setattr(made, "__code__", settings.__code__)),
    "the precision of a tensor": lambda: (made := torch.ones(2), lambda: setattr(made, "data", made.double())),
    "the order of modules": lambda: (
        made := nn.ModuleDict({"a": nn.Tanh(), "b": nn.Sigmoid()}), lambda: made.update({"a": made.pop("a")})
    ),
    "the order of a dictionary": lambda: (made := {"a": 1, "b": 2}, lambda: made.update({"a": made.pop("a")})),
    "an element of a queue": lambda: (made := collections.deque([1.0], 1), lambda: made.append(2.0)),
    "a byte": lambda: (made := bytearray(2), lambda: made.__setitem__(0, 3)),
    "a context variable": lambda: (VARIABLE, lambda: VARIABLE.set(len(VARIABLE.get()) * "x" + "x")),
    "what getattr asks a module for": lambda: (asks, lambda: setattr(sys.modules["outer.inner"], "scale", 3.0)),
    "what globals are asked for": lambda: (lambda x: globals()["FACTOR"] * x, lambda: globals().update(FACTOR=[])),
    "the layout of a tensor": lambda: (made := torch.ones(2, 3), lambda: made.t_()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_sees_a_change_of(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cls, name in ((Settings, "weights"), (Settings, "scale"), (Settings.inner, "scale")):
        value = getattr(cls, name)
        monkeypatch.setattr(cls, name, list(value) if isinstance(value, list) else value)
    outer, inner = types.ModuleType("outer"), types.ModuleType("outer.inner")
    outer.inner, inner.scale = inner, 1.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outer", outer)
    monkeypatch.setitem(sys.modules, "outer.inner", inner)
    monkeypatch.setitem(globals(), "outer", outer)
    value, make_it = CHANGES[change]()
    seen = Fingerprint(value)
    assert seen.unchanged() and Fingerprint(value).key == seen.key
    make_it()
    assert not seen.unchanged() and Fingerprint(value).key != seen.key
    if "__call__" in vars(Other):
        del Other.__call__


def test_what_cannot_be_looked_into_is_never_taken_for_another() -> None:
    """Though the memory of one that is no more may be used again."""
    keys = [Fingerprint(iter([])).key for _ in range(100)]
    assert len(set(keys)) == 100


def test_functions_made_anew_are_the_same_and_their_closures_count() -> None:
    def make(a: float, t: Tensor) -> object:
        return lambda x: a * x + t

    t = torch.ones(2)
    assert Fingerprint(make(1.0, t)).key == Fingerprint(make(1.0, t)).key
    assert Fingerprint(make(1.0, t)).key != Fingerprint(make(2.0, t)).key
    assert Fingerprint(make(1.0, t)).key != Fingerprint(make(1.0, t.clone())).key
    assert Fingerprint(make(1.0, t)).met[0] is t

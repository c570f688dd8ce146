"""What a program is told apart by: all that its code may read."""

import array
import collections
import contextvars
import copy
import dataclasses
import re
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


def test_opaque_objects_have_unique_fingerprints() -> None:
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


COUNTS = {"n": 0, "scale": 1.0}


class Counting:
    """As in a training loop: what the energy never reads changes all the time."""

    def __init__(self) -> None:
        self.calls, self.rate, self.factor = 0, 1.0, 2.0

    def energy(self, x: Tensor, z: Tensor) -> Tensor:
        return self.scale() * (x - z).square().sum(-1)

    def scale(self) -> float:
        return self.factor * self.doubled

    @property
    def doubled(self) -> float:
        return 2 * self.rate

    def log(self) -> None:
        COUNTS["n"] += self.calls

    def __repr__(self) -> str:
        return f"Counting({self.calls})"


class Asking(Counting):
    def scale(self) -> float:
        name = "calls"
        return float(getattr(self, name))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropped, self.history = nn.Linear(2, 2), nn.Dropout(0.5), []  # type: ignore[var-annotated]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return (x - self.dropped(self.layer(z))).square().sum(-1)

    def fit(self) -> None:
        self.history.append(COUNTS["n"])


def reads_scale(x: Tensor) -> Tensor:
    return COUNTS["scale"] * x


def makes(x: Tensor) -> Tensor:
    return Counting().factor * x


READ: dict[str, Callable[[], tuple[Any, Callable[[], object], str]]] = {
    "an attribute": lambda: ((c := Counting()).energy, lambda: setattr(c, "factor", 3.0), r"Counting\.factor: 2\.0 → 3\.0"),
    "an attribute of a property": lambda: ((c := Counting()).energy, lambda: setattr(c, "rate", 3.0), "Counting.rate"),
    "what getattr may ask for": lambda: ((c := Asking()).energy, lambda: setattr(c, "calls", 3), r"Asking\.calls: 0 → 3"),
    "what a method of a library reads": lambda: (m := Reader(), lambda: setattr(m.dropped, "p", 0.1), r"Dropout\.p: 0\.5 → 0\.1"),
    "an entry of a global": lambda: (reads_scale, lambda: COUNTS.update(scale=COUNTS["scale"] + 1),
                                     r"reads_scale reads COUNTS\['scale'\]: 1\.0 → 2\.0"),
    "what a class is made with": lambda: (makes, lambda: setattr(Counting, "__init__", lambda self: setattr(self, "factor", 5.0)),
                                          r"Counting\.__init__"),
}  # fmt: skip
UNREAD: dict[str, Callable[[], tuple[Any, Callable[[], object]]]] = {
    "an attribute of another method": lambda: ((c := Counting()).energy, lambda: setattr(c, "calls", 3)),
    "a global of another method": lambda: (Counting().energy, lambda: COUNTS.update(n=COUNTS["n"] + 1)),
    "another method": lambda: (Counting().energy, lambda: setattr(Counting, "log", lambda self: None)),
    "a list of a module": lambda: (m := Reader(), lambda: m.history.append(1)),
    "a new attribute": lambda: (m := Reader(), lambda: setattr(m, "loss", 1.0)),
}


@pytest.mark.parametrize("change", READ)
def test_what_an_energy_reads_is_seen_and_named(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COUNTS, "scale", 1.0)
    monkeypatch.setattr(Counting, "__init__", Counting.__init__)
    energy, make_it, said = READ[change]()
    seen = Fingerprint(energy, whole=False)
    assert seen.unchanged() and not seen.changes() and Fingerprint(energy, whole=False).key == seen.key
    make_it()
    assert not seen.unchanged() and Fingerprint(energy, whole=False).key != seen.key
    assert any(re.search(said, text) for text in seen.changes()), seen.changes()


@pytest.mark.parametrize("change", UNREAD)
def test_what_it_does_not_read_changes_nothing(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COUNTS, "n", 0)
    monkeypatch.setattr(Counting, "log", Counting.log)
    energy, make_it = UNREAD[change]()
    seen = Fingerprint(energy, whole=False)
    make_it()
    assert Fingerprint(energy, whole=False).key == seen.key

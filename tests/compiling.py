"""Marks of tests that compile, and programs that are run as they are recorded.

A program takes 20 to 60 seconds, most of them in Inductor and in the C++ compiler. So a test of what is recorded, and when, runs
the record as it is, and the same test of machine code is among the thorough ones, which run before a release.
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
THOROUGH = [pytest.mark.thorough, COMPILER]
BOTH = [
    pytest.param(True, id="interpreted", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]),
    pytest.param(False, id="compiled", marks=THOROUGH),
]


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """A test of machine code."""
    return pytest.mark.slow(COMPILER(test))


def compiles_thoroughly(test: Callable[..., None]) -> Callable[..., None]:
    """A test of machine code whose claims others make with smaller programs, or of the record."""
    return pytest.mark.thorough(COMPILER(test))


def records(test: Callable[..., None]) -> Callable[..., None]:
    """A test of what is recorded, and when."""
    return pytest.mark.parametrize("interpreted", BOTH, indirect=True)(pytest.mark.usefixtures("interpreted")(test))


class Interpreted(fx.Interpreter):
    """Runs a recorded program with its loops."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if str(target) != "while_loop":
            return super().call_function(target, args, kwargs)
        test, body, carry, fixed = (*map(Interpreted, args[:2]), list(args[2]), args[3])
        while test.run(*carry, *fixed):
            carry = list(body.run(*carry, *fixed))
        return carry


def interpret(graph: fx.GraphModule, inputs: Any, options: Any, parts: int) -> Any:
    """In place of `energynet.compiled.inductor.compile_graph`."""

    def run(tensors: Any) -> Any:
        assert not any(isinstance(t, FakeTensor) for t in tensors), "machine code reads memory, of which these have none"
        return Interpreted(graph).run(*tensors)

    return run

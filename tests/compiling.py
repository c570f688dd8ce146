"""Marks of tests that compile."""

import shutil
from collections.abc import Callable

import pytest

COMPILES = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine"),
]


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    for mark in COMPILES:
        test = mark(test)
    return test

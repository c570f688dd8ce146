"""Replaces sums over the elements of a vector register in Inductor's code.

ATen's ``vec_reduce_all`` uses shuffles for floats. For doubles it goes through memory element by element and waits for each
store, which took most of the time of an iteration for small problems in float64.
"""

from pathlib import Path

_SLOW = "at::vec::vec_reduce_all<double, "
_FAST = "energynet_fold<double, "
_PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>"


def folded(source: str) -> str:
    """The same program with sums of doubles in registers.

    Example:
        >>> folded("int main() { return 0; }")
        'int main() { return 0; }'
    """
    return calling(source, _SLOW, _FAST, _PREFIX, "fold.h")


def calling(source: str, slow: str, fast: str, prefix: str, header: str) -> str:
    """The same program with calls of one function replaced by another, which a header of this folder defines."""
    if slow not in source or prefix not in source:
        return source
    definition = Path(__file__).with_name(header).read_text()
    return source.replace(slow, fast).replace(prefix, f"{prefix}\n{definition}", 1)

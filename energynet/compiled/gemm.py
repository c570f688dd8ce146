"""Computes large float32 products in Inductor's code by oneDNN, on processors where that is faster than MKL.

MKL does not use the widest vectors on processors of other vendors; there oneDNN takes half to two thirds of the time. Its calls
have more overhead, so small products still use MKL, and so do products with a part of a larger matrix, for which oneDNN is slow.
"""

import functools
from pathlib import Path

import torch

from energynet.compiled.fold import calling

_SLOW = "aoti_torch_cpu_mm_out("
_FAST = "energynet_mm_out("
_PREFIX = "#include <torch/csrc/inductor/cpp_wrapper/cpu.h>"


def by_onednn(source: str) -> str:
    """The same program with large products by oneDNN.

    Example:
        >>> by_onednn("int main() { return 0; }")
        'int main() { return 0; }'
    """
    return calling(source, _SLOW, _FAST, _PREFIX, "gemm.h")


@functools.cache
def mkl_is_slow() -> bool:
    """Whether MKL is slow on this processor and oneDNN is available."""
    makers = Path("/proc/cpuinfo")
    other = makers.exists() and "GenuineIntel" not in makers.read_text()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return other and wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()

"""Large products in float32, in what Inductor writes: by oneDNN, on processors where that is faster than MKL.

MKL leaves the widest vectors of other makers' processors alone; there oneDNN takes half to two thirds of the time. Its call is
dearer, so small products stay where they are, and so do those with a part of a larger matrix, for which it has no fast code.
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
    """Whether this processor is one that MKL is slow on, and oneDNN is at hand."""
    makers = Path("/proc/cpuinfo")
    other = makers.exists() and "GenuineIntel" not in makers.read_text()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return other and wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()

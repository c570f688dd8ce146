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
HEAVY = 2_000_000  # multiplications of a product, from which it pays

_PRODUCT = f"""
extern "C" AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, const char*, const double**, int64_t, const char**, AtenTensorHandle*);

static inline AOTITorchError energynet_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {{
    int64_t *left, *right, *steps;
    int32_t type;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(a, &left));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(b, &right));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(b, &type));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(b, &steps));
    const bool rows = steps[1] == 1 && steps[0] == right[1], columns = steps[0] == 1 && steps[1] == right[0];
    const bool large = left[0] * right[0] * right[1] >= {HEAVY};
    if (type != aoti_torch_dtype_float32() || !large || !(rows || columns)) return aoti_torch_cpu_mm_out(out, a, b);
    const int64_t sizes[] = {{right[1], right[0]}}, strides[] = {{steps[1], steps[0]}};
    RAIIAtenTensorHandle turned(reinterpret_tensor_wrapper(b, 2, sizes, strides, 0));
    AtenTensorHandle found;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(a, turned, nullptr, "none", nullptr, 0, nullptr, &found));
    RAIIAtenTensorHandle product(found);
    return aoti_torch_tensor_copy_(product, out);
}}
"""


def by_onednn(source: str) -> str:
    """The same program with large products by oneDNN.

    Example:
        >>> by_onednn("int main() { return 0; }")
        'int main() { return 0; }'
    """
    return calling(source, _SLOW, _FAST, _PREFIX, _PRODUCT)


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this processor is one that MKL is slow on, and oneDNN is at hand."""
    makers = Path("/proc/cpuinfo")
    other = makers.exists() and "GenuineIntel" not in makers.read_text()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return other and wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()

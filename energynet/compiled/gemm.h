// Large products in float32 by oneDNN: see gemm.py.
#include <torch/csrc/inductor/aoti_torch/c/shim_cpu.h>

static constexpr int64_t ENERGYNET_HEAVY = 2000000;  // multiplications of a product, from which oneDNN pays

static inline AOTITorchError energynet_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
    int64_t *left, *right, *steps;
    int32_t type;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(a, &left));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(b, &right));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(b, &type));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(b, &steps));
    const bool rows = steps[1] == 1 && steps[0] == right[1], columns = steps[0] == 1 && steps[1] == right[0];
    const bool large = left[0] * right[0] * right[1] >= ENERGYNET_HEAVY;
    if (type != aoti_torch_dtype_float32() || !large || !(rows || columns)) return aoti_torch_cpu_mm_out(out, a, b);
    const int64_t sizes[] = {right[1], right[0]}, strides[] = {steps[1], steps[0]};
    RAIIAtenTensorHandle turned(reinterpret_tensor_wrapper(b, 2, sizes, strides, 0));
    AtenTensorHandle found;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(a, turned, nullptr, "none", nullptr, 0, nullptr, &found));
    RAIIAtenTensorHandle product(found);
    return aoti_torch_tensor_copy_(product, out);
}

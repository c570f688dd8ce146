"""Sums over the elements of a vector register, in what Inductor writes.

ATen's ``vec_reduce_all`` has shuffles for floats; for doubles it goes through memory element by element, and each time waits
for what it has just stored: most of the time that a turn of a small problem in float64 took.
"""

_SLOW = "at::vec::vec_reduce_all<double, "
_FAST = "energynet_fold<double, "
_PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>"

_FOLD = """
template <typename T, int N, typename Op>
static inline T energynet_fold(const Op& op, at::vec::VectorizedN<T, N> all) {
    at::vec::Vectorized<T> v = all[0];
    for (int k = 1; k < N; k++) v = op(v, all[k]);
#if defined(CPU_CAPABILITY_AVX512)
    at::vec::Vectorized<T> other = _mm512_shuffle_f64x2(v, v, 0x4E);  // halves change places, then quarters, then neighbors
    v = op(v, other);
    other = _mm512_shuffle_f64x2(v, v, 0xB1);
    v = op(v, other);
    other = _mm512_shuffle_pd(v, v, 0x55);
    v = op(v, other);
    return _mm512_cvtsd_f64(v);
#elif defined(CPU_CAPABILITY_AVX2)
    at::vec::Vectorized<T> other = _mm256_permute2f128_pd(v, v, 0x01);
    v = op(v, other);
    other = _mm256_shuffle_pd(v, v, 0x05);
    v = op(v, other);
    return _mm256_cvtsd_f64(v);
#else
    return at::vec::vec_reduce_all<T>(op, v);
#endif
}
"""


def folded(source: str) -> str:
    """The same program with sums of doubles in registers.

    Example:
        >>> folded("int main() { return 0; }")
        'int main() { return 0; }'
    """
    return calling(source, _SLOW, _FAST, _PREFIX, _FOLD)


def calling(source: str, slow: str, fast: str, prefix: str, definition: str) -> str:
    """The same program that calls one function in place of another; it is defined after the prefix, without which all stays."""
    if slow not in source or prefix not in source:
        return source
    return source.replace(slow, fast).replace(prefix, prefix + definition, 1)

// Sums of doubles over a vector register: see fold.py.
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

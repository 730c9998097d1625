/* attention_avx2.h - what attention_vectors.h needs of 256-bit registers. */
#include <immintrin.h>

static inline __attribute__((always_inline)) float largest_of(__m256 eight) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

#define VECTOR_BYTES 32
#define WIDEN(p) ((floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p))))
#define LARGEST(v) largest_of((__m256)(v))
#define ALL(x) ((floats)_mm256_set1_ps(x))
#define ROWS 3
#define SIZES(DO, x) DO(1, x) DO(2, x) DO(3, x)
#define COLUMNS(n) 4

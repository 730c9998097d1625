/* attention_avx2.c - attention with 256-bit registers: the compiler makes two of each vector. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "common.h"

#pragma GCC diagnostic ignored "-Wpsabi" /* every function with such an argument is inlined */

typedef float sixteen __attribute__((vector_size(64)));

static inline __attribute__((always_inline)) sixteen widen16(const uint16_t *p) {
    const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)));
    sixteen v;
    memcpy(&v, &low, sizeof low);
    memcpy((char *)&v + sizeof low, &high, sizeof high);
    return v;
}

static inline __attribute__((always_inline)) float largest_of(sixteen v) {
    __m256 halves[2];
    memcpy(halves, &v, sizeof v);
    const __m256 eight = _mm256_max_ps(halves[0], halves[1]);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

#define WIDEN16(p) widen16(p)
#define LARGEST(v) largest_of(v)
#define ROWS 2
#define SIZES(DO, x) DO(1, x) DO(2, x)
#define COLUMNS(n) 2
#define WIDEN_KEYS_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = PL_ALWAYS, [PL_KV_Q4_0] = PL_ALWAYS}
#define WIDEN_VALUES_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = 4, [PL_KV_Q4_0] = 4}
#define TABLE pl_attention_avx2
#include "attention_vectors.h"
#endif

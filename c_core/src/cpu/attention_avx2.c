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

#define WIDEN16(p) widen16(p)
#define ROWS 2
#define COLUMNS 2
#define TABLE pl_attention_avx2
#include "attention_vectors.h"
#endif

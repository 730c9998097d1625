/* attention_avx512.h - what attention_vectors.h needs of 512-bit registers. */
#include <immintrin.h>

#define VECTOR_BYTES 64
#define WIDEN(p) ((floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define LARGEST(v) _mm512_reduce_max_ps((__m512)(v))
#define ALL(x) ((floats)_mm512_set1_ps(x))
#define LARGER(a, b) ((floats)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define ROUND(x) ((floats)_mm512_roundscale_ps((__m512)(x), 0))
#define SCALE(x, n) ((floats)_mm512_scalef_ps((__m512)(x), (__m512)(n)))
#define ADD_FOURS(s, u, x) ((ints)_mm512_dpbusd_epi32((__m512i)(s), (__m512i)(u), (__m512i)(x)))
#define WHOLE(x) ((ints)_mm512_cvtps_epi32((__m512)(x)))
#define STORE_BYTES(p, v) _mm_storeu_si128((__m128i *)(p), _mm512_cvtepi32_epi8((__m512i)(v)))
#define ROWS 12
#define SIZES(DO, x) DO(1, x) DO(2, x) DO(3, x) DO(4, x) DO(5, x) DO(6, x) DO(7, x) DO(8, x) DO(12, x)
#define COLUMNS(n) ((n) <= 6 ? 4 : 2)

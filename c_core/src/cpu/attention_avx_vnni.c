/* attention_avx_vnni.c - the same with VNNI, by which quantized keys are read as they are. */
#if defined(PL_AVX_VNNI)
#include "attention_avx2.h"

/* Eight numbers as bytes. */
static inline __attribute__((always_inline)) void store_bytes(void *p, __m256i v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(p, _mm_packs_epi16(words, words));
}

#define ADD_FOURS(s, u, x) ((ints)_mm256_dpbusd_avx_epi32((__m256i)(s), (__m256i)(u), (__m256i)(x)))
#define WHOLE(x) ((ints)_mm256_cvtps_epi32((__m256)(x)))
#define STORE_BYTES(p, v) store_bytes(p, (__m256i)(v))
#define WIDEN_KEYS_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = PL_NEVER, [PL_KV_Q4_0] = PL_NEVER}
#define WIDEN_VALUES_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = 4, [PL_KV_Q4_0] = 4}
#define TABLE pl_attention_avx_vnni
#include "attention_vectors.h"
#endif

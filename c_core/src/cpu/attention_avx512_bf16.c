/*
 * attention_avx512_bf16.c - the same with products of pairs of bfloat16: twice as many in an instruction. With keys and values in
 * halves all attention is computed so, whether a prompt is read, for which blocks are widened, or a token is generated.
 */
#if defined(__x86_64__)
#include "attention_avx512.h"

typedef int16_t shorts __attribute__((vector_size(64)));

static inline __attribute__((always_inline)) __m512 pairs(__m512 a, __m512 b) {
    const shorts order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (__m512)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

#define PAIRS(a, b) ((floats)pairs((__m512)(a), (__m512)(b)))
#define NEIGHBOURS(a, b) ((floats)_mm512_cvtne2ps_pbh((__m512)(b), (__m512)(a)))
#define ADD_PAIRS(s, x, y) ((floats)_mm512_dpbf16_ps((__m512)(s), (__m512bh)(x), (__m512bh)(y)))
#define WIDEN_KEYS_FROM {[PL_KV_F16] = 33, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = PL_NEVER, [PL_KV_Q4_0] = PL_NEVER}
#define WIDEN_VALUES_FROM {[PL_KV_F16] = 33, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = 33, [PL_KV_Q4_0] = 33}
#define TABLE pl_attention_avx512_bf16
#include "attention_vectors.h"
#endif

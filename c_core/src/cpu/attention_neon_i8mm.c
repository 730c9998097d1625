/* attention_neon_i8mm.c - the same with USDOT, by which quantized keys are read as they are. */
#if defined(__aarch64__)
#include "attention_neon.h"

/* Four numbers as bytes. */
static inline __attribute__((always_inline)) void store_bytes(void *p, int32x4_t v) {
    const int16x4_t words = vqmovn_s32(v);
    vst1_lane_s32(p, vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
}

#define ADD_FOURS(s, u, x) ((ints)vusdotq_s32((int32x4_t)(s), (uint8x16_t)(u), (int8x16_t)(x)))
#define WHOLE(x) ((ints)vcvtnq_s32_f32((float32x4_t)(x)))
#define STORE_BYTES(p, v) store_bytes(p, (int32x4_t)(v))
#define WIDEN_KEYS_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = PL_NEVER, [PL_KV_Q4_0] = PL_NEVER}
#define WIDEN_VALUES_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = 4, [PL_KV_Q4_0] = 4}
#define TABLE pl_attention_neon_i8mm
#include "attention_vectors.h"
#endif

/* attention_neon.c - attention with 128-bit registers. */
#if defined(__aarch64__)
#include <arm_neon.h>

#define VECTOR_BYTES 16
#define WIDEN(p) ((floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))))
#define LARGEST(v) vmaxvq_f32((float32x4_t)(v))
#define ALL(x) ((floats)vdupq_n_f32(x))
#define ROWS 3
#define SIZES(DO, x) DO(1, x) DO(2, x) DO(3, x)
#define COLUMNS(n) ((n) == 1 ? 8 : 4)
#define WIDEN_KEYS_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = PL_ALWAYS, [PL_KV_Q4_0] = PL_ALWAYS}
#define WIDEN_VALUES_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = 4, [PL_KV_Q4_0] = 4}
#define TABLE pl_attention_neon
#include "attention_vectors.h"
#endif

/* attention_neon.c - attention with 128-bit registers: the compiler makes four of each vector. */
#if defined(__aarch64__)
#include <arm_neon.h>

#include "common.h"

#pragma GCC diagnostic ignored "-Wpsabi" /* every function with such an argument is inlined */

typedef float sixteen __attribute__((vector_size(64)));

static inline __attribute__((always_inline)) sixteen widen16(const uint16_t *p) {
    sixteen v;
    for (int i = 0; i < 4; i++) {
        const float32x4_t four = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
        memcpy((char *)&v + 16 * i, &four, sizeof four);
    }
    return v;
}

static inline __attribute__((always_inline)) float largest_of(sixteen v) {
    float32x4_t fours[4];
    memcpy(fours, &v, sizeof v);
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(fours[0], fours[1]), vmaxq_f32(fours[2], fours[3])));
}

#define WIDEN16(p) widen16(p)
#define LARGEST(v) largest_of(v)
#define ROWS 2
#define SIZES(DO, x) DO(1, x) DO(2, x)
#define COLUMNS(n) 2
#define WIDEN_KEYS_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = PL_ALWAYS, [PL_KV_Q4_0] = PL_ALWAYS}
#define WIDEN_VALUES_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = 4, [PL_KV_Q4_0] = 4}
#define TABLE pl_attention_neon
#include "attention_vectors.h"
#endif

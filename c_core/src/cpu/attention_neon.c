/* attention_neon.c - attention with 128-bit registers. */
#if defined(__aarch64__)
#include "attention_neon.h"

#define WIDEN_KEYS_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = PL_ALWAYS, [PL_KV_Q4_0] = PL_ALWAYS}
#define WIDEN_VALUES_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = 4, [PL_KV_Q4_0] = 4}
#define TABLE pl_attention_neon
#include "attention_vectors.h"
#endif

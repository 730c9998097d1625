/* attention_avx2.c - attention with 256-bit registers. */
#if defined(__x86_64__)
#include "attention_avx2.h"

#define WIDEN_KEYS_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = PL_ALWAYS, [PL_KV_Q4_0] = PL_ALWAYS}
#define WIDEN_VALUES_FROM {[PL_KV_F16] = 4, [PL_KV_F32] = PL_NEVER, [PL_KV_Q8_0] = 4, [PL_KV_Q4_0] = 4}
#define TABLE pl_attention_avx2
#include "attention_vectors.h"
#endif

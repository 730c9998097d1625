/* attention_avx512.c - attention with 512-bit registers. */
#if defined(__x86_64__)
#include "attention_avx512.h"

/* A piece is large enough to pay for widening on the way. */
#define WIDEN_KEYS_FROM {PL_NEVER, PL_NEVER, PL_NEVER, PL_NEVER}
#define WIDEN_VALUES_FROM {PL_NEVER, PL_NEVER, PL_NEVER, PL_NEVER}
#define TABLE pl_attention_avx512
#include "attention_vectors.h"
#endif

/* attention_avx512.c - attention with 512-bit registers. */
#if defined(__x86_64__)
#include "attention_avx512.h"

#define WIDEN_HALVES_FROM INT32_MAX /* a piece is large enough to pay for widening on the way */
#define TABLE pl_attention_avx512
#include "attention_vectors.h"
#endif

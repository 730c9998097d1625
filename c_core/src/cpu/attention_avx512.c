/* attention_avx512.c - attention with 512-bit registers. */
#if defined(__x86_64__)
#include <immintrin.h>

#define WIDEN16(p) ((floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define ROWS 6
#define COLUMNS 4
#define TABLE pl_attention_avx512
#include "attention_vectors.h"
#endif

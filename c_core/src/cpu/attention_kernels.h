/* attention_kernels.h - the inner loops of attention that an instruction set brings: see attention.h for the whole. */
#ifndef PL_ATTENTION_KERNELS_H
#define PL_ATTENTION_KERNELS_H

#include "common.h"

/* Some rows of one key/value head on their way over the blocks. */
typedef struct pl_attention_rows {
    int32_t n, head_dim;
    const float *const *q; /* [n] rows of head_dim */
    float *max, *sum;      /* [n] */
    float *total;          /* [n][head_dim], 64-byte aligned */
    float softcap;
} pl_attention_rows;

typedef struct pl_attention_kernels {
    /* Takes one block into the rows. Row i sees the block's tokens [from[i], to[i]), which may be none. `keys` is
     * [head_dim][32] and `values` [32][head_dim], halves or floats. */
    void (*block)(pl_attention_rows *rows, const void *keys, const void *values, bool half, const int32_t *from,
                  const int32_t *to);
    /* Expands n halves (n a multiple of 16). */
    void (*widen)(const uint16_t *from, int64_t n, float *to);
} pl_attention_kernels;

extern const pl_attention_kernels pl_attention_scalar;
#if defined(__x86_64__)
extern const pl_attention_kernels pl_attention_avx2, pl_attention_avx512;
#elif defined(__aarch64__)
extern const pl_attention_kernels pl_attention_neon;
#endif

#endif

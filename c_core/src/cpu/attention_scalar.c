/* attention_scalar.c - the reference: plain C. */
#include "attention_kernels.h"

#include <math.h>

static float element(const void *p, bool half, int64_t index) {
    return half ? pl_f16_to_f32(((const uint16_t *)p)[index]) : ((const float *)p)[index];
}

static void block(pl_attention_rows *rows, const void *keys, const void *values, bool half, const int32_t *from,
                  const int32_t *to) {
    const int32_t head_dim = rows->head_dim;
    const int64_t padded = pl_round_up(head_dim, 16);
    for (int32_t r = 0; r < rows->n; r++) {
        float scores[PL_BLOCK_TOKENS], largest = rows->max[r];
        float *total = rows->total + r * padded;
        for (int32_t t = from[r]; t < to[r]; t++) {
            scores[t] = 0;
            for (int32_t d = 0; d < head_dim; d++) {
                scores[t] += rows->q[r][d] * element(keys, half, (int64_t)d * PL_BLOCK_TOKENS + t);
            }
            if (rows->softcap != 0) {
                scores[t] = rows->softcap * tanhf(scores[t] / rows->softcap);
            }
            largest = fmaxf(largest, scores[t]);
        }
        if (from[r] >= to[r]) {
            continue;
        }
        const float shrink = expf(rows->max[r] - largest); /* exp(-inf) = 0 at a row's first block */
        rows->max[r] = largest;
        rows->sum[r] *= shrink;
        for (int32_t d = 0; d < head_dim; d++) {
            total[d] *= shrink;
        }
        for (int32_t t = from[r]; t < to[r]; t++) {
            const float p = expf(scores[t] - largest);
            rows->sum[r] += p;
            for (int32_t d = 0; d < head_dim; d++) {
                total[d] += p * element(values, half, (int64_t)t * head_dim + d);
            }
        }
    }
}

static void widen(const uint16_t *from, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i++) {
        to[i] = pl_f16_to_f32(from[i]);
    }
}

const pl_attention_kernels pl_attention_scalar = {block, widen};

/* attention_scalar.c - the reference: plain C. */
#include "attention_kernels.h"

#include <math.h>

static void begin(pl_attention_rows *rows, int32_t key_type) { (void)rows, (void)key_type; }

static void span(pl_attention_rows *rows, const pl_attention_span *span) {
    const int32_t head_dim = rows->head_dim;
    float x[PL_KV_MOST_HEAD_DIM];
    for (int32_t r = 0; r < rows->n; r++) {
        const int32_t from = span->from[r], to = span->to[r];
        float scores[PL_SPAN_TOKENS], largest = rows->max[r], *total = rows->total + r * pl_kv_width(head_dim);
        if (from >= to) {
            continue;
        }
        for (int32_t t = from; t < to; t++) {
            pl_kv_get_key(span->key_type, head_dim, span->keys[t / PL_BLOCK_TOKENS], t % PL_BLOCK_TOKENS, x);
            scores[t] = 0;
            for (int32_t d = 0; d < head_dim; d++) {
                scores[t] += rows->q[r][d] * x[d];
            }
            if (rows->softcap != 0) {
                scores[t] = rows->softcap * tanhf(scores[t] / rows->softcap);
            }
            largest = fmaxf(largest, scores[t]);
        }
        const float shrink = expf(rows->max[r] - largest); /* exp(-inf) = 0 at a row's first span */
        rows->max[r] = largest;
        rows->sum[r * PL_LANES] *= shrink;
        for (int32_t d = 0; d < head_dim; d++) {
            total[d] *= shrink;
        }
        for (int32_t t = from; t < to; t++) {
            const float p = expf(scores[t] - largest);
            pl_kv_get_value(span->value_type, head_dim, span->values[t / PL_BLOCK_TOKENS], t % PL_BLOCK_TOKENS, x);
            rows->sum[r * PL_LANES] += p;
            for (int32_t d = 0; d < head_dim; d++) {
                total[d] += p * x[d];
            }
        }
    }
}

const pl_attention_kernels pl_attention_scalar = {
    .widen_keys_from = {PL_NEVER, PL_NEVER, PL_NEVER, PL_NEVER},
    .widen_values_from = {PL_NEVER, PL_NEVER, PL_NEVER, PL_NEVER},
    .begin = begin,
    .span = span,
};

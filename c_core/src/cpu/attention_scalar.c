/* attention_scalar.c - the reference: plain C. */
#include "attention_kernels.h"

#include <math.h>

#define LOG2_E 1.44269504f

static void begin(pl_attention_rows *rows, int32_t key_type) { (void)rows, (void)key_type; }

static void span(pl_attention_rows *rows, const pl_attention_span *span) {
    const int32_t head_dim = rows->head_dim;
    float x[PL_KV_MOST_HEAD_DIM];
    for (int32_t r = 0; r < rows->n; r++) {
        const int32_t from = span->from[r], to = span->to[r];
        float scores[PL_SPAN_TOKENS], largest = -INFINITY, shrink = 1, *total = rows->total + r * pl_kv_width(head_dim);
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
            scores[t] *= LOG2_E;
            largest = fmaxf(largest, scores[t]);
        }
        if (largest > rows->exponent[r] + PL_HEADROOM) {
            shrink = pl_shrink(rows->exponent[r] - rintf(largest)); /* 0 at a row's first span */
            rows->exponent[r] = rintf(largest);
        }
        rows->sum[r * PL_LANES] *= shrink;
        for (int32_t d = 0; d < head_dim; d++) {
            total[d] *= shrink;
        }
        for (int32_t t = from; t < to; t++) {
            const float whole = rintf(scores[t]), p = exp2f(scores[t] - whole) * exp2f(whole - rows->exponent[r]);
            pl_kv_get_value(span->value_type, head_dim, span->values[t / PL_BLOCK_TOKENS], t % PL_BLOCK_TOKENS, x);
            rows->sum[r * PL_LANES] += p;
            for (int32_t d = 0; d < head_dim; d++) {
                total[d] += p * x[d];
            }
        }
    }
}

static void join(pl_attention_rows *whole, const pl_attention_rows *part, int32_t from, int32_t to) {
    const int64_t width = pl_kv_width(whole->head_dim);
    for (int32_t r = from; r < to; r++) {
        const float exponent = fmaxf(whole->exponent[r], part->exponent[r]);
        const float shrink = pl_shrink(whole->exponent[r] - exponent), weight = pl_shrink(part->exponent[r] - exponent);
        whole->exponent[r] = exponent;
        whole->sum[r * PL_LANES] = whole->sum[r * PL_LANES] * shrink + part->sum[r * PL_LANES] * weight;
        for (int64_t i = r * width; i < r * width + whole->head_dim; i++) {
            whole->total[i] = whole->total[i] * shrink + part->total[i] * weight;
        }
    }
}

const pl_attention_kernels pl_attention_scalar = {
    .widen_keys_from = {PL_NEVER, PL_NEVER, PL_NEVER, PL_NEVER},
    .widen_values_from = {PL_NEVER, PL_NEVER, PL_NEVER, PL_NEVER},
    .begin = begin,
    .span = span,
    .join = join,
};

/*
 * kv.h - the pool of key/value blocks.
 *
 * For each layer: K is kept transposed, [block][kv head][head_dim][32 tokens], so that the scores of a block's 32 tokens fill
 * a register or two without sums across lanes; V is [block][kv head][32 tokens][head_dim]. Elements are half or float.
 */
#ifndef PL_KV_H
#define PL_KV_H

#include "common.h"

struct pl_kv {
    int32_t n_layers, n_blocks, n_head_kv, head_dim;
    int32_t type;          /* enum pl_kv_type */
    int32_t element_bytes; /* 2 or 4 */
    int64_t head_bytes;    /* K, or V, of one block and one head */
    int64_t layer_bytes;   /* K, or V, of one layer */
    uint8_t *base;         /* K of all layers, then V of all layers */
    int64_t bytes;
};

static inline uint8_t *pl_kv_keys(const pl_kv *kv, int32_t layer, int32_t block, int32_t head) {
    return kv->base + layer * kv->layer_bytes + ((int64_t)block * kv->n_head_kv + head) * kv->head_bytes;
}

static inline uint8_t *pl_kv_values(const pl_kv *kv, int32_t layer, int32_t block, int32_t head) {
    return pl_kv_keys(kv, kv->n_layers + layer, block, head);
}

/* Writes K and V of new tokens first .. first + n - 1 of a sequence for one head; row i is at k + i * stride. */
void pl_kv_store(pl_kv *kv, int32_t layer, const pl_sequence *sequence, int32_t head, int32_t first, int32_t n, const float *k,
                 const float *v, int64_t stride);

/* Copies n positions of one block list to another in one layer; K is rotated by dst_pos - src_pos if `frequencies` is given. */
void pl_kv_copy_run(pl_kv *kv, int32_t layer, const int32_t *src_blocks, int32_t src_pos, const int32_t *dst_blocks,
                    int32_t dst_pos, int32_t n, const float *frequencies, int32_t n_rotated, int32_t rope_kind);

#endif

/*
 * kv.h - the pool of key/value blocks.
 *
 * K of a layer is [run of 64 blocks][kv head][block of the run], so that blocks which follow each other are read as a stream,
 * and blocks that are not used yet lie in pages of their own. A block's K is a matrix of head_dim x 32 tokens that is kept
 * transposed, so that the scores of its tokens fill a register or two without sums across lanes; V is the same with 32 tokens x
 * head_dim. K and V may be of different types:
 *
 * type        K of one block and head                             V of one block and head
 * f32, f16    [head_dim][32]                                      [32][width], width being head_dim rounded up to 16
 * q8_0        code + 128: [head_dim / 4][32][4], then scales      code: [32 / 4][head_dim][4 tokens], then scales
 * q4_0        code + 8:   [head_dim / 8][32][4 bytes], a byte     code + 8: [32 / 4][head_dim / 32][16][4 tokens], a byte
 *             being elements i and i + 4 of 8; then scales        being columns i and i + 16 of 32; then scales
 *
 * The quantized types are GGUF's: 32 elements of a token share a scale, a half, and an element is code * scale. Scales are
 * [head_dim / 32][32 tokens]. Codes come in fours for instructions that sum products of four bytes; every token's bytes are its
 * own.
 */
#ifndef PL_KV_H
#define PL_KV_H

#include "common.h"

enum {
    PL_KV_GROUP = 32,             /* elements that share a scale */
    PL_KV_RUN = 64,               /* blocks of a head that follow each other in memory */
    PL_KV_MOST_HEAD_DIM = 1 << 13
};

struct pl_kv {
    int32_t n_layers, n_blocks, n_head_kv, head_dim;
    int32_t key_type, value_type;     /* enum pl_kv_type */
    int64_t key_bytes, value_bytes;   /* of one block and one head */
    uint8_t *keys, *values;           /* of all layers */
    int64_t bytes;
    void (*halve)(const float *x, int32_t n, uint16_t *y); /* of the processor's kernels */
};

/* Columns of a row of V: head_dim, rounded up so that rows are whole registers. */
static inline int64_t pl_kv_width(int32_t head_dim) { return pl_round_up(head_dim, 16); }

/* How many blocks and heads are before one; the last run may be short. */
static inline int64_t pl_kv_place(const pl_kv *kv, int32_t layer, int32_t block, int32_t head) {
    const int32_t in_run = block % PL_KV_RUN, first = block - in_run, n = PL_MIN(PL_KV_RUN, kv->n_blocks - first);
    return ((int64_t)layer * kv->n_blocks + first) * kv->n_head_kv + (int64_t)head * n + in_run;
}

static inline uint8_t *pl_kv_keys(const pl_kv *kv, int32_t layer, int32_t block, int32_t head) {
    return kv->keys + pl_kv_place(kv, layer, block, head) * kv->key_bytes;
}

static inline uint8_t *pl_kv_values(const pl_kv *kv, int32_t layer, int32_t block, int32_t head) {
    return kv->values + pl_kv_place(kv, layer, block, head) * kv->value_bytes;
}

/* Where the scales of a quantized block and head begin. */
static inline int64_t pl_kv_scales(int32_t type, int32_t head_dim) {
    return (int64_t)head_dim * PL_BLOCK_TOKENS / (type == PL_KV_Q4_0 ? 2 : 1);
}

/*
 * Keys of 4 bits are kept, and queries compared with them, in a turned basis, in which what single elements stick out by is
 * shared by many: a Walsh-Hadamard transform, which leaves scores as they are (QuaRot: Ashkboos et al. 2024). In place, and
 * its own inverse; nothing happens with other types.
 */
void pl_kv_turn(int32_t key_type, int32_t head_dim, float *x);

/* One token's K or V of one head, as float[head_dim]; `at` is its place in the block. */
void pl_kv_put_key(const pl_kv *kv, uint8_t *keys, int32_t at, const float *k);
void pl_kv_put_value(const pl_kv *kv, uint8_t *values, int32_t at, const float *v);
void pl_kv_get_key(int32_t type, int32_t head_dim, const uint8_t *keys, int32_t at, float *k);
void pl_kv_get_value(int32_t type, int32_t head_dim, const uint8_t *values, int32_t at, float *v);

/* Copies n positions of one block list to another in one layer; K is rotated by dst_pos - src_pos if `frequencies` is given. */
void pl_kv_copy_run(pl_kv *kv, int32_t layer, const int32_t *src_blocks, int32_t src_pos, const int32_t *dst_blocks,
                    int32_t dst_pos, int32_t n, const float *frequencies, int32_t n_rotated, int32_t rope_kind);

#endif

/* check_kv.c - the pool of keys and values: a place of its own for every block and head, and copies from any to any. */
#include "kv.h"

#include "compare.h"

#include <stdlib.h>

enum { N_LAYERS = 3, HEAD_DIM = 32 };

/* Pools of any size are filled without gaps, and the blocks of a run follow each other. */
static void check_places(int32_t n_blocks, int32_t n_head_kv) {
    const int64_t n = (int64_t)N_LAYERS * n_blocks * n_head_kv;
    pl_kv *kv = pl_kv_new(N_LAYERS, n_blocks, n_head_kv, HEAD_DIM, PL_KV_Q8_0, PL_KV_Q4_0, NULL);
    bool *taken = calloc((size_t)n, sizeof *taken);
    for (int32_t layer = 0; layer < N_LAYERS; layer++) {
        for (int32_t block = 0; block < n_blocks; block++) {
            for (int32_t head = 0; head < n_head_kv; head++) {
                const int64_t place = pl_kv_place(kv, layer, block, head);
                if (place < 0 || place >= n || taken[place]) {
                    differ("keys and values", "the place of a block", n_blocks, block);
                    continue;
                }
                taken[place] = true;
                if (block % PL_KV_RUN && place != pl_kv_place(kv, layer, block - 1, head) + 1) {
                    differ("keys and values", "the place behind a block", n_blocks, block);
                }
            }
        }
    }
    if (kv->keys + n * kv->key_bytes != kv->values || kv->values + n * kv->value_bytes != kv->keys + pl_kv_bytes(kv)) {
        differ("keys and values", "the size of a pool", n_blocks, n_head_kv);
    }
    free(taken);
    pl_kv_free(kv);
}

/* A sequence of many blocks, copied to other positions of others: between runs, and within a short one. */
static void check_copy(int32_t type) {
    enum { N_BLOCKS = 2 * PL_KV_RUN + 9, N_HEAD_KV = 2, N_PAIRS = N_BLOCKS / 2, FROM = 5, TO = 30, LAYER = 1 };
    enum { N = (N_PAIRS - 1) * PL_BLOCK_TOKENS };
    pl_kv *kv = pl_kv_new(N_LAYERS, N_BLOCKS, N_HEAD_KV, HEAD_DIM, type, type, NULL);
    int32_t from[N_PAIRS], to[N_PAIRS];
    for (int32_t i = 0; i < N_PAIRS; i++) {
        from[i] = 2 * i;
        to[i] = N_BLOCKS - 2 - 2 * i; /* odd ones, the last first */
    }
    for (int32_t i = 0; i < N; i++) {
        const int32_t block = from[(FROM + i) / PL_BLOCK_TOKENS], at = (FROM + i) % PL_BLOCK_TOKENS;
        for (int32_t head = 0; head < N_HEAD_KV; head++) {
            float x[HEAD_DIM];
            for (int32_t d = 0; d < HEAD_DIM; d++) {
                x[d] = random_float();
            }
            pl_kv_put_key(kv, pl_kv_keys(kv, LAYER, block, head), at, x);
            pl_kv_put_value(kv, pl_kv_values(kv, LAYER, block, head), at, x);
        }
    }
    pl_kv_copy_run(kv, LAYER, from, FROM, to, TO, N, NULL, 0, 0);
    for (int32_t i = 0; i < N; i++) {
        const int32_t source = from[(FROM + i) / PL_BLOCK_TOKENS], source_at = (FROM + i) % PL_BLOCK_TOKENS;
        const int32_t copy = to[(TO + i) / PL_BLOCK_TOKENS], copy_at = (TO + i) % PL_BLOCK_TOKENS;
        for (int32_t head = 0; head < N_HEAD_KV; head++) {
            float expected[2][HEAD_DIM], got[2][HEAD_DIM];
            pl_kv_get_key(type, HEAD_DIM, pl_kv_keys(kv, LAYER, source, head), source_at, expected[0]);
            pl_kv_get_value(type, HEAD_DIM, pl_kv_values(kv, LAYER, source, head), source_at, expected[1]);
            pl_kv_get_key(type, HEAD_DIM, pl_kv_keys(kv, LAYER, copy, head), copy_at, got[0]);
            pl_kv_get_value(type, HEAD_DIM, pl_kv_values(kv, LAYER, copy, head), copy_at, got[1]);
            if (memcmp(expected, got, sizeof got) != 0) {
                differ("keys and values", "a copy", type, i);
            }
        }
    }
    pl_kv_free(kv);
}

void check_kv(void) {
    static const int32_t sizes[] = {1, 2, PL_KV_RUN - 1, PL_KV_RUN, PL_KV_RUN + 1, 3 * PL_KV_RUN, 3 * PL_KV_RUN + 17};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int32_t n_head_kv = 1; n_head_kv <= 3; n_head_kv++) {
            check_places(sizes[i], n_head_kv);
        }
    }
    check_copy(PL_KV_F32);
    check_copy(PL_KV_F16);
    check_copy(PL_KV_Q8_0);
    check_copy(PL_KV_Q4_0);
}

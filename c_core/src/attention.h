/*
 * attention.h - causal attention of a batch's new tokens over their sequences' blocks.
 *
 * Rows (a new token and a head) of one key/value head share every load of K and V. A row keeps a running maximum, sum and
 * weighted sum of V over spans of blocks (online softmax: Milakov and Gimelshein 2018; Dao et al. 2022), so no row of scores
 * is ever stored. A long context with few new tokens is split into chunks of blocks that the team shares, and their parts are
 * joined afterwards.
 */
#ifndef PL_ATTENTION_H
#define PL_ATTENTION_H

#include "cpu/attention_kernels.h"
#include "kv.h"
#include "pool.h"

enum { PL_MOST_HEADS_PER_GROUP = 256 }; /* query heads that share a key/value head */

typedef struct pl_attention_args {
    const pl_attention_kernels *kernels;
    const pl_kv *kv;
    int32_t layer, n_head;
    int32_t window; /* a token at position p sees (p - window, p]; 0: all up to p */
    float softcap;  /* 0: none */
    const pl_sequence *sequences;
    int32_t n_sequences, n_tokens;
    const float *q; /* [n_tokens][n_head * head_dim], rotated and scaled */
    float *out;     /* the same shape */
} pl_attention_args;

/* For sequences of at most `max_blocks` blocks. */
int64_t pl_attention_scratch_bytes(int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t max_blocks, int32_t n_threads);

/* Whether member number `head % n_threads` alone reads and writes a key/value head: so with one token, but in long contexts. */
bool pl_attention_keeps_heads(const pl_attention_args *a, int32_t n_threads);

/* Called by every member of the team; `counters` are zero before. The caller waits at a barrier afterwards. */
void pl_attention_run(const pl_attention_args *a, void *scratch, atomic_int counters[2], const pl_member *member);

#endif

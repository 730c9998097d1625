/*
 * attention.h - causal attention of a batch's new tokens over their sequences' blocks.
 *
 * Rows (a new token and a head) of one key/value head share every load of K and V. A row keeps an exponent, a sum and a
 * weighted sum of V over spans of blocks (online softmax: Milakov and Gimelshein 2018; Dao et al. 2022), so no row of scores
 * is ever stored. A context is summed in chunks, whose borders are the same positions for every row, and the sums are joined
 * from first to last. A team that has few rows to share shares a row's chunks. So what a row gets depends on its position
 * alone: neither on the rows beside it nor on the number of threads, to the last bit. (The exception is quantized V past the
 * first chunk: where the processor has bfloat16 products, long pieces of prompts use them.)
 *
 * Rows that are taken together are multiplied with all tokens that one of them sees, those that another does not see with a
 * weight of 0. So a V that is not finite makes what comes before it in the same piece NaN, as it does with all that comes after.
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

/* program.h - a program's memory and the state of one run of it, shared by program.c (life, checks) and ops.c (the ops). */
#ifndef PL_PROGRAM_H
#define PL_PROGRAM_H

#include "attention.h"
#include "cpu/kernels.h"
#include "kv.h"
#include "pool.h"

/*
 * With one token, ops on rows are too short to be shared out: every member does them for itself, and keeps the result in memory
 * of its own. So the team need not meet before and after them, but where something shared is read after another member wrote
 * it, or written after another read it.
 */
typedef enum pl_meeting {
    PL_MEET_NOT,
    PL_MEET,
    PL_MEET_UNLESS_HEADS_ARE_KEPT, /* pl_attention_keeps_heads() */
} pl_meeting;

typedef struct pl_single_plan {
    pl_meeting *meetings; /* for each op: before it */
    bool *is_own;         /* for each value: every member has its own */
    int64_t *starts;      /* for each slot: where it is in a member's memory */
    int64_t member_bytes;
    uint8_t *memory;      /* of all members */
} pl_single_plan;

/* How K of a layer is rotated. */
typedef struct pl_layer_rope {
    const float *inverse_frequencies; /* NULL: not at all */
    int32_t n_rotated, kind;
} pl_layer_rope;

struct pl_program {
    pl_op *ops;
    int32_t n_ops;
    pl_value *values;
    int32_t n_values;
    uint8_t **slots; /* in slot_memory, which is one piece so that it can lie in large pages */
    int32_t n_slots;
    uint8_t *slot_memory;
    int64_t slot_bytes; /* of all slots */
    int32_t max_tokens, max_outputs;
    int32_t n_vocab; /* rows of the embedding table */
    pl_layer_rope *layer_ropes;
    pl_kv *kv;
    pl_pool *pool;
    const pl_cpu_set *cpu;
    uint8_t *attention_scratch;
    int64_t attention_scratch_bytes;
    uint8_t *unfolding_memory; /* for each member two units of weights, unfolded; NULL: no product does that */
    int64_t unfolding_bytes;   /* of one unit */
    pl_single_plan single;
    atomic_int (*counters)[2]; /* for each op: shared work counters, zeroed before a run */
};

typedef struct pl_run_state {
    const pl_program *program;
    const pl_batch *batch;
    uint8_t *own; /* a member's memory for values of its own, in a run of one token */
} pl_run_state;

/* Bytes that units of n matrices, or as many as there are before a NULL, take at most where products unfold them. */
int64_t pl_unfolded_bytes(const pl_kernels *k, const pl_weight *const *w, int32_t n);

/* Runs all ops; every member of the team calls it. */
void pl_run_ops(void *run_state, const pl_member *member);

/* out[n][n_rows] = x times the transpose of w, for one matrix outside of a program (pl_weight_product). */
typedef struct pl_product_job {
    const pl_weight *w;
    const pl_cpu_set *cpu;
    const float *x;
    void *q8; /* pl_q8_bytes(n_cols, n), or NULL for a float matrix */
    uint8_t *unfolding_memory; /* for each member a unit, unfolded; or NULL */
    int64_t unfolding_bytes;
    int32_t n;
    float *out;
    atomic_int next;
} pl_product_job;
void pl_run_product(void *job, const pl_member *member);

#endif

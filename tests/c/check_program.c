/* check_program.c - programs: whatever the order of their ops, steps of one token meet where they have to. */
#include "program.h"

#include "compare.h"

#include <math.h>

/* Two layers whose queries have different numbers of heads, so that attention works in different places for them. */
enum { N_VOCAB = 37, N_EMBD = 32, HEAD_DIM = 16, N_HEAD_KV = 3, FEW_HEADS = 3, MANY_HEADS = 12, N_BLOCKS = 25, MOST_TOKENS = 64 };
enum { KV_WIDTH = N_HEAD_KV * HEAD_DIM, FEW_WIDTH = FEW_HEADS * HEAD_DIM, MANY_WIDTH = MANY_HEADS * HEAD_DIM };

enum { X, Q0, K0, V0, Q1, K1, V1, Q2, K2, V2, SUM, Y0, Y1, Y2, R0, R1, R2, R01, R, OUT, N_VALUES };

static const int32_t widths[N_VALUES] = {
    [X] = N_EMBD,      [Q0] = FEW_WIDTH,  [K0] = KV_WIDTH, [V0] = KV_WIDTH, [Q1] = MANY_WIDTH, [K1] = KV_WIDTH, [V1] = KV_WIDTH,
    [Q2] = FEW_WIDTH,  [K2] = KV_WIDTH,   [V2] = KV_WIDTH, [SUM] = KV_WIDTH, [Y0] = FEW_WIDTH, [Y1] = MANY_WIDTH,
    [Y2] = FEW_WIDTH,  [R0] = N_EMBD,     [R1] = N_EMBD,   [R2] = N_EMBD,   [R01] = N_EMBD,    [R] = N_EMBD,    [OUT] = N_EMBD,
};

/* An op, and whether a step of one token has to meet before it. */
typedef struct line {
    pl_op op;
    pl_meeting meeting;
} line;

#define OP(KIND, ...) {.kind = PL_OP_##KIND, __VA_ARGS__, .f = {1, 1}}
#define SRC(...) .src = {__VA_ARGS__}
#define DST(...) .dst = {__VA_ARGS__}

/* Attention follows attention with nothing between, and a layer's keys are written again right after they were read. */
static const line lines[] = {
    {OP(EMBED, SRC(-1, -1, -1, -1), DST(X, -1, -1)), PL_MEET_NOT},
    {OP(LINEAR, SRC(X, -1, -1, -1), DST(Q0, K0, V0)), PL_MEET_NOT},
    {OP(LINEAR, SRC(X, -1, -1, -1), DST(Q1, K1, V1)), PL_MEET_NOT},
    {OP(LINEAR, SRC(X, -1, -1, -1), DST(Q2, K2, V2)), PL_MEET_NOT},
    {OP(QKV, SRC(Q0, K0, V0, -1), DST(Q0, -1, -1), .n = {0, FEW_HEADS, 0, 0}), PL_MEET},
    {OP(QKV, SRC(Q1, K1, V1, -1), DST(Q1, -1, -1), .n = {1, MANY_HEADS, 0, 0}), PL_MEET_NOT},
    {OP(ADD, SRC(K0, K1, -1, -1), DST(SUM, -1, -1)), PL_MEET},
    {OP(ATTENTION, SRC(Q0, -1, -1, -1), DST(Y0, -1, -1), .n = {0, FEW_HEADS, 0, 0}), PL_MEET_NOT},
    {OP(ATTENTION, SRC(Q1, -1, -1, -1), DST(Y1, -1, -1), .n = {1, MANY_HEADS, 0, 0}), PL_MEET}, /* what it works in */
    {OP(ATTENTION, SRC(Q0, -1, -1, -1), DST(Y0, -1, -1), .n = {0, FEW_HEADS, 20, 0}), PL_MEET},
    {OP(QKV, SRC(Q2, K2, V2, -1), DST(Q2, -1, -1), .n = {0, FEW_HEADS, 0, 0}), PL_MEET}, /* the keys */
    {OP(ATTENTION, SRC(Q2, -1, -1, -1), DST(Y2, -1, -1), .n = {0, FEW_HEADS, 0, 0}), PL_MEET_UNLESS_HEADS_ARE_KEPT},
    {OP(LINEAR, SRC(Y0, -1, -1, -1), DST(R0, -1, -1)), PL_MEET_NOT},
    {OP(LINEAR, SRC(Y1, -1, -1, -1), DST(R1, -1, -1)), PL_MEET_NOT},
    {OP(LINEAR, SRC(Y2, -1, -1, -1), DST(R2, -1, -1)), PL_MEET},
    {OP(ADD, SRC(R0, R1, -1, -1), DST(R01, -1, -1)), PL_MEET_NOT},
    {OP(ADD, SRC(R01, R2, -1, -1), DST(R, -1, -1)), PL_MEET},
    {OP(SELECT, SRC(R, -1, -1, -1), DST(OUT, -1, -1)), PL_MEET_NOT},
    {OP(LOGITS, SRC(OUT, -1, -1, -1), DST(-1, -1, -1)), PL_MEET_NOT},
    {OP(LOGITS, SRC(OUT, -1, -1, -1), DST(-1, -1, -1)), PL_MEET}, /* the logits */
};

enum { N_OPS = sizeof lines / sizeof *lines };

static pl_weight *random_weight(int32_t n_rows, int32_t n_cols) {
    float x[MANY_WIDTH * MANY_WIDTH];
    for (int32_t i = 0; i < n_rows * n_cols; i++) {
        x[i] = random_float() / 3;
    }
    return pl_weight_new(NULL, PL_F32, n_rows, n_cols, x, 4 * n_rows * n_cols, NULL, NULL);
}

/* Matrices of the shapes that the ops want: the caller's to free, those that are there. */
static void add_weights(pl_op *op) {
    if (op->kind == PL_OP_EMBED || op->kind == PL_OP_LOGITS) {
        op->w[0] = random_weight(N_VOCAB, N_EMBD);
    }
    for (int32_t i = 0; op->kind == PL_OP_LINEAR && i < 3 && op->dst[i] >= 0; i++) {
        op->w[i] = random_weight(widths[op->dst[i]], widths[op->src[0]]);
    }
}

static void refuse_another_q(pl_op *ops, const pl_value *values, pl_kv *kv) {
    enum { FIRST_QKV = 4 };
    ops[FIRST_QKV].dst[0] = Y0;
    pl_error err;
    if (pl_program_new(ops, N_OPS, values, N_VALUES, N_VALUES, MOST_TOKENS, 1, kv, NULL, &err)) {
        differ("program", "what is done with a q that is not changed in place", 0, 0);
    }
}

/* Reads tokens up to `past`, and the next one: its logits. */
static void run(pl_program *p, int32_t n_threads, int32_t past, float *logits) {
    int32_t tokens[MOST_TOKENS], blocks[N_BLOCKS], last = 0;
    for (int32_t i = 0; i < N_BLOCKS; i++) {
        blocks[i] = N_BLOCKS - 1 - i;
    }
    for (int32_t at = 0, n; at <= past; at += n) {
        n = at == past ? 1 : PL_MIN(MOST_TOKENS, past - at);
        for (int32_t i = 0; i < n; i++) {
            tokens[i] = (at + i) * 11 % N_VOCAB;
        }
        const pl_sequence sequence = {0, n, at, N_BLOCKS, blocks};
        const pl_batch batch = {.n_tokens = n, .tokens = tokens, .n_sequences = 1, .sequences = &sequence,
                                .n_outputs = at == past, .outputs = &last, .logits = logits};
        pl_error err;
        if (pl_run(p, n_threads, &batch, &err) < 0) {
            differ("program", err.message, at, n);
        }
    }
}

void check_program(void) {
    enum { MOST_THREADS = 4, RUNS = 100 };
    pl_error err;
    pl_op ops[N_OPS];
    pl_value values[N_VALUES];
    for (int32_t i = 0; i < N_OPS; i++) {
        ops[i] = lines[i].op;
        add_weights(&ops[i]);
    }
    for (int32_t i = 0; i < N_VALUES; i++) {
        values[i] = (pl_value){PL_VALUE_F32, i == OUT ? PL_ROWS_OUTPUTS : PL_ROWS_TOKENS, widths[i], i};
    }
    pl_kv *kv = pl_kv_new(2, N_BLOCKS, N_HEAD_KV, HEAD_DIM, PL_KV_F16, PL_KV_F16, &err);
    pl_pool *pool = pl_pool_new(MOST_THREADS, &err);
    pl_program *p = pl_program_new(ops, N_OPS, values, N_VALUES, N_VALUES, MOST_TOKENS, 1, kv, pool, &err);
    if (!p) {
        differ("program", err.message, 0, 0);
        return;
    }
    for (int32_t i = 0; i < N_OPS; i++) {
        if (p->single.meetings[i] != lines[i].meeting) {
            differ("program", "the meeting before an op", i, (int32_t)p->single.meetings[i]);
        }
    }
    for (int32_t past = 5; past < N_BLOCKS * PL_BLOCK_TOKENS; past += 700) { /* heads are kept, and contexts split */
        float expected[N_VOCAB], got[N_VOCAB];
        run(p, 1, past, expected);
        for (int32_t threads = 2; threads <= MOST_THREADS; threads++) {
            for (int32_t i = 0; i < (past < 512 ? RUNS : RUNS / 10); i++) {
                run(p, threads, past, got);
                if (memcmp(got, expected, sizeof got) != 0) {
                    differ("program", "the logits of a run", threads, past);
                }
            }
        }
    }
    refuse_another_q(ops, values, kv);
    pl_program_free(p);
    pl_pool_free(pool);
    pl_kv_free(kv);
    for (int32_t i = 0; i < N_OPS; i++) {
        for (int32_t j = 0; j < 3; j++) {
            pl_weight_free((pl_weight *)ops[i].w[j]);
        }
    }
}

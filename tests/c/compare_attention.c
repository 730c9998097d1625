/*
 * compare_attention.c - attention of a kernel set against plain sums in double precision: all types of keys and values, heads
 * and windows of odd sizes, contexts that end anywhere in a block, few new tokens and many, one thread and several.
 *
 * Every place of the store that the tokens do not own holds bits that are no number, so that whoever reads there is found out.
 */
#include "attention.h"
#include "compare.h"

#include <math.h>
#include <stdlib.h>

enum { MOST_SEQUENCES = 3 };

typedef struct shape {
    int32_t n_head_kv, group, head_dim, window;
    float softcap;
    int32_t n_sequences;
    struct {
        int32_t n_past, n_tokens;
    } sequences[MOST_SEQUENCES];
} shape;

typedef struct job {
    pl_attention_args args;
    void *scratch;
    atomic_int counters[2];
} job;

static void run(void *context, const pl_member *member) {
    job *j = context;
    pl_attention_run(&j->args, j->scratch, j->counters, member);
}

/* One token and head of a sequence: softmax of its scores, times V. */
static void expect(const pl_attention_args *a, const pl_sequence *s, int32_t token, int32_t head, double *out) {
    const pl_kv *kv = a->kv;
    const int32_t head_dim = kv->head_dim, head_kv = head / (a->n_head / kv->n_head_kv), last = s->n_past + token;
    const int32_t first = a->window ? PL_MAX(0, last - a->window + 1) : 0;
    const float *q = a->q + ((int64_t)(s->first + token) * a->n_head + head) * head_dim;
    double *scores = malloc(sizeof *scores * (size_t)(last + 1)), largest = -INFINITY, sum = 0;
    float x[PL_KV_MOST_HEAD_DIM];
    for (int32_t t = first; t <= last; t++) {
        pl_kv_get_key(kv->key_type, head_dim, pl_kv_keys(kv, a->layer, s->blocks[t / PL_BLOCK_TOKENS], head_kv),
                      t % PL_BLOCK_TOKENS, x);
        scores[t] = 0;
        for (int32_t d = 0; d < head_dim; d++) {
            scores[t] += (double)q[d] * x[d];
        }
        scores[t] = a->softcap != 0 ? a->softcap * tanh(scores[t] / a->softcap) : scores[t];
        largest = fmax(largest, scores[t]);
    }
    for (int32_t d = 0; d < head_dim; d++) {
        out[d] = 0;
    }
    for (int32_t t = first; t <= last; t++) {
        const double p = exp(scores[t] - largest);
        pl_kv_get_value(kv->value_type, head_dim, pl_kv_values(kv, a->layer, s->blocks[t / PL_BLOCK_TOKENS], head_kv),
                        t % PL_BLOCK_TOKENS, x);
        sum += p;
        for (int32_t d = 0; d < head_dim; d++) {
            out[d] += p * x[d];
        }
    }
    for (int32_t d = 0; d < head_dim; d++) {
        out[d] /= sum;
    }
    free(scores);
}

static void fill(pl_kv *kv, const pl_sequence *s) {
    float *x = malloc(sizeof *x * (size_t)kv->head_dim);
    for (int32_t position = 0; position < s->n_past + s->n_tokens; position++) {
        const int32_t block = s->blocks[position / PL_BLOCK_TOKENS], at = position % PL_BLOCK_TOKENS;
        for (int32_t head = 0; head < kv->n_head_kv; head++) {
            for (int32_t which = 0; which < 2; which++) {
                for (int32_t d = 0; d < kv->head_dim; d++) {
                    x[d] = random_float();
                }
                if (which) {
                    pl_kv_put_value(kv, pl_kv_values(kv, 1, block, head), at, x);
                } else {
                    pl_kv_put_key(kv, pl_kv_keys(kv, 1, block, head), at, x);
                }
            }
        }
    }
    free(x);
}

static void compare(const pl_cpu_set *set, const shape *c, int32_t key_type, int32_t value_type, pl_pool *pool) {
    pl_sequence sequences[MOST_SEQUENCES];
    int32_t n_tokens = 0, n_blocks = 1, most_tokens = 0;
    bool is_long = false;
    for (int32_t i = 0; i < c->n_sequences; i++) {
        n_blocks += (c->sequences[i].n_past + c->sequences[i].n_tokens - 1) / PL_BLOCK_TOKENS + 1;
    }
    int32_t *blocks = malloc(sizeof *blocks * (size_t)n_blocks), next = n_blocks;
    for (int32_t i = 0, used = 0; i < c->n_sequences; i++) {
        sequences[i] = (pl_sequence){n_tokens, c->sequences[i].n_tokens, c->sequences[i].n_past, 0, blocks + used};
        sequences[i].n_blocks = (sequences[i].n_past + sequences[i].n_tokens - 1) / PL_BLOCK_TOKENS + 1;
        for (int32_t j = 0; j < sequences[i].n_blocks; j++) {
            blocks[used++] = --next; /* descending: in no order that could be taken for granted */
        }
        n_tokens += sequences[i].n_tokens;
        most_tokens = PL_MAX(most_tokens, sequences[i].n_tokens);
        is_long |= sequences[i].n_past + sequences[i].n_tokens > 512;
    }
    const int32_t n_head = c->n_head_kv * c->group;
    const int64_t width = (int64_t)n_head * c->head_dim;
    pl_kv *kv = pl_kv_new(2, n_blocks, c->n_head_kv, c->head_dim, key_type, value_type, NULL);
    memset(kv->keys, 0xff, (size_t)kv->bytes);
    for (int32_t i = 0; i < c->n_sequences; i++) {
        fill(kv, &sequences[i]);
    }
    float *q = malloc(sizeof *q * (size_t)(width * n_tokens)), *out = malloc(sizeof *out * (size_t)(width * n_tokens + 1));
    for (int64_t i = 0; i < width * n_tokens; i++) {
        q[i] = random_float() * 8 / sqrtf((float)c->head_dim); /* scores of some units */
    }
    out[width * n_tokens] = -7;
    job j = {.args = {set->attention, kv, 1, n_head, c->window, c->softcap, sequences, c->n_sequences, n_tokens, q, out}};
    j.scratch = pl_alloc((size_t)pl_attention_scratch_bytes(n_head, c->n_head_kv, c->head_dim, n_blocks, pl_pool_size(pool)),
                         NULL);
    pl_pool_run(pool, 0, run, &j);
    const pl_attention_kernels *k = set->attention;
    const bool bytes = k != &pl_attention_scalar && key_type >= PL_KV_Q8_0 && most_tokens < k->widen_keys_from[key_type];
    const bool halves = key_type == PL_KV_F16 || value_type == PL_KV_F16;
    const bool wide = is_long && most_tokens >= k->widen_values_from[value_type];
    /* Pairs of bfloat16, as which halves are multiplied, and quantized V in long contexts, keep 8 bits; q becomes bytes where keys
     * are. */
    const float tolerance = bytes ? 3e-2f : k->wide_type == PL_KV_PAIRS && (halves || wide) ? 2e-2f : 1e-5f;
    double *expected = malloc(sizeof *expected * (size_t)c->head_dim);
    for (int32_t i = 0; i < c->n_sequences; i++) {
        for (int32_t t = 0; t < sequences[i].n_tokens; t++) {
            for (int32_t head = 0; head < n_head; head++) {
                expect(&j.args, &sequences[i], t, head, expected);
                const float *got = out + (sequences[i].first + t) * width + (int64_t)head * c->head_dim;
                for (int32_t d = 0; d < c->head_dim; d++) {
                    if (!(fabs((double)got[d] - expected[d]) <= (double)tolerance)) {
                        differ(set->name, "attention", c->head_dim * 100 + key_type * 10 + value_type, sequences[i].n_past + t);
                        d = c->head_dim;
                    }
                }
            }
        }
    }
    if (out[width * n_tokens] != -7) {
        differ(set->name, "what lies behind attention's result", c->head_dim, n_tokens);
    }
    free(expected);
    free(out);
    free(q);
    free(blocks);
    pl_free(j.scratch);
    pl_kv_free(kv);
}

void compare_attention(const pl_cpu_set *set) {
    static const shape shapes[] = {
        {2, 3, 64, 0, 0, 1, {{0, 1}}},
        {2, 3, 64, 0, 0, 3, {{31, 1}, {32, 2}, {127, 34}}},
        {1, 4, 32, 0, 0, 3, {{0, 70}, {500, 3}, {5, 33}}},
        {1, 1, 32, 20, 0, 2, {{700, 1}, {60, 40}}},
        {1, 2, 96, 33, 5, 2, {{1200, 4}, {0, 65}}},
        {1, 8, 64, 1, 0, 2, {{40, 1}, {3, 35}}},
        {1, 16, 32, 0, 30, 2, {{600, 1}, {130, 37}}},
        {1, 5, 16, 0, 0, 2, {{63, 1}, {96, 33}}},
        {1, 7, 20, 0, 0, 2, {{530, 2}, {17, 48}}},
        {1, 3, 7, 40, 0, 2, {{95, 1}, {64, 36}}},
        {1, 2, 256, 0, 0, 2, {{130, 1}, {200, 34}}},
        {1, 200, 33, 0, 0, 1, {{33, 2}}},
        /* ... a lone sequence, whose chunks the threads share */
        {3, 3, 64, 0, 0, 1, {{2100, 1}}},
        {2, 4, 32, 900, 0, 1, {{3300, 3}}},
        /* ... and far enough into a context for quantized V of prompts to be read as wide_type */
        {1, 3, 64, 0, 0, 2, {{512, 34}, {545, 33}}},
        {1, 7, 20, 0, 0, 1, {{530, 48}}},
        {1, 5, 7, 40, 0, 1, {{600, 37}}},
        {1, 2, 96, 33, 5, 2, {{575, 1}, {640, 65}}},
        {1, 1, 256, 0, 0, 1, {{512, 33}}},
    };
    pl_pool *pool = pl_pool_new(3, NULL);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const bool groups = shapes[i].head_dim % PL_KV_GROUP == 0;
        for (int32_t key_type = PL_KV_F16; key_type <= (groups ? PL_KV_Q4_0 : PL_KV_F32); key_type++) {
            for (int32_t value_type = PL_KV_F16; value_type <= (groups ? PL_KV_Q4_0 : PL_KV_F32); value_type++) {
                compare(set, &shapes[i], key_type, value_type, (key_type + value_type) % 2 ? NULL : pool);
            }
        }
    }
    pl_pool_free(pool);
}

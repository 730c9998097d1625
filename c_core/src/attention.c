/* attention.c - the division of attention's work: see attention.h. */
#include "attention.h"

#include <math.h>

enum {
    TILE_ROWS = 48,       /* rows of one item: enough to pay for widening a block's halves once */
    WIDEN_FROM_ROWS = 12, /* below that, halves are widened on the way into the registers */
    CHUNK_BLOCKS = 16,    /* blocks of one item of a split context */
    SPLIT_TOKENS = 4,     /* only sequences with so few new tokens are split */
    ITEMS_PER_THREAD = 4, /* ... and only when there are fewer (sequence, head) pairs than this a thread */
    LANES = 16,           /* floats of a widest register: what rows are padded to */
};

/* Memory of one member, and of the parts of split contexts. */
typedef struct layout {
    int64_t padded_dim;  /* head_dim rounded up, so that rows stay aligned */
    int64_t member_floats;
    int64_t part_rows;   /* how many parts there is room for */
} layout;

static layout lay_out(int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t max_context, int32_t n_threads) {
    layout l = {.padded_dim = pl_round_up(head_dim, LANES)};
    const int64_t rows = PL_MAX(TILE_ROWS, n_head / n_head_kv);
    const int64_t block = pl_round_up((int64_t)head_dim * PL_BLOCK_TOKENS, LANES);
    l.member_floats = 2 * block + rows * l.padded_dim + 2 * pl_round_up(rows, LANES);
    const int64_t chunks = max_context / PL_BLOCK_TOKENS / CHUNK_BLOCKS + 2;
    l.part_rows = (int64_t)ITEMS_PER_THREAD * n_threads * (n_head / n_head_kv) * SPLIT_TOKENS * chunks;
    return l;
}

int64_t pl_attention_scratch_bytes(int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t max_context, int32_t n_threads) {
    const layout l = lay_out(n_head, n_head_kv, head_dim, max_context, n_threads);
    return 4 * (n_threads * l.member_floats + l.part_rows * (l.padded_dim + LANES));
}

/* How one sequence is cut into items; the same for every member, since it follows from the arguments alone. */
typedef struct cut {
    int32_t tile_tokens, n_tiles;
    int32_t first_block, n_chunks; /* n_chunks is 1 for a context that is not split */
} cut;

static cut cut_sequence(const pl_attention_args *a, const pl_sequence *s, bool may_split) {
    const int32_t group = a->n_head / a->kv->n_head_kv;
    cut c = {.n_chunks = 1};
    c.tile_tokens = PL_MAX(1, TILE_ROWS / group);
    c.n_tiles = (s->n_tokens + c.tile_tokens - 1) / c.tile_tokens;
    if (a->window) {
        c.first_block = PL_MAX(0, s->n_past - a->window + 1) / PL_BLOCK_TOKENS;
    }
    if (may_split && s->n_tokens <= SPLIT_TOKENS && c.n_tiles == 1) {
        const int32_t blocks = (s->n_past + s->n_tokens - 1) / PL_BLOCK_TOKENS + 1 - c.first_block;
        c.n_chunks = (blocks + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
    }
    return c;
}

/* Rows of tokens [first, first + n) of a sequence and one head, over blocks [from_block, to_block): into rows->max, sum, total. */
static void attend(const pl_attention_args *a, const pl_sequence *s, int32_t head, int32_t first, int32_t n, int32_t from_block,
                   int32_t to_block, pl_attention_rows *rows, float *wide_keys, float *wide_values) {
    enum { MOST_ROWS = PL_MAX((int)TILE_ROWS, (int)PL_MOST_HEADS_PER_GROUP) };
    const pl_kv *kv = a->kv;
    const int32_t group = a->n_head / kv->n_head_kv, head_dim = kv->head_dim;
    const int64_t padded = pl_round_up(head_dim, LANES);
    const bool half = kv->type == PL_KV_F16;
    const int32_t first_position = s->n_past + first, last_position = first_position + n - 1;
    from_block = PL_MAX(from_block, a->window ? PL_MAX(0, first_position - a->window + 1) / PL_BLOCK_TOKENS : 0);
    to_block = PL_MIN(to_block, last_position / PL_BLOCK_TOKENS + 1);
    const float *q[MOST_ROWS];
    int32_t from[MOST_ROWS], to[MOST_ROWS];
    rows->n = n * group;
    rows->head_dim = head_dim;
    rows->q = q;
    rows->softcap = a->softcap;
    for (int32_t r = 0; r < rows->n; r++) {
        q[r] = a->q + ((int64_t)(s->first + first + r / group) * a->n_head + head * group + r % group) * head_dim;
        rows->max[r] = -INFINITY;
        rows->sum[r] = 0;
    }
    memset(rows->total, 0, sizeof(float) * (size_t)(rows->n * padded));
    for (int32_t block = from_block; block < to_block; block++) {
        const void *keys = pl_kv_keys(kv, a->layer, s->blocks[block], head);
        const void *values = pl_kv_values(kv, a->layer, s->blocks[block], head);
        const bool widen = half && rows->n >= WIDEN_FROM_ROWS && head_dim % LANES == 0;
        if (widen) {
            a->kernels->widen(keys, (int64_t)head_dim * PL_BLOCK_TOKENS, wide_keys);
            a->kernels->widen(values, (int64_t)head_dim * PL_BLOCK_TOKENS, wide_values);
            keys = wide_keys;
            values = wide_values;
        }
        const int32_t base = block * PL_BLOCK_TOKENS;
        for (int32_t r = 0; r < rows->n; r++) {
            const int32_t position = first_position + r / group;
            from[r] = a->window ? PL_MAX(0, position - a->window + 1 - base) : 0;
            to[r] = PL_MIN(PL_BLOCK_TOKENS, position + 1 - base);
        }
        a->kernels->block(rows, keys, values, half && !widen, from, to);
    }
}

static void write_rows(const pl_attention_args *a, const pl_sequence *s, int32_t head, int32_t first, const pl_attention_rows *rows) {
    const int32_t group = a->n_head / a->kv->n_head_kv, head_dim = a->kv->head_dim;
    const int64_t padded = pl_round_up(head_dim, LANES);
    for (int32_t r = 0; r < rows->n; r++) {
        float *y = a->out + ((int64_t)(s->first + first + r / group) * a->n_head + head * group + r % group) * head_dim;
        const float scale = 1.0f / rows->sum[r];
        for (int32_t d = 0; d < head_dim; d++) {
            y[d] = rows->total[r * padded + d] * scale;
        }
    }
}

/* Joins the parts of a split context: each part is LANES floats (maximum, sum) and then its weighted sum of V. */
static void join(const pl_attention_args *a, const pl_sequence *s, int32_t head, int32_t row, int32_t n_chunks, int64_t apart,
                 const float *part) {
    const int32_t group = a->n_head / a->kv->n_head_kv, head_dim = a->kv->head_dim;
    float *y = a->out + ((int64_t)(s->first + row / group) * a->n_head + head * group + row % group) * head_dim;
    float largest = -INFINITY, sum = 0;
    for (int32_t c = 0; c < n_chunks; c++) {
        largest = fmaxf(largest, part[c * apart]);
    }
    memset(y, 0, sizeof(float) * (size_t)head_dim);
    for (int32_t c = 0; c < n_chunks; c++) {
        const float *p = part + c * apart;
        if (p[1] > 0) {
            const float weight = expf(p[0] - largest);
            sum += weight * p[1];
            for (int32_t d = 0; d < head_dim; d++) {
                y[d] += weight * p[LANES + d];
            }
        }
    }
    for (int32_t d = 0; d < head_dim; d++) {
        y[d] /= sum;
    }
}

void pl_attention_run(const pl_attention_args *a, void *scratch, atomic_int counters[2], const pl_member *member) {
    const pl_kv *kv = a->kv;
    const int32_t group = a->n_head / kv->n_head_kv;
    const layout l = lay_out(a->n_head, kv->n_head_kv, kv->head_dim, kv->n_blocks * PL_BLOCK_TOKENS, member->count);
    float *parts = scratch, *own = parts + l.part_rows * (l.padded_dim + LANES) + member->index * l.member_floats;
    const int64_t most_rows = PL_MAX(TILE_ROWS, group), part_floats = l.padded_dim + LANES;
    const int64_t block_floats = pl_round_up((int64_t)kv->head_dim * PL_BLOCK_TOKENS, LANES);
    float *wide_keys = own, *wide_values = wide_keys + block_floats, *total = wide_values + block_floats;
    pl_attention_rows rows = {.total = total, .max = total + most_rows * l.padded_dim};
    rows.sum = rows.max + pl_round_up(most_rows, LANES);

    const bool may_split = (int64_t)a->n_sequences * kv->n_head_kv < (int64_t)ITEMS_PER_THREAD * member->count &&
                           member->count > 1;
    int32_t wanted = pl_claim(&counters[0]), item = 0;
    int64_t part = 0; /* where the sequence's parts begin: [head][chunk][row] */
    for (int32_t i = 0; i < a->n_sequences; i++) {
        const pl_sequence *s = &a->sequences[i];
        const cut c = cut_sequence(a, s, may_split);
        const int32_t items = c.n_chunks * c.n_tiles * kv->n_head_kv;
        for (; wanted < item + items; wanted = pl_claim(&counters[0])) {
            const int32_t head = (wanted - item) % kv->n_head_kv, which = (wanted - item) / kv->n_head_kv;
            if (c.n_chunks == 1) { /* later tiles see more: the longest first */
                const int32_t first = (c.n_tiles - 1 - which) * c.tile_tokens;
                attend(a, s, head, first, PL_MIN(c.tile_tokens, s->n_tokens - first), 0, INT32_MAX, &rows, wide_keys, wide_values);
                write_rows(a, s, head, first, &rows);
                continue;
            }
            const int32_t from = c.first_block + which * CHUNK_BLOCKS;
            attend(a, s, head, 0, s->n_tokens, from, from + CHUNK_BLOCKS, &rows, wide_keys, wide_values);
            for (int32_t r = 0; r < rows.n; r++) {
                float *p = parts + (part + ((int64_t)head * c.n_chunks + which) * rows.n + r) * part_floats;
                p[0] = rows.max[r];
                p[1] = rows.sum[r];
                memcpy(p + LANES, rows.total + r * l.padded_dim, sizeof(float) * (size_t)kv->head_dim);
            }
        }
        item += items;
        part += c.n_chunks > 1 ? (int64_t)items * s->n_tokens * group : 0;
    }
    if (part == 0) {
        return;
    }
    pl_barrier(member);
    part = 0;
    item = 0;
    for (int32_t i = 0; i < a->n_sequences; i++) {
        const pl_sequence *s = &a->sequences[i];
        const cut c = cut_sequence(a, s, may_split);
        const int32_t n_rows = s->n_tokens * group;
        for (int32_t head = 0; c.n_chunks > 1 && head < kv->n_head_kv; head++) {
            for (int32_t r = 0; r < n_rows; r++) {
                if (item++ % member->count == member->index) {
                    join(a, s, head, r, c.n_chunks, n_rows * part_floats,
                         parts + (part + (int64_t)head * c.n_chunks * n_rows + r) * part_floats);
                }
            }
        }
        part += c.n_chunks > 1 ? (int64_t)c.n_chunks * kv->n_head_kv * n_rows : 0;
    }
}

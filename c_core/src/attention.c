/* attention.c - the division of attention's work: see attention.h. */
#include "attention.h"

#include <math.h>

enum {
    MOST_TILE_ROWS = 192,   /* rows of one item: enough to pay for widening blocks once */
    LEAST_TILE_ROWS = 48,   /* ... and no fewer, when there is not much to do */
    CHUNK_BLOCKS = 16,      /* blocks of one item of a split context */
    SPLIT_TOKENS = 4,       /* only sequences with so few new tokens are split */
    ITEMS_PER_THREAD = 4,   /* ... and only when there are fewer (sequence, head) pairs than this a thread */
};

/* Memory of one member, and of the parts of split contexts. */
typedef struct layout {
    int64_t width;     /* floats of a row */
    int64_t most_rows; /* of an item */
    int64_t block_floats, member_floats;
    int64_t part_rows; /* how many parts there is room for */
} layout;

static layout lay_out(int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t max_blocks, int32_t n_threads) {
    const int32_t group = n_head / n_head_kv;
    layout l = {.width = pl_kv_width(head_dim), .most_rows = PL_MAX(MOST_TILE_ROWS, group)};
    l.block_floats = l.width * PL_BLOCK_TOKENS;
    l.member_floats = 2 * PL_SPAN_BLOCKS * l.block_floats + l.most_rows * (2 * l.width + PL_LANES) +
                      pl_round_up(l.most_rows, PL_LANES);
    const int64_t chunks = max_blocks / CHUNK_BLOCKS + 2;
    l.part_rows = (int64_t)ITEMS_PER_THREAD * n_threads * group * SPLIT_TOKENS * chunks;
    return l;
}

int64_t pl_attention_scratch_bytes(int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t max_blocks, int32_t n_threads) {
    const layout l = lay_out(n_head, n_head_kv, head_dim, max_blocks, n_threads);
    return 4 * (n_threads * l.member_floats + l.part_rows * (l.width + PL_LANES));
}

/* A member's memory. */
typedef struct workspace {
    pl_attention_rows rows;
    float *wide_keys, *wide_values; /* of a span */
} workspace;

static workspace workspace_at(float *p, const layout *l) {
    workspace w = {.wide_keys = p, .wide_values = p + PL_SPAN_BLOCKS * l->block_floats};
    w.rows.total = w.wide_values + PL_SPAN_BLOCKS * l->block_floats;
    w.rows.packed_q = w.rows.total + l->most_rows * l->width;
    w.rows.sum = w.rows.packed_q + l->most_rows * l->width;
    w.rows.max = w.rows.sum + l->most_rows * PL_LANES;
    return w;
}

/* How one sequence is cut into items; the same for every member, since it follows from the arguments alone. */
typedef struct cut {
    int32_t tile_tokens, n_tiles;
    int32_t first_block, n_chunks; /* n_chunks is 1 for a context that is not split */
} cut;

static cut cut_sequence(const pl_attention_args *a, const pl_sequence *s, int32_t n_threads) {
    const int32_t n_head_kv = a->kv->n_head_kv, group = a->n_head / n_head_kv;
    cut c = {.n_chunks = 1};
    for (int32_t rows = MOST_TILE_ROWS; rows >= LEAST_TILE_ROWS; rows /= 2) {
        c.tile_tokens = PL_MAX(1, rows / group);
        c.n_tiles = (s->n_tokens + c.tile_tokens - 1) / c.tile_tokens;
        if ((int64_t)c.n_tiles * n_head_kv >= (int64_t)ITEMS_PER_THREAD * n_threads) {
            break;
        }
    }
    if (a->window) {
        c.first_block = PL_MAX(0, s->n_past - a->window + 1) / PL_BLOCK_TOKENS;
    }
    const bool may_split = n_threads > 1 && (int64_t)a->n_sequences * n_head_kv < (int64_t)ITEMS_PER_THREAD * n_threads;
    if (may_split && s->n_tokens <= SPLIT_TOKENS && c.n_tiles == 1) {
        const int32_t blocks = (s->n_past + s->n_tokens - 1) / PL_BLOCK_TOKENS + 1 - c.first_block;
        c.n_chunks = (blocks + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
    }
    return c;
}

static void begin(const pl_attention_args *a, const pl_sequence *s, int32_t head, int32_t first, int32_t n, int32_t key_type,
                  const float **q, pl_attention_rows *rows) {
    const int32_t group = a->n_head / a->kv->n_head_kv, head_dim = a->kv->head_dim;
    rows->n = n * group;
    rows->head_dim = head_dim;
    rows->q = q;
    rows->softcap = a->softcap;
    for (int32_t r = 0; r < rows->n; r++) {
        q[r] = a->q + ((int64_t)(s->first + first + r / group) * a->n_head + head * group + r % group) * head_dim;
        rows->max[r] = -INFINITY;
    }
    memset(rows->sum, 0, sizeof(float) * (size_t)rows->n * PL_LANES);
    memset(rows->total, 0, sizeof(float) * (size_t)(rows->n * pl_kv_width(head_dim)));
    a->kernels->begin(rows, key_type);
}

/* Rows of tokens [first, first + n) of a sequence and one head, over blocks [from_block, to_block): into w->rows. */
static void attend(const pl_attention_args *a, const pl_sequence *s, int32_t head, int32_t first, int32_t n, int32_t from_block,
                   int32_t to_block, workspace *w) {
    enum { MOST_ROWS = PL_MAX((int)MOST_TILE_ROWS, (int)PL_MOST_HEADS_PER_GROUP) };
    const pl_kv *kv = a->kv;
    const pl_attention_kernels *k = a->kernels;
    const int32_t group = a->n_head / kv->n_head_kv, head_dim = kv->head_dim;
    const int64_t block_floats = pl_kv_width(head_dim) * PL_BLOCK_TOKENS;
    const int32_t first_position = s->n_past + first, last_position = first_position + n - 1;
    from_block = PL_MAX(from_block, a->window ? PL_MAX(0, first_position - a->window + 1) / PL_BLOCK_TOKENS : 0);
    to_block = PL_MIN(to_block, last_position / PL_BLOCK_TOKENS + 1);
    const float *q[MOST_ROWS];
    int32_t from[MOST_ROWS], to[MOST_ROWS];
    /* Rounding to fewer bits makes a token's result depend on how many come with it. So does the joining of split contexts;
     * in the shorter ones, in which most answers are written, nothing does. */
    const bool may_widen = k->wide_type == PL_KV_F32 || first_position >= CHUNK_BLOCKS * PL_BLOCK_TOKENS;
    const bool widen_keys = may_widen && s->n_tokens >= k->widen_keys_from[kv->key_type];
    const bool widen_values = may_widen && s->n_tokens >= k->widen_values_from[kv->value_type];
    pl_attention_span span = {.key_type = widen_keys ? k->wide_type : kv->key_type,
                              .value_type = widen_values ? k->wide_type : kv->value_type, .from = from, .to = to};
    begin(a, s, head, first, n, span.key_type, q, &w->rows);
    for (int32_t block = from_block, n_blocks; block < to_block; block += n_blocks) {
        n_blocks = PL_MIN(PL_SPAN_BLOCKS - block % PL_SPAN_BLOCKS, to_block - block); /* the same spans wherever a window begins */
        const int32_t base = block * PL_BLOCK_TOKENS;
        for (int32_t i = 0; i < n_blocks; i++) {
            const int32_t this = s->blocks[block + i], next = s->blocks[PL_MIN(block + i + 2, to_block - 1)];
            span.keys[i] = pl_kv_keys(kv, a->layer, this, head);
            span.values[i] = pl_kv_values(kv, a->layer, this, head);
            span.next_keys[i] = pl_kv_keys(kv, a->layer, next, head);
            span.next_values[i] = pl_kv_values(kv, a->layer, next, head);
            if (widen_keys) {
                k->widen_keys(kv->key_type, head_dim, span.keys[i], w->wide_keys + i * block_floats);
                span.keys[i] = w->wide_keys + i * block_floats;
            }
            if (widen_values) {
                k->widen_values(kv->value_type, head_dim, span.values[i],
                                PL_MIN(PL_BLOCK_TOKENS, last_position + 1 - base - i * PL_BLOCK_TOKENS),
                                w->wide_values + i * block_floats);
                span.values[i] = w->wide_values + i * block_floats;
            }
        }
        for (int32_t r = 0; r < w->rows.n; r++) {
            const int32_t position = first_position + r / group;
            from[r] = a->window ? PL_MAX(0, position - a->window + 1 - base) : 0;
            to[r] = PL_MIN(n_blocks * PL_BLOCK_TOKENS, position + 1 - base);
        }
        k->span(&w->rows, &span);
    }
}

static float sum_of(const float *lanes) {
    float sum = 0;
    for (int32_t i = 0; i < PL_LANES; i++) {
        sum += lanes[i];
    }
    return sum;
}

static void write_rows(const pl_attention_args *a, const pl_sequence *s, int32_t head, int32_t first, const pl_attention_rows *rows) {
    const int32_t group = a->n_head / a->kv->n_head_kv, head_dim = a->kv->head_dim;
    const int64_t width = pl_kv_width(head_dim);
    for (int32_t r = 0; r < rows->n; r++) {
        float *y = a->out + ((int64_t)(s->first + first + r / group) * a->n_head + head * group + r % group) * head_dim;
        const float scale = 1.0f / sum_of(rows->sum + r * PL_LANES);
        for (int32_t d = 0; d < head_dim; d++) {
            y[d] = rows->total[r * width + d] * scale;
        }
    }
}

/* Joins the parts of a split context: each part is PL_LANES floats (maximum, sum) and then its weighted sum of V. */
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
        if (p[1] != 0) { /* a row may see nothing of a chunk; what is no number goes on as such */
            const float weight = expf(p[0] - largest);
            sum += weight * p[1];
            for (int32_t d = 0; d < head_dim; d++) {
                y[d] += weight * p[PL_LANES + d];
            }
        }
    }
    for (int32_t d = 0; d < head_dim; d++) {
        y[d] /= sum;
    }
}

bool pl_attention_keeps_heads(const pl_attention_args *a, int32_t n_threads) {
    return a->n_tokens == 1 && cut_sequence(a, a->sequences, n_threads).n_chunks == 1;
}

void pl_attention_run(const pl_attention_args *a, void *scratch, atomic_int counters[2], const pl_member *member) {
    const pl_kv *kv = a->kv;
    const int32_t group = a->n_head / kv->n_head_kv;
    const layout l = lay_out(a->n_head, kv->n_head_kv, kv->head_dim, kv->n_blocks, member->count);
    const int64_t part_floats = l.width + PL_LANES;
    float *parts = scratch;
    workspace w = workspace_at(parts + l.part_rows * part_floats + member->index * l.member_floats, &l);

    const bool keeps_heads = pl_attention_keeps_heads(a, member->count);
    int32_t wanted = keeps_heads ? member->index : pl_claim(&counters[0]), item = 0;
    int64_t part = 0; /* where the sequence's parts begin: [head][chunk][row] */
    for (int32_t i = 0; i < a->n_sequences; i++) {
        const pl_sequence *s = &a->sequences[i];
        const cut c = cut_sequence(a, s, member->count);
        const int32_t items = c.n_chunks * c.n_tiles * kv->n_head_kv;
        for (; wanted < item + items; wanted = keeps_heads ? wanted + member->count : pl_claim(&counters[0])) {
            const int32_t head = (wanted - item) % kv->n_head_kv, which = (wanted - item) / kv->n_head_kv;
            if (c.n_chunks == 1) { /* later tiles see more: the longest first */
                const int32_t first = (c.n_tiles - 1 - which) * c.tile_tokens;
                attend(a, s, head, first, PL_MIN(c.tile_tokens, s->n_tokens - first), 0, INT32_MAX, &w);
                write_rows(a, s, head, first, &w.rows);
                continue;
            }
            const int32_t from = c.first_block + which * CHUNK_BLOCKS;
            attend(a, s, head, 0, s->n_tokens, from, from + CHUNK_BLOCKS, &w);
            for (int32_t r = 0; r < w.rows.n; r++) {
                float *p = parts + (part + ((int64_t)head * c.n_chunks + which) * w.rows.n + r) * part_floats;
                p[0] = w.rows.max[r];
                p[1] = sum_of(w.rows.sum + r * PL_LANES);
                memcpy(p + PL_LANES, w.rows.total + r * l.width, sizeof(float) * (size_t)kv->head_dim);
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
        const cut c = cut_sequence(a, s, member->count);
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

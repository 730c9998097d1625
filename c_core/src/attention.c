/* attention.c - the division of attention's work: see attention.h. */
#include "attention.h"

#include <math.h>

enum {
    MOST_TILE_ROWS = 192,   /* rows of one item: enough to pay for widening blocks once */
    LEAST_TILE_ROWS = 48,   /* ... and no fewer, when there is not much to do */
    CHUNK_BLOCKS = 16,      /* blocks that are summed by themselves */
    ITEMS_PER_THREAD = 4,   /* chunks become items when there are fewer (sequence, head) pairs than this a thread */
    PART_TOKENS = 16,       /* ... and there is room for their parts: for so many tokens of a context that fills the store */
};

/* Memory of one member, and of the parts of split contexts. */
typedef struct layout {
    int64_t width;     /* floats of a row */
    int64_t most_rows; /* of an item */
    int64_t block_floats, member_floats, part_floats;
} layout;

/* Floats of what n rows sum up: see rows_of. */
static int64_t sums_floats(int64_t n, int64_t width) { return n * (width + PL_LANES) + pl_round_up(n, PL_LANES); }

static layout lay_out(int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t max_blocks) {
    const int32_t group = n_head / n_head_kv;
    layout l = {.width = pl_kv_width(head_dim), .most_rows = PL_MAX(MOST_TILE_ROWS, group)};
    l.block_floats = l.width * PL_BLOCK_TOKENS;
    l.member_floats = 2 * PL_SPAN_BLOCKS * l.block_floats + l.most_rows * l.width + 2 * sums_floats(l.most_rows, l.width);
    const int64_t chunks = (max_blocks + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
    l.part_floats = chunks * n_head_kv * sums_floats(PART_TOKENS * group, l.width);
    return l;
}

int64_t pl_attention_scratch_bytes(int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t max_blocks, int32_t n_threads) {
    const layout l = lay_out(n_head, n_head_kv, head_dim, max_blocks);
    return 4 * (n_threads * l.member_floats + l.part_floats);
}

/* A member's memory. */
typedef struct workspace {
    float *wide_keys, *wide_values; /* of a span */
    float *packed_q, *whole, *part; /* of an item's rows: q, the sums of all chunks, and those of one */
} workspace;

static workspace workspace_at(float *p, const layout *l) {
    workspace w = {.wide_keys = p, .wide_values = p + PL_SPAN_BLOCKS * l->block_floats};
    w.packed_q = w.wide_values + PL_SPAN_BLOCKS * l->block_floats;
    w.whole = w.packed_q + l->most_rows * l->width;
    w.part = w.whole + sums_floats(l->most_rows, l->width);
    return w;
}

/* Chunks [first, last). */
typedef struct chunks {
    int32_t first, last;
} chunks;

/* What a run of tokens sees. */
static chunks chunks_of(const pl_attention_args *a, int32_t first_position, int32_t last_position) {
    enum { TOKENS = CHUNK_BLOCKS * PL_BLOCK_TOKENS };
    return (chunks){a->window ? PL_MAX(0, first_position - a->window + 1) / TOKENS : 0, last_position / TOKENS + 1};
}

/* How one sequence is cut into items; the same for every member, since it follows from the arguments alone. */
typedef struct cut {
    int32_t tile_tokens, n_tiles;
    chunks chunks;
    bool split;          /* into chunks: one tile */
    int64_t part_floats; /* of all parts of a split sequence */
} cut;

/* `room`: floats that are left for parts. */
static cut cut_sequence(const pl_attention_args *a, const pl_sequence *s, int32_t n_threads, int64_t room) {
    const int32_t n_head_kv = a->kv->n_head_kv, group = a->n_head / n_head_kv;
    cut c = {.chunks = chunks_of(a, s->n_past, s->n_past + s->n_tokens - 1)};
    for (int32_t rows = MOST_TILE_ROWS; rows >= LEAST_TILE_ROWS; rows /= 2) {
        c.tile_tokens = PL_MAX(1, rows / group);
        c.n_tiles = (s->n_tokens + c.tile_tokens - 1) / c.tile_tokens;
        if ((int64_t)c.n_tiles * n_head_kv >= (int64_t)ITEMS_PER_THREAD * n_threads) {
            break;
        }
    }
    const int32_t n_chunks = c.chunks.last - c.chunks.first;
    const int64_t part_floats = n_chunks * n_head_kv * sums_floats((int64_t)s->n_tokens * group, pl_kv_width(a->kv->head_dim));
    const bool few = n_threads > 1 && (int64_t)a->n_sequences * n_head_kv < (int64_t)ITEMS_PER_THREAD * n_threads;
    c.split = few && c.n_tiles == 1 && n_chunks > 1 && part_floats <= room;
    c.part_floats = c.split ? part_floats : 0;
    return c;
}

/* Tokens [first, first + n) of a sequence, as rows of one head, over some chunks. */
typedef struct tile {
    const pl_sequence *s;
    int32_t head, first, n;
    chunks chunks;
} tile;

static int32_t position_of(const tile *t, int32_t token) { return t->s->n_past + t->first + token; }

/* Its rows, whose sums are at `sums`. */
static pl_attention_rows rows_of(const pl_attention_args *a, const tile *t, float *sums) {
    pl_attention_rows rows = {.n = t->n * (a->n_head / a->kv->n_head_kv), .head_dim = a->kv->head_dim, .softcap = a->softcap};
    rows.total = sums;
    rows.sum = rows.total + rows.n * pl_kv_width(rows.head_dim);
    rows.exponent = rows.sum + rows.n * PL_LANES;
    return rows;
}

static void clear_sums(const pl_attention_rows *rows) {
    memset(rows->sum, 0, sizeof(float) * (size_t)rows->n * PL_LANES);
    memset(rows->total, 0, sizeof(float) * (size_t)(rows->n * pl_kv_width(rows->head_dim)));
}

/* One chunk, by itself: into the rows' sums, whose exponents begin as they are. */
static void attend_chunk(const pl_attention_args *a, const tile *t, int32_t chunk, const workspace *w, pl_attention_span *span,
                         pl_attention_rows *rows) {
    enum { MOST_ROWS = PL_MAX((int)MOST_TILE_ROWS, (int)PL_MOST_HEADS_PER_GROUP) };
    const pl_kv *kv = a->kv;
    const pl_attention_kernels *k = a->kernels;
    const int32_t group = a->n_head / kv->n_head_kv, head_dim = kv->head_dim, last_position = position_of(t, t->n - 1);
    const int64_t block_floats = pl_kv_width(head_dim) * PL_BLOCK_TOKENS;
    const int32_t first_seen = a->window ? PL_MAX(0, position_of(t, 0) - a->window + 1) : 0;
    const int32_t from_block = PL_MAX(chunk * CHUNK_BLOCKS, first_seen / PL_BLOCK_TOKENS);
    const int32_t end_block = PL_MIN(t->chunks.last * CHUNK_BLOCKS, last_position / PL_BLOCK_TOKENS + 1); /* of all chunks */
    const int32_t to_block = PL_MIN((chunk + 1) * CHUNK_BLOCKS, end_block);
    const bool widen_keys = span->key_type != kv->key_type, widen_values = span->value_type != kv->value_type;
    int32_t from[MOST_ROWS], to[MOST_ROWS];
    span->from = from;
    span->to = to;
    clear_sums(rows);
    for (int32_t block = from_block, n_blocks; block < to_block; block += n_blocks) {
        n_blocks = PL_MIN(PL_SPAN_BLOCKS - block % PL_SPAN_BLOCKS, to_block - block); /* the same spans wherever a window begins */
        const int32_t base = block * PL_BLOCK_TOKENS;
        for (int32_t i = 0; i < n_blocks; i++) {
            const int32_t this = t->s->blocks[block + i], next = t->s->blocks[PL_MIN(block + i + 2, end_block - 1)];
            span->keys[i] = pl_kv_keys(kv, a->layer, this, t->head);
            span->values[i] = pl_kv_values(kv, a->layer, this, t->head);
            span->next_keys[i] = pl_kv_keys(kv, a->layer, next, t->head);
            span->next_values[i] = pl_kv_values(kv, a->layer, next, t->head);
            if (widen_keys) {
                k->widen_keys(kv->key_type, head_dim, span->keys[i], w->wide_keys + i * block_floats);
                span->keys[i] = w->wide_keys + i * block_floats;
            }
            if (widen_values) {
                k->widen_values(kv->value_type, head_dim, span->values[i],
                                PL_MIN(PL_BLOCK_TOKENS, last_position + 1 - base - i * PL_BLOCK_TOKENS),
                                w->wide_values + i * block_floats);
                span->values[i] = w->wide_values + i * block_floats;
            }
        }
        for (int32_t r = 0; r < rows->n; r++) {
            const int32_t position = position_of(t, r / group);
            from[r] = a->window ? PL_MAX(0, position - a->window + 1 - base) : 0;
            to[r] = PL_MIN(n_blocks * PL_BLOCK_TOKENS, position + 1 - base);
        }
        k->span(rows, span);
    }
}

/* Adds a chunk's sums to those of the chunks before; rows [from, to) of a tile, but for those that see nothing of it. */
static void join(const pl_attention_args *a, const tile *t, int32_t chunk, int32_t from, int32_t to, pl_attention_rows *whole,
                 const pl_attention_rows *part) {
    const int64_t group = a->n_head / a->kv->n_head_kv;
    const int64_t first = (int64_t)chunk * CHUNK_BLOCKS * PL_BLOCK_TOKENS - position_of(t, 0); /* token at the chunk's start */
    const int64_t end = first + CHUNK_BLOCKS * PL_BLOCK_TOKENS + a->window - 1; /* ... from which on windows begin later */
    from = (int32_t)PL_MAX(from, first * group);
    to = a->window ? (int32_t)PL_MIN(to, end * group) : to;
    if (from < to) {
        a->kernels->join(whole, part, from, to);
    }
}

/*
 * A tile: into the sums at `sums`. Each chunk is summed by itself and then joined with those before it, so that a row's result
 * is the same whoever computes which chunks, and whatever other rows come along. With `apart`, chunks are left to be joined
 * later: each one's sums are so many floats behind those of the one before.
 */
static void attend(const pl_attention_args *a, const tile *t, const workspace *w, float *sums, int64_t apart) {
    enum { MOST_ROWS = PL_MAX((int)MOST_TILE_ROWS, (int)PL_MOST_HEADS_PER_GROUP) };
    const pl_kv *kv = a->kv;
    const pl_attention_kernels *k = a->kernels;
    const int32_t group = a->n_head / kv->n_head_kv, n = t->s->n_tokens;
    /* Quantized V is rounded on its way to pairs, which it is not for few tokens. So that a token's result does not depend on how
     * many come with it in the shorter contexts, in which most answers are written, this is for the longer ones. */
    const bool may_widen_values = k->wide_type == PL_KV_F32 || kv->value_type == PL_KV_F16 ||
                                  t->s->n_past >= CHUNK_BLOCKS * PL_BLOCK_TOKENS; /* of the piece: tiles differ with the threads */
    pl_attention_span span = {
        .key_type = n >= k->widen_keys_from[kv->key_type] ? k->wide_type : kv->key_type,
        .value_type = may_widen_values && n >= k->widen_values_from[kv->value_type] ? k->wide_type : kv->value_type,
    };
    pl_attention_rows whole = rows_of(a, t, sums);
    const float *q[MOST_ROWS];
    for (int32_t r = 0; r < whole.n; r++) {
        q[r] = a->q + ((int64_t)(t->s->first + t->first + r / group) * a->n_head + t->head * group + r % group) * kv->head_dim;
    }
    whole.q = q;
    whole.packed_q = w->packed_q;
    k->begin(&whole, span.key_type);
    for (int32_t r = 0; r < whole.n; r++) {
        whole.exponent[r] = -INFINITY;
    }
    attend_chunk(a, t, t->chunks.first, w, &span, &whole);
    for (int32_t chunk = t->chunks.first + 1; chunk < t->chunks.last; chunk++) {
        pl_attention_rows part = rows_of(a, t, apart ? sums + (chunk - t->chunks.first) * apart : w->part);
        part.q = q;
        part.packed_q = w->packed_q;
        memcpy(part.exponent, whole.exponent, sizeof(float) * (size_t)part.n); /* most likely they will do */
        attend_chunk(a, t, chunk, w, &span, &part);
        if (!apart) {
            join(a, t, chunk, 0, part.n, &whole, &part);
        }
    }
}

static float sum_of(const float *lanes) {
    float sum = 0;
    for (int32_t i = 0; i < PL_LANES; i++) {
        sum += lanes[i];
    }
    return sum;
}

/* Rows [from, to) of a tile. */
static void write_rows(const pl_attention_args *a, const tile *t, int32_t from, int32_t to, const pl_attention_rows *rows) {
    const int32_t group = a->n_head / a->kv->n_head_kv, head_dim = a->kv->head_dim;
    const int64_t width = pl_kv_width(head_dim);
    for (int32_t r = from; r < to; r++) {
        float *y = a->out + ((int64_t)(t->s->first + t->first + r / group) * a->n_head + t->head * group + r % group) * head_dim;
        const float scale = 1.0f / sum_of(rows->sum + r * PL_LANES);
        for (int32_t d = 0; d < head_dim; d++) {
            y[d] = rows->total[r * width + d] * scale;
        }
    }
}

/*
 * The rows of a split sequence and one head that are this member's to finish: their parts, which lie one after another, become
 * one. Rows are shared in the order of the members' own items, so that most parts are where they were made.
 */
static void join_parts(const pl_attention_args *a, const tile *t, float *parts, const pl_member *member) {
    pl_attention_rows whole = rows_of(a, t, parts);
    const int64_t apart = sums_floats(whole.n, pl_kv_width(whole.head_dim)), n_rows = (int64_t)whole.n * a->kv->n_head_kv;
    for (int32_t r = 0; r < whole.n; r++) {
        if (((int64_t)t->head * whole.n + r) * member->count / n_rows == member->index) {
            for (int32_t chunk = t->chunks.first + 1; chunk < t->chunks.last; chunk++) {
                const pl_attention_rows part = rows_of(a, t, parts + (chunk - t->chunks.first) * apart);
                join(a, t, chunk, r, r + 1, &whole, &part);
            }
            write_rows(a, t, r, r + 1, &whole);
        }
    }
}

/* Tile `which` of one head of a sequence that is not split. */
static void run_tile(const pl_attention_args *a, const pl_sequence *s, const cut *c, int32_t head, int32_t which,
                     const workspace *w) {
    tile t = {.s = s, .head = head};
    t.first = (c->n_tiles - 1 - which) * c->tile_tokens; /* later tiles see more: the longest first */
    t.n = PL_MIN(c->tile_tokens, s->n_tokens - t.first);
    t.chunks = chunks_of(a, position_of(&t, 0), position_of(&t, t.n - 1));
    attend(a, &t, w, w->whole, 0);
    const pl_attention_rows rows = rows_of(a, &t, w->whole);
    write_rows(a, &t, 0, rows.n, &rows);
}

/* Items [first, end) of a sequence: chunks, head by head, whose parts are at `parts`, or tiles. */
static void run_items(const pl_attention_args *a, const pl_sequence *s, const cut *c, int32_t first, int32_t end, float *parts,
                      const workspace *w) {
    const int32_t n_head_kv = a->kv->n_head_kv, n_chunks = c->chunks.last - c->chunks.first;
    for (int32_t item = first, n; item < end; item += n) {
        if (!c->split) {
            run_tile(a, s, c, item % n_head_kv, item / n_head_kv, w);
            n = 1;
            continue;
        }
        const int32_t chunk = item % n_chunks;
        n = PL_MIN(n_chunks - chunk, end - item); /* one after another: memory is read as a stream */
        const tile t = {s, item / n_chunks, 0, s->n_tokens, {c->chunks.first + chunk, c->chunks.first + chunk + n}};
        const int64_t apart = c->part_floats / ((int64_t)n_chunks * n_head_kv);
        attend(a, &t, w, parts + item * apart, apart);
    }
}

/* Items [first, end) of all sequences are what a member does next. */
typedef struct share {
    int32_t first, end;
    int32_t own; /* each member's, without asking: those of a lone sequence that is split take equally long */
    bool keeps_heads;
} share;

static share first_share(const pl_attention_args *a, int64_t room, atomic_int *counter, const pl_member *member) {
    share s = {.keeps_heads = pl_attention_keeps_heads(a, member->count)};
    const cut c = cut_sequence(a, a->sequences, member->count, room);
    if (a->n_sequences == 1 && c.split) {
        s.own = (c.chunks.last - c.chunks.first) * a->kv->n_head_kv * 7 / 8 / member->count;
    }
    s.first = s.own ? s.own * member->index : s.keeps_heads ? member->index : pl_claim(counter);
    s.end = s.first + PL_MAX(1, s.own);
    return s;
}

static void next_share(share *s, atomic_int *counter, const pl_member *member) {
    s->first = s->keeps_heads ? s->first + member->count : s->own * member->count + pl_claim(counter);
    s->end = s->first + 1;
}

bool pl_attention_keeps_heads(const pl_attention_args *a, int32_t n_threads) {
    return a->n_tokens == 1 && !cut_sequence(a, a->sequences, n_threads, INT64_MAX).split;
}

void pl_attention_run(const pl_attention_args *a, void *scratch, atomic_int counters[2], const pl_member *member) {
    const pl_kv *kv = a->kv;
    const layout l = lay_out(a->n_head, kv->n_head_kv, kv->head_dim, kv->n_blocks);
    const workspace w = workspace_at((float *)scratch + l.part_floats + member->index * l.member_floats, &l);
    int64_t used = 0; /* floats of the parts of the sequences before: [head][chunk] */

    share wanted = first_share(a, l.part_floats, &counters[0], member);
    int32_t item = 0;
    for (int32_t i = 0; i < a->n_sequences; i++) {
        const cut c = cut_sequence(a, &a->sequences[i], member->count, l.part_floats - used);
        const int32_t items = (c.split ? c.chunks.last - c.chunks.first : c.n_tiles) * kv->n_head_kv;
        for (; wanted.first < item + items; next_share(&wanted, &counters[0], member)) {
            run_items(a, &a->sequences[i], &c, wanted.first - item, wanted.end - item, (float *)scratch + used, &w);
        }
        item += items;
        used += c.part_floats;
    }
    if (used == 0) {
        return;
    }
    pl_barrier(member);
    used = 0;
    for (int32_t i = 0; i < a->n_sequences; i++) {
        const pl_sequence *s = &a->sequences[i];
        const cut c = cut_sequence(a, s, member->count, l.part_floats - used);
        for (int32_t head = 0; c.split && head < kv->n_head_kv; head++) {
            const tile t = {s, head, 0, s->n_tokens, c.chunks};
            join_parts(a, &t, (float *)scratch + used + head * (c.part_floats / kv->n_head_kv), member);
        }
        used += c.part_floats;
    }
}

/* program.c - making, checking, running and freeing programs. */
#include "program.h"

#include <stdlib.h>

/* ---- checks -------------------------------------------------------------------------------------------------------- */

enum { MOST_VALUES = 1 << 20, WIDEST_UNQUANTIZED_NORM = 8192 };

typedef struct check {
    const pl_program *p;
    int32_t index;
    const pl_op *op;
    pl_error *err;
} check;

static int32_t refuse(const check *c, const char *why) {
    return pl_fail(c->err, "op %d (kind %d): %s", c->index, c->op->kind, why);
}

/* Whether value `number` is of `kind` and `rows` (either: -1) and `width` (any: -1); absent values pass where `optional`. */
static bool is_value(const check *c, int32_t number, int32_t kind, int32_t rows, int64_t width, bool optional) {
    if (number == -1 && optional) {
        return true;
    }
    if (number < 0 || number >= c->p->n_values) {
        return false;
    }
    const pl_value *v = &c->p->values[number];
    return (kind < 0 || v->kind == kind) && (rows < 0 || v->rows == rows) && (width < 0 || v->width == width);
}

static bool same_shape(const check *c, int32_t a, int32_t b) {
    return c->p->values[a].rows == c->p->values[b].rows && c->p->values[a].width == c->p->values[b].width;
}

static bool is_vector(const pl_op *op, int32_t i, int64_t length) { return op->v[i] && op->v_len[i] >= length; }

/* Whether value `number` is what products with weight `w` read: quantized for quantized formats, float for float ones. */
static bool feeds(const check *c, int32_t number, const pl_weight *w) {
    return w && w->n_cols <= INT32_MAX &&
           is_value(c, number, pl_format_is_float(w->format) ? PL_VALUE_F32 : PL_VALUE_Q8, -1, w->n_cols, false);
}

static int32_t check_linear(const check *c) {
    const pl_op *op = c->op;
    if (op->dst[0] < 0) {
        return refuse(c, "no output");
    }
    for (int32_t i = 0; i < 3 && op->dst[i] >= 0; i++) {
        if (!feeds(c, op->src[0], op->w[i]) || !is_value(c, op->dst[i], PL_VALUE_F32, -1, op->w[i]->n_rows, false) ||
            c->p->values[op->dst[i]].rows != c->p->values[op->src[0]].rows) {
            return refuse(c, "input, matrix and output do not fit together");
        }
        if (op->src[1] >= 0 && (!is_value(c, op->src[1], PL_VALUE_F32, -1, -1, false) || !same_shape(c, op->src[1], op->dst[i]))) {
            return refuse(c, "the residual is not of the output's shape");
        }
        if (op->v[i] && op->v_len[i] != op->w[i]->n_rows) {
            return refuse(c, "the bias is not of the output's width");
        }
    }
    return 0;
}

static int32_t check_glu(const check *c) {
    const pl_op *op = c->op;
    if (!feeds(c, op->src[0], op->w[0]) || !feeds(c, op->src[0], op->w[1]) || op->w[0]->n_rows != op->w[1]->n_rows) {
        return refuse(c, "input and matrices do not fit together");
    }
    const int32_t rows = c->p->values[op->src[0]].rows;
    if (!is_value(c, op->dst[0], PL_VALUE_F32, rows, op->w[0]->n_rows, true) ||
        !is_value(c, op->dst[1], PL_VALUE_Q8, rows, op->w[0]->n_rows, true) || (op->dst[0] < 0 && op->dst[1] < 0)) {
        return refuse(c, "the output does not fit");
    }
    if (op->n[0] != PL_SILU && op->n[0] != PL_GELU_TANH) {
        return refuse(c, "unknown activation");
    }
    return 0;
}

static bool heads_fit(const pl_kv *kv, int32_t n_head) {
    return n_head >= 1 && n_head % kv->n_head_kv == 0 && n_head / kv->n_head_kv <= PL_MOST_HEADS_PER_GROUP;
}

static int32_t check_qkv(const check *c) {
    const pl_op *op = c->op;
    const pl_kv *kv = c->p->kv;
    if (!kv || op->n[0] < 0 || op->n[0] >= kv->n_layers) {
        return refuse(c, "no such layer in the key/value store");
    }
    const int64_t kv_width = (int64_t)kv->n_head_kv * kv->head_dim;
    if (!heads_fit(kv, op->n[1])) {
        return refuse(c, "the heads cannot share the key/value heads");
    }
    if (!is_value(c, op->src[0], PL_VALUE_F32, PL_ROWS_TOKENS, (int64_t)op->n[1] * kv->head_dim, false) ||
        !is_value(c, op->src[1], PL_VALUE_F32, PL_ROWS_TOKENS, kv_width, false) ||
        !is_value(c, op->src[2], PL_VALUE_F32, PL_ROWS_TOKENS, kv_width, false)) {
        return refuse(c, "q, k or v does not fit the heads");
    }
    if (op->dst[0] != op->src[0]) {
        return refuse(c, "q is changed in place");
    }
    if ((op->v[0] && op->v_len[0] != kv->head_dim) || (op->v[1] && op->v_len[1] != kv->head_dim)) {
        return refuse(c, "a head norm is not of the head's width");
    }
    if (op->src[3] >= 0 && (op->n[2] < 2 || op->n[2] % 2 || op->n[2] > kv->head_dim ||
                           !is_value(c, op->src[3], PL_VALUE_F32, PL_ROWS_TOKENS, op->n[2], false) ||
                           (op->n[3] != PL_ROPE_PAIRS && op->n[3] != PL_ROPE_HALVES))) {
        return refuse(c, "the rotation does not fit the head");
    }
    return 0;
}

static int32_t check_op(const check *c) {
    const pl_op *op = c->op;
    const pl_program *p = c->p;
    for (int32_t i = 0; i < 4; i++) {
        if (op->src[i] < -1 || op->src[i] >= p->n_values || (i < 3 && (op->dst[i] < -1 || op->dst[i] >= p->n_values))) {
            return refuse(c, "a value does not exist");
        }
    }
    switch (op->kind) {
    case PL_OP_EMBED:
        return op->w[0] && is_value(c, op->dst[0], PL_VALUE_F32, PL_ROWS_TOKENS, op->w[0]->n_cols, false)
                   ? 0 : refuse(c, "table and output do not fit together");
    case PL_OP_ROPE_TABLE:
        return op->n[0] >= 2 && op->n[0] % 2 == 0 && is_vector(op, 0, op->n[0] / 2) &&
                       is_value(c, op->dst[0], PL_VALUE_F32, PL_ROWS_TOKENS, op->n[0], false)
                   ? 0 : refuse(c, "frequencies and output do not fit together");
    case PL_OP_RMS_NORM:
        if (!is_value(c, op->src[0], PL_VALUE_F32, -1, -1, false) || !is_vector(op, 0, p->values[op->src[0]].width) ||
            !is_value(c, op->dst[0], PL_VALUE_F32, -1, -1, true) || !is_value(c, op->dst[1], PL_VALUE_Q8, -1, -1, true) ||
            (op->dst[0] >= 0 && !same_shape(c, op->src[0], op->dst[0])) ||
            (op->dst[1] >= 0 && !same_shape(c, op->src[0], op->dst[1])) || (op->dst[0] < 0 && op->dst[1] < 0)) {
            return refuse(c, "input, factor and outputs do not fit together");
        }
        return op->dst[0] >= 0 || p->values[op->src[0]].width <= WIDEST_UNQUANTIZED_NORM
                   ? 0 : refuse(c, "a row this wide needs a float output beside the quantized one");
    case PL_OP_NORM_ADD:
        return is_value(c, op->src[0], PL_VALUE_F32, -1, -1, false) && is_value(c, op->src[1], PL_VALUE_F32, -1, -1, false) &&
                       is_value(c, op->dst[0], PL_VALUE_F32, -1, -1, false) && same_shape(c, op->src[0], op->src[1]) &&
                       same_shape(c, op->src[0], op->dst[0]) && is_vector(op, 0, p->values[op->src[0]].width)
                   ? 0 : refuse(c, "inputs, factor and output do not fit together");
    case PL_OP_QUANTIZE:
        return is_value(c, op->src[0], PL_VALUE_F32, -1, -1, false) && is_value(c, op->dst[0], PL_VALUE_Q8, -1, -1, false) &&
                       same_shape(c, op->src[0], op->dst[0])
                   ? 0 : refuse(c, "input and output do not fit together");
    case PL_OP_ADD:
        return is_value(c, op->src[0], PL_VALUE_F32, -1, -1, false) && is_value(c, op->src[1], PL_VALUE_F32, -1, -1, false) &&
                       is_value(c, op->dst[0], PL_VALUE_F32, -1, -1, false) && same_shape(c, op->src[0], op->src[1]) &&
                       same_shape(c, op->src[0], op->dst[0])
                   ? 0 : refuse(c, "inputs and output do not fit together");
    case PL_OP_SCALE:
        return is_value(c, op->src[0], PL_VALUE_F32, -1, -1, false) && is_value(c, op->dst[0], PL_VALUE_F32, -1, -1, false) &&
                       same_shape(c, op->src[0], op->dst[0])
                   ? 0 : refuse(c, "input and output do not fit together");
    case PL_OP_LINEAR:
        return check_linear(c);
    case PL_OP_GLU:
        return check_glu(c);
    case PL_OP_QKV:
        return check_qkv(c);
    case PL_OP_ATTENTION: {
        const int64_t width = p->kv ? (int64_t)op->n[1] * p->kv->head_dim : -1;
        return p->kv && op->n[0] >= 0 && op->n[0] < p->kv->n_layers && heads_fit(p->kv, op->n[1]) && op->n[2] >= 0 &&
                       is_value(c, op->src[0], PL_VALUE_F32, PL_ROWS_TOKENS, width, false) &&
                       is_value(c, op->dst[0], PL_VALUE_F32, PL_ROWS_TOKENS, width, false)
                   ? 0 : refuse(c, "layer, heads, q and output do not fit together");
    }
    case PL_OP_SELECT:
        for (int32_t i = 0; i < 3 && (i == 0 || op->dst[i] >= 0); i++) {
            if (!is_value(c, op->src[i], PL_VALUE_F32, PL_ROWS_TOKENS, -1, false) ||
                !is_value(c, op->dst[i], PL_VALUE_F32, PL_ROWS_OUTPUTS, p->values[op->src[i]].width, false)) {
                return refuse(c, "input and output do not fit together");
            }
        }
        return 0;
    case PL_OP_HIDDEN:
        return is_value(c, op->src[0], PL_VALUE_F32, PL_ROWS_OUTPUTS, -1, false) ? 0 : refuse(c, "the input does not fit");
    case PL_OP_LOGITS:
        return feeds(c, op->src[0], op->w[0]) && p->values[op->src[0]].rows == PL_ROWS_OUTPUTS && op->w[0]->n_rows == p->n_vocab
                   ? 0 : refuse(c, "input, matrix and vocabulary do not fit together");
    default:
        return refuse(c, "unknown kind");
    }
}

static int32_t check_values(const pl_program *p, pl_error *err) {
    for (int32_t i = 0; i < p->n_values; i++) {
        const pl_value *v = &p->values[i];
        if ((v->kind != PL_VALUE_F32 && v->kind != PL_VALUE_Q8) || (v->rows != PL_ROWS_TOKENS && v->rows != PL_ROWS_OUTPUTS) ||
            v->width < 1 || v->width > 1 << 24 || v->slot < 0 || v->slot >= p->n_slots ||
            (v->kind == PL_VALUE_Q8 && v->width % PL_GROUP)) {
            return pl_fail(err, "value %d is malformed", i);
        }
    }
    return 0;
}

/* ---- life ---------------------------------------------------------------------------------------------------------- */

static void *copy_of(const void *source, size_t bytes, pl_error *err) {
    void *copy = pl_alloc(bytes, err);
    if (copy) {
        memcpy(copy, source, bytes);
    }
    return copy;
}

static int64_t value_bytes(const pl_value *v, int32_t rows) {
    return v->kind == PL_VALUE_Q8 ? pl_q8_bytes(v->width, rows) : (int64_t)v->width * rows * 4;
}

static int32_t allocate_slots(pl_program *p, pl_error *err) {
    p->slots = pl_alloc(sizeof *p->slots * (size_t)p->n_slots, err);
    int64_t *starts = pl_alloc(sizeof *starts * (size_t)p->n_slots, err);
    if (!p->slots || !starts) {
        pl_free(starts);
        return -1;
    }
    for (int32_t slot = 0; slot < p->n_slots; slot++) {
        int64_t bytes = 0;
        for (int32_t i = 0; i < p->n_values; i++) {
            const pl_value *v = &p->values[i];
            const int32_t rows = v->rows == PL_ROWS_TOKENS ? p->max_tokens : p->max_outputs;
            if (v->slot == slot) {
                bytes = PL_MAX(bytes, value_bytes(v, rows));
            }
        }
        starts[slot] = p->slot_bytes;
        p->slot_bytes += pl_round_up(bytes, 64);
    }
    p->slot_memory = pl_alloc((size_t)p->slot_bytes, err);
    for (int32_t slot = 0; p->slot_memory && slot < p->n_slots; slot++) {
        p->slots[slot] = p->slot_memory + starts[slot];
    }
    pl_free(starts);
    return p->slot_memory ? 0 : -1;
}

static int32_t allocate_attention(pl_program *p, int32_t n_threads, pl_error *err) {
    int32_t most_heads = 0;
    for (int32_t i = 0; i < p->n_ops; i++) {
        if (p->ops[i].kind == PL_OP_ATTENTION) {
            most_heads = PL_MAX(most_heads, p->ops[i].n[1]);
        }
    }
    if (!most_heads) {
        return 0;
    }
    p->attention_scratch_bytes = pl_attention_scratch_bytes(most_heads, p->kv->n_head_kv, p->kv->head_dim, p->kv->n_blocks,
                                                            n_threads);
    p->attention_scratch = pl_alloc((size_t)p->attention_scratch_bytes, err);
    return p->attention_scratch ? 0 : -1;
}

static int32_t allocate_unfolding(pl_program *p, int32_t n_threads, pl_error *err) {
    for (int32_t i = 0; i < p->n_ops; i++) {
        const pl_op *op = &p->ops[i];
        if (op->kind == PL_OP_LINEAR || op->kind == PL_OP_GLU || op->kind == PL_OP_LOGITS) {
            p->unfolding_bytes = PL_MAX(p->unfolding_bytes, pl_unfolded_bytes(p->cpu->kernels, op->w, 3));
        }
    }
    if (!p->unfolding_bytes) {
        return 0;
    }
    p->unfolding_memory = pl_alloc((size_t)(2 * n_threads * p->unfolding_bytes), err);
    return p->unfolding_memory ? 0 : -1;
}

/* ---- runs of one token --------------------------------------------------------------------------------------------- */

static bool is_of_rows(const pl_op *op) {
    return op->kind != PL_OP_LINEAR && op->kind != PL_OP_GLU && op->kind != PL_OP_QKV && op->kind != PL_OP_ATTENTION;
}

/* The values that an op writes, some in place: at most four; returns how many. */
static int32_t written_by(const pl_op *op, int32_t values[4]) {
    int32_t n = 0;
    for (int32_t i = 0; i < 3; i++) {
        if (op->dst[i] >= 0) {
            values[n++] = op->dst[i];
        }
    }
    if (op->kind == PL_OP_QKV) {
        values[n++] = op->src[1];
    }
    return n;
}

/* A value is every member's own if only ops write it whose every result can be. */
static void find_own_values(const pl_program *p) {
    bool *is_own = p->single.is_own;
    memset(is_own, true, (size_t)p->n_values);
    for (bool changed = true; changed;) {
        changed = false;
        for (int32_t i = 0; i < p->n_ops; i++) {
            int32_t values[4];
            const int32_t n = written_by(&p->ops[i], values);
            bool shared = !is_of_rows(&p->ops[i]);
            for (int32_t j = 0; j < n; j++) {
                shared |= !is_own[values[j]];
            }
            for (int32_t j = 0; j < n && shared; j++) {
                changed |= is_own[values[j]];
                is_own[values[j]] = false;
            }
        }
    }
}

/* What has been done to a place in shared memory since the team met. */
enum { WAS_READ = 1, WAS_WRITTEN = 2 };

/* Places in shared memory: the slots, what attention works in, what logits go to, and each layer's keys and values. */
static int32_t scratch_place(const pl_program *p) { return p->n_slots; }
static int32_t logits_place(const pl_program *p) { return p->n_slots + 1; }
static int32_t layer_place(const pl_program *p, int32_t layer) { return p->n_slots + 2 + layer; }
static int32_t count_places(const pl_program *p) { return layer_place(p, p->kv ? p->kv->n_layers : 0); }

typedef struct uses {
    int32_t n_read, n_written;
    int32_t read[5], written[5];
} uses;

/* The places that an op reads and writes. */
static uses uses_of(const pl_program *p, const pl_op *op) {
    uses u = {0};
    int32_t values[4];
    const int32_t n = written_by(op, values);
    for (int32_t i = 0; i < 4; i++) {
        if (op->src[i] >= 0 && !p->single.is_own[op->src[i]]) {
            u.read[u.n_read++] = p->values[op->src[i]].slot;
        }
    }
    for (int32_t i = 0; i < n; i++) {
        if (!p->single.is_own[values[i]]) {
            u.written[u.n_written++] = p->values[values[i]].slot;
        }
    }
    if (op->kind == PL_OP_QKV) {
        u.written[u.n_written++] = layer_place(p, op->n[0]);
    } else if (op->kind == PL_OP_ATTENTION) {
        u.read[u.n_read++] = layer_place(p, op->n[0]);
        u.written[u.n_written++] = scratch_place(p);
    } else if (op->kind == PL_OP_LOGITS) {
        u.written[u.n_written++] = logits_place(p);
    }
    return u;
}

/* `done`: for each place, zero. */
static void find_meetings(const pl_program *p, uint8_t *done) {
    for (int32_t i = 0; i < p->n_ops; i++) {
        const pl_op *op = &p->ops[i];
        const uses u = uses_of(p, op);
        bool reads_new = false, overwrites = false;
        for (int32_t j = 0; j < u.n_read; j++) {
            reads_new |= (done[u.read[j]] & WAS_WRITTEN) != 0;
        }
        for (int32_t j = 0; j < u.n_written; j++) {
            overwrites |= done[u.written[j]] != 0;
        }
        const bool heads_follow = op->kind == PL_OP_ATTENTION && i && p->ops[i - 1].kind == PL_OP_QKV &&
                                  p->ops[i - 1].n[0] == op->n[0] && p->ops[i - 1].src[0] == op->src[0];
        p->single.meetings[i] = overwrites || (reads_new && !heads_follow) ? PL_MEET
                                : reads_new ? PL_MEET_UNLESS_HEADS_ARE_KEPT : PL_MEET_NOT;
        if (p->single.meetings[i] == PL_MEET) {
            memset(done, 0, (size_t)count_places(p));
        }
        for (int32_t j = 0; j < u.n_read; j++) {
            done[u.read[j]] |= WAS_READ;
        }
        for (int32_t j = 0; j < u.n_written; j++) {
            done[u.written[j]] |= WAS_WRITTEN;
        }
    }
}

static int32_t plan_single(pl_program *p, int32_t n_threads, pl_error *err) {
    pl_single_plan *s = &p->single;
    s->meetings = pl_alloc(sizeof *s->meetings * (size_t)p->n_ops, err);
    s->is_own = pl_alloc(sizeof *s->is_own * (size_t)p->n_values, err);
    s->starts = pl_alloc(sizeof *s->starts * (size_t)p->n_slots, err);
    uint8_t *done = pl_alloc((size_t)count_places(p), err);
    if (!s->meetings || !s->is_own || !s->starts || !done) {
        pl_free(done);
        return -1;
    }
    find_own_values(p);
    find_meetings(p, done);
    pl_free(done);
    for (int32_t slot = 0; slot < p->n_slots; slot++) {
        int64_t bytes = 0;
        for (int32_t i = 0; i < p->n_values; i++) {
            if (p->values[i].slot == slot && s->is_own[i]) {
                bytes = PL_MAX(bytes, value_bytes(&p->values[i], 1));
            }
        }
        s->starts[slot] = s->member_bytes;
        s->member_bytes += pl_round_up(bytes, 64);
    }
    s->memory = pl_alloc((size_t)(s->member_bytes * n_threads), err);
    return s->memory ? 0 : -1;
}

/* Notes how each layer's K is rotated, for pl_kv_copy. */
static int32_t note_ropes(pl_program *p, pl_error *err) {
    if (!p->kv) {
        return 0;
    }
    p->layer_ropes = pl_alloc(sizeof *p->layer_ropes * (size_t)p->kv->n_layers, err);
    if (!p->layer_ropes) {
        return -1;
    }
    for (int32_t i = 0; i < p->n_ops; i++) {
        const pl_op *op = &p->ops[i];
        for (int32_t j = 0; op->kind == PL_OP_QKV && op->src[3] >= 0 && j < i; j++) {
            if (p->ops[j].kind == PL_OP_ROPE_TABLE && p->ops[j].dst[0] == op->src[3]) {
                p->layer_ropes[op->n[0]] = (pl_layer_rope){p->ops[j].v[0], op->n[2], op->n[3]};
            }
        }
    }
    return 0;
}

PL_API pl_program *pl_program_new(const pl_op *ops, int32_t n_ops, const pl_value *values, int32_t n_values, int32_t n_slots,
                                  int32_t max_tokens, int32_t max_outputs, pl_kv *kv, pl_pool *pool, pl_error *err) {
    if (n_ops < 1 || n_ops > MOST_VALUES || n_values < 1 || n_values > MOST_VALUES || n_slots < 1 || n_slots > n_values ||
        max_tokens < 1 || max_tokens > 1 << 20 || max_outputs < 1 || max_outputs > max_tokens) {
        pl_fail(err, "a program's sizes are out of range");
        return NULL;
    }
    const pl_cpu_set *cpu = pl_cpu_wanted(err);
    pl_program *p = cpu ? pl_alloc(sizeof *p, err) : NULL;
    if (!p) {
        return NULL;
    }
    p->n_ops = n_ops;
    p->n_values = n_values;
    p->n_slots = n_slots;
    p->max_tokens = max_tokens;
    p->max_outputs = max_outputs;
    p->kv = kv;
    p->pool = pool;
    p->cpu = cpu;
    p->ops = copy_of(ops, sizeof *ops * (size_t)n_ops, err);
    p->values = copy_of(values, sizeof *values * (size_t)n_values, err);
    p->counters = pl_alloc(sizeof *p->counters * (size_t)n_ops, err);
    bool good = p->ops && p->values && p->counters && check_values(p, err) == 0;
    for (int32_t i = 0; good && i < n_ops; i++) {
        const check c = {p, i, &p->ops[i], err};
        good = check_op(&c) == 0;
        if (good && p->ops[i].kind == PL_OP_EMBED) {
            p->n_vocab = (int32_t)p->ops[i].w[0]->n_rows;
        }
    }
    if (!good || allocate_slots(p, err) < 0 || allocate_attention(p, pl_pool_size(pool), err) < 0 ||
        allocate_unfolding(p, pl_pool_size(pool), err) < 0 ||
        plan_single(p, pl_pool_size(pool), err) < 0 || note_ropes(p, err) < 0) {
        pl_program_free(p);
        return NULL;
    }
    return p;
}

PL_API void pl_program_free(pl_program *p) {
    if (!p) {
        return;
    }
    pl_free(p->slots);
    pl_free(p->slot_memory);
    pl_free(p->ops);
    pl_free(p->values);
    pl_free(p->counters);
    pl_free(p->layer_ropes);
    pl_free(p->single.meetings);
    pl_free(p->single.is_own);
    pl_free(p->single.starts);
    pl_free(p->single.memory);
    pl_free(p->attention_scratch);
    pl_free(p->unfolding_memory);
    pl_free(p);
}

PL_API int64_t pl_program_bytes(const pl_program *p) {
    const int64_t of_member = p->single.member_bytes + 2 * p->unfolding_bytes;
    return p->slot_bytes + p->attention_scratch_bytes + of_member * pl_pool_size(p->pool);
}

/* ---- runs ---------------------------------------------------------------------------------------------------------- */

static int32_t check_blocks(const pl_kv *kv, const int32_t *blocks, int32_t n_blocks, int64_t positions, pl_error *err) {
    if (!kv) {
        return 0;
    }
    if (positions > (int64_t)n_blocks * PL_BLOCK_TOKENS) {
        return pl_fail(err, "%lld positions do not fit into %d blocks", (long long)positions, n_blocks);
    }
    if (n_blocks > kv->n_blocks) { /* attention's working memory is made for sequences that the store can hold */
        return pl_fail(err, "a sequence of %d blocks; the store has %d", n_blocks, kv->n_blocks);
    }
    for (int32_t i = 0; i < n_blocks; i++) {
        if (blocks[i] < 0 || blocks[i] >= kv->n_blocks) {
            return pl_fail(err, "block %d does not exist; the store has %d", blocks[i], kv->n_blocks);
        }
    }
    return 0;
}

static int32_t check_batch(const pl_program *p, const pl_batch *b, pl_error *err) {
    if (b->n_tokens < 1 || b->n_tokens > p->max_tokens) {
        return pl_fail(err, "a batch of %d tokens; the program takes 1 to %d", b->n_tokens, p->max_tokens);
    }
    if (b->n_outputs < 0 || b->n_outputs > p->max_outputs) {
        return pl_fail(err, "%d outputs were asked for; the program gives at most %d", b->n_outputs, p->max_outputs);
    }
    for (int32_t i = 0; i < b->n_tokens; i++) {
        if (b->tokens[i] < 0 || b->tokens[i] >= p->n_vocab) {
            return pl_fail(err, "token %d is not in the vocabulary of %d", b->tokens[i], p->n_vocab);
        }
    }
    for (int32_t i = 0; i < b->n_outputs; i++) {
        if (b->outputs[i] < 0 || b->outputs[i] >= b->n_tokens || (i && b->outputs[i] <= b->outputs[i - 1])) {
            return pl_fail(err, "output %d is token %d: not in the batch, or not ascending", i, b->outputs[i]);
        }
    }
    int32_t next = 0;
    for (int32_t i = 0; i < b->n_sequences; i++) {
        const pl_sequence *s = &b->sequences[i];
        if (s->first != next || s->n_tokens < 1 || s->n_tokens > b->n_tokens - next || s->n_past < 0 || s->n_blocks < 0) {
            return pl_fail(err, "sequence %d of the batch is malformed", i);
        }
        if (check_blocks(p->kv, s->blocks, s->n_blocks, (int64_t)s->n_past + s->n_tokens, err) < 0) {
            return -1;
        }
        next += s->n_tokens;
    }
    return next == b->n_tokens ? 0 : pl_fail(err, "the sequences have %d tokens, the batch %d", next, b->n_tokens);
}

PL_API int32_t pl_run(pl_program *p, int32_t n_threads, const pl_batch *batch, pl_error *err) {
    if (check_batch(p, batch, err) < 0) {
        return -1;
    }
    memset(p->counters, 0, sizeof *p->counters * (size_t)p->n_ops);
    pl_run_state state = {p, batch, NULL};
    pl_pool_run(p->pool, n_threads, pl_run_ops, &state);
    return 0;
}

PL_API int32_t pl_kv_copy(const pl_program *p, const int32_t *src_blocks, int32_t n_src, int32_t src_pos,
                          const int32_t *dst_blocks, int32_t n_dst, int32_t dst_pos, int32_t n, pl_error *err) {
    if (!p->kv) {
        return pl_fail(err, "the program has no key/value store");
    }
    if (src_pos < 0 || dst_pos < 0 || n < 0 || n_src < 0 || n_dst < 0) {
        return pl_fail(err, "a negative position or length");
    }
    if (check_blocks(p->kv, src_blocks, n_src, (int64_t)src_pos + n, err) < 0 ||
        check_blocks(p->kv, dst_blocks, n_dst, (int64_t)dst_pos + n, err) < 0) {
        return -1;
    }
    for (int32_t layer = 0; layer < p->kv->n_layers; layer++) {
        const pl_layer_rope *rope = &p->layer_ropes[layer];
        pl_kv_copy_run(p->kv, layer, src_blocks, src_pos, dst_blocks, dst_pos, n, rope->inverse_frequencies, rope->n_rotated,
                       rope->kind);
    }
    return 0;
}

PL_API int32_t pl_weight_product(const pl_weight *w, const float *x, int32_t n_tokens, float *out, pl_pool *pool,
                                 pl_error *err) {
    if (n_tokens < 1 || n_tokens > 1 << 20) {
        return pl_fail(err, "a product with %d tokens was asked for", n_tokens);
    }
    pl_product_job job = {.w = w, .cpu = pl_cpu_wanted(err), .x = x, .n = n_tokens, .out = out};
    if (!job.cpu) {
        return -1;
    }
    if (!pl_format_is_float(w->format)) {
        job.q8 = pl_alloc((size_t)pl_q8_bytes((int32_t)w->n_cols, n_tokens), err);
        if (!job.q8) {
            return -1;
        }
    }
    job.unfolding_bytes = pl_unfolded_bytes(job.cpu->kernels, &w, 1);
    if (job.unfolding_bytes) {
        job.unfolding_memory = pl_alloc((size_t)(job.unfolding_bytes * pl_pool_size(pool)), err);
        if (!job.unfolding_memory) {
            pl_free(job.q8);
            return -1;
        }
    }
    pl_pool_run(pool, 0, pl_run_product, &job);
    pl_free(job.unfolding_memory);
    pl_free(job.q8);
    return 0;
}

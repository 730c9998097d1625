/*
 * ops.c - the ops of a program, each called by all members of the team.
 *
 * An op divides its work among the members, either evenly by rows or by claiming items from a shared counter (products:
 * a machine's cores are seldom equally fast). Ops need no locks: what one writes, another reads after the barrier between.
 */
#include "program.h"

#include <math.h>

/* A share of 0 .. n - 1 for this member. */
static void even_share(const pl_member *member, int32_t n, int32_t *first, int32_t *last) {
    *first = (int32_t)((int64_t)n * member->index / member->count);
    *last = (int32_t)((int64_t)n * (member->index + 1) / member->count);
}

static void *data_of(const pl_run_state *s, int32_t value) {
    const pl_program *p = s->program;
    const int32_t slot = p->values[value].slot;
    return s->own && p->single.is_own[value] ? s->own + p->single.starts[slot] : p->slots[slot];
}

static int32_t rows_of(const pl_run_state *s, int32_t value) {
    return s->program->values[value].rows == PL_ROWS_TOKENS ? s->batch->n_tokens : s->batch->n_outputs;
}

static int32_t width_of(const pl_run_state *s, int32_t value) { return s->program->values[value].width; }

static pl_q8 q8_of(const pl_run_state *s, int32_t value) {
    return pl_q8_view(data_of(s, value), width_of(s, value), rows_of(s, value), s->program->cpu->kernels->max_lanes);
}

/* A share of a quantized matrix's rows: whole tiles, which are made faster, where there are enough of them. */
static void tile_share(const pl_member *member, const pl_q8 *q, int32_t *first, int32_t *last) {
    enum { ENOUGH = 4 };
    if (q->n_tiles < ENOUGH * member->count) {
        even_share(member, q->n_rows, first, last);
        return;
    }
    even_share(member, q->n_tiles, first, last);
    *first *= q->lanes;
    *last = PL_MIN(*last * q->lanes, q->n_rows);
}

/* How many of the rows [row, last) are of one tile. */
static int32_t rows_of_tile(const pl_q8 *q, int32_t row, int32_t last) { return PL_MIN(q->lanes - row % q->lanes, last - row); }

/* n rows of one tile, which lie `width` floats apart. */
static void quantize_rows(const pl_kernels *k, const float *x, const pl_q8 *q, int32_t row, int32_t n) {
    k->quantize(x, q->width, n, q->width / PL_GROUP, pl_q8_tile(q, row / q->lanes), q->width, q->lanes, row % q->lanes, 0);
}

/* A member's share of the rows of x. */
static void quantize_share(const pl_kernels *k, const float *x, const pl_q8 *q, const pl_member *member) {
    int32_t first, last;
    tile_share(member, q, &first, &last);
    for (int32_t row = first, n; row < last; row += n) {
        n = rows_of_tile(q, row, last);
        quantize_rows(k, x + (int64_t)row * q->width, q, row, n);
    }
}

/* ---- products ------------------------------------------------------------------------------------------------------ */

/* What a product reads: tiles of quantized rows, or float rows; `n_tiles` of `lanes` rows either way. */
typedef struct operand {
    bool quantized;
    pl_q8 q8;
    const float *x;
    int64_t stride;
    int32_t n_rows, lanes, n_tiles;
    int64_t tile_bytes;
} operand;

static operand quantized_operand(pl_q8 q) {
    return (operand){.quantized = true, .q8 = q, .n_rows = q.n_rows, .lanes = q.lanes, .n_tiles = q.n_tiles,
                     .tile_bytes = q.tile_bytes};
}

static operand float_operand(const float *x, int32_t width, int32_t n_rows, int32_t max_lanes) {
    return (operand){.x = x, .stride = width, .n_rows = n_rows, .lanes = max_lanes,
                     .n_tiles = (n_rows + max_lanes - 1) / max_lanes, .tile_bytes = (int64_t)width * max_lanes * 4};
}

static operand operand_of(const pl_run_state *s, int32_t value) {
    if (s->program->values[value].kind == PL_VALUE_Q8) {
        return quantized_operand(q8_of(s, value));
    }
    return float_operand(data_of(s, value), width_of(s, value), rows_of(s, value), s->program->cpu->kernels->max_lanes);
}

enum { UNIT_PANELS = 2, UNIT_ROWS = UNIT_PANELS * PL_PANEL_ROWS };

_Static_assert((int)UNIT_ROWS == (int)PL_PEAK_LOGITS, "a unit of the logits' product has one peak");

/* The panels of a matrix, in pairs. */
static int64_t units_of(const pl_weight *w) { return (w->n_panels + UNIT_PANELS - 1) / UNIT_PANELS; }

/*
 * While `n` panels at `panel` meet tile `tile`, the panels behind them can come from memory. Each of the tiles fetches a share
 * of them, so that memory and multiplication are busy all the time: with a few tokens both take about as long.
 */
static pl_next next_of(const pl_weight *w, int64_t panel, int64_t n, int32_t tile, int32_t n_tiles) {
    enum { MOST_SHARES = 4 };
    const int32_t shares = PL_MIN(n_tiles, MOST_SHARES);
    const int64_t bytes = PL_MIN(n, w->n_panels - panel - n) * w->panel_bytes;
    const int64_t share = pl_round_up((bytes + shares - 1) / shares, 64), first = tile % shares * share;
    return (pl_next){pl_weight_panel(w, panel + n) + first, PL_MAX(0, PL_MIN(share, bytes - first))};
}

/* Bytes that a matrix's units take unfolded; 0 if its products do without. */
static int64_t unfolded_bytes(const pl_kernels *k, const pl_weight *w) {
    const pl_unfolded_products *u = k->unfolded && !pl_format_is_float(w->format) ? k->unfolded(w->format) : NULL;
    return u ? w->n_cols / PL_GROUP * u->group_bytes : 0;
}

int64_t pl_unfolded_bytes(const pl_kernels *k, const pl_weight *const *w, int32_t n) {
    int64_t most = 0;
    for (int32_t i = 0; i < n && w[i]; i++) {
        most = PL_MAX(most, unfolded_bytes(k, w[i]));
    }
    return most;
}

/* A unit unfolded to `memory`, if it pays with so many tiles; otherwise NULL. */
static const uint8_t *unfold(const pl_kernels *k, const pl_weight *w, int64_t unit, const operand *x, int32_t tiles,
                             uint8_t *memory) {
    enum { ENOUGH = 8 }; /* to unfold Q6_K takes as long as is won with five to eight */
    if (!memory || !x->quantized || x->lanes < PL_UNFOLDED_LANES || tiles < ENOUGH || !unfolded_bytes(k, w) ||
        (unit + 1) * UNIT_PANELS > w->n_panels) {
        return NULL;
    }
    k->unfolded(w->format)->unfold(w, pl_weight_panel(w, unit * UNIT_PANELS), memory);
    return memory;
}

/* out[lane][32], rows `stride` floats apart: one unit of a matrix times one tile; [lane][16] where the last unit is one panel. */
static void unit_times_tile(const pl_kernels *k, const pl_weight *w, int64_t unit, const uint8_t *unfolded, const operand *x,
                            int32_t tile, float *out, int64_t stride) {
    const int64_t first = unit * UNIT_PANELS, last = PL_MIN(first + UNIT_PANELS, w->n_panels);
    const int32_t row = tile * x->lanes;
    int32_t n;
    if (unfolded) {
        const pl_unfolded_product product = k->unfolded(w->format)->product[x->lanes - PL_UNFOLDED_LANES];
        product(w, pl_weight_panel(w, first), unfolded, pl_q8_tile(&x->q8, tile), out, stride,
                next_of(w, first, UNIT_PANELS, tile, x->n_tiles));
        return;
    }
    for (int64_t panel = first; panel < last; panel += n, out += PL_PANEL_ROWS) {
        const uint8_t *p = pl_weight_panel(w, panel);
        if (x->quantized) {
            n = x->lanes <= PL_STREAMING_LANES ? 1 : (int32_t)PL_MIN(k->max_panels, last - panel);
            const pl_next next = next_of(w, panel, n, tile, x->n_tiles);
            k->product(w->format, x->lanes, n)(w, p, pl_q8_tile(&x->q8, tile), out, stride, next);
        } else {
            n = 1;
            k->product_float(w, p, x->x + row * x->stride, x->stride, PL_MIN(x->lanes, x->n_rows - row), out, stride);
        }
    }
}

/*
 * A product's work: `n_units` units of rows times the tiles. Tiles are taken in chunks that stay in the caches while the
 * units pass over them; the longer a chunk, the less it takes to unfold the units. With one chunk each member begins with a
 * run of units of its own, so that the weights stream past undisturbed, and claims the rest in small pieces, so that a member
 * that was held up is helped.
 */
typedef struct work {
    int64_t n_units, own_units, units_per_claim, claims_per_chunk;
    int32_t tiles_per_chunk, n_tiles;
    bool began;
} work;

static work divide(int64_t n_units, const operand *x, int32_t members) {
    enum { CHUNK_BYTES = 1 << 20, MOST_UNITS = 8, CLAIMS_PER_MEMBER = 8 };
    work d = {.n_units = n_units, .n_tiles = x->n_tiles};
    d.tiles_per_chunk = (int32_t)PL_MAX(1, PL_MIN(CHUNK_BYTES / x->tile_bytes, x->n_tiles));
    d.own_units = d.tiles_per_chunk == d.n_tiles ? n_units * 3 / 4 / members : 0;
    const int64_t shared = n_units - d.own_units * members;
    d.units_per_claim = PL_MAX(1, PL_MIN(MOST_UNITS, n_units / (CLAIMS_PER_MEMBER * members)));
    d.claims_per_chunk = (shared + d.units_per_claim - 1) / d.units_per_claim;
    return d;
}

typedef struct claim {
    int64_t first_unit, last_unit;
    int32_t first_tile, last_tile;
} claim;

static bool next_claim(work *d, atomic_int *counter, const pl_member *member, claim *c) {
    if (!d->began && d->own_units) {
        d->began = true;
        *c = (claim){d->own_units * member->index, d->own_units * (member->index + 1), 0, d->n_tiles};
        return true;
    }
    const int64_t number = pl_claim(counter), chunk = number / d->claims_per_chunk;
    if (chunk * d->tiles_per_chunk >= d->n_tiles) {
        return false;
    }
    c->first_unit = d->own_units * member->count + number % d->claims_per_chunk * d->units_per_claim;
    c->last_unit = PL_MIN(c->first_unit + d->units_per_claim, d->n_units);
    c->first_tile = (int32_t)(chunk * d->tiles_per_chunk);
    c->last_tile = PL_MIN(c->first_tile + d->tiles_per_chunk, d->n_tiles);
    return true;
}

/* Where a product's result goes: out = result + bias + residual, rows `stride` floats apart. */
typedef struct destination {
    const pl_weight *w;
    float *out;
    const float *bias, *residual;
    int64_t stride;
    float *peaks; /* [row][units], the largest result of each unit and row; or NULL */
} destination;

/* NaN is never the largest. */
static float largest(const float *x, int32_t n) {
    enum { LANES = 4, CHAINS = 4 };
    typedef float floats __attribute__((vector_size(4 * LANES)));
    typedef int32_t ints __attribute__((vector_size(4 * LANES)));
    floats best[CHAINS];
    float lanes[CHAINS * LANES];
    for (int chain = 0; chain < CHAINS; chain++) {
        best[chain] = (floats){-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    }
    int32_t i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES) {
        for (int chain = 0; chain < CHAINS; chain++) {
            floats v;
            memcpy(&v, x + i + chain * LANES, sizeof v);
            const ints larger = v > best[chain];
            best[chain] = (floats)((larger & (ints)v) | (~larger & (ints)best[chain]));
        }
    }
    memcpy(lanes, best, sizeof lanes);
    for (; i < n; i++) {
        lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    }
    for (int half = CHAINS * LANES / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++) {
            lanes[lane] = PL_MAX(lanes[lane], lanes[lane + half]);
        }
    }
    return lanes[0];
}

/* One unit times one tile, to where it belongs. */
static void deliver_results(const pl_kernels *k, const destination *to, int64_t unit, const uint8_t *unfolded,
                            const operand *x, int32_t tile) {
    const int64_t column = unit * UNIT_ROWS;
    const int32_t n = (int32_t)PL_MIN(UNIT_ROWS, to->w->n_rows - column);
    const int32_t first = tile * x->lanes, rows = PL_MIN(x->lanes, x->n_rows - first);
    float *out = to->out + first * to->stride + column;
    if (n == UNIT_ROWS && rows == x->lanes && !to->residual && !to->bias) {
        unit_times_tile(k, to->w, unit, unfolded, x, tile, out, to->stride);
        return;
    }
    _Alignas(64) float result[PL_MAX_LANES][UNIT_ROWS];
    const float *residual = to->residual ? to->residual + first * to->stride + column : NULL;
    for (int32_t t = 0; t < rows && residual; t++) { /* each row is in another page: seldom in the first-level cache */
        __builtin_prefetch(residual + t * to->stride);
        __builtin_prefetch(residual + t * to->stride + UNIT_ROWS - 1);
    }
    unit_times_tile(k, to->w, unit, unfolded, x, tile, result[0], UNIT_ROWS);
    for (int32_t t = 0; t < rows; t++, out += to->stride) {
        for (int32_t i = 0; to->bias && i < n; i++) {
            result[t][i] += to->bias[column + i];
        }
        if (!residual) {
            memcpy(out, result[t], sizeof(float) * (size_t)n);
            continue;
        }
        const float *r = residual + t * to->stride;
        if (n == UNIT_ROWS) { /* a number that the compiler knows */
            for (int32_t i = 0; i < UNIT_ROWS; i++) {
                out[i] = result[t][i] + r[i];
            }
        } else {
            for (int32_t i = 0; i < n; i++) {
                out[i] = result[t][i] + r[i];
            }
        }
    }
}

static void deliver(const pl_kernels *k, const destination *to, int64_t unit, const uint8_t *unfolded, const operand *x,
                    int32_t tile) {
    deliver_results(k, to, unit, unfolded, x, tile);
    const int32_t first = tile * x->lanes, last = PL_MIN(first + x->lanes, x->n_rows);
    for (int32_t row = first; to->peaks && row < last; row++) {
        const int32_t n = (int32_t)PL_MIN(UNIT_ROWS, to->w->n_rows - unit * UNIT_ROWS);
        to->peaks[row * units_of(to->w) + unit] = largest(to->out + row * to->stride + unit * UNIT_ROWS, n);
    }
}

/* `memory` is the member's own, for an unfolded unit, or NULL. */
static void multiply(const pl_kernels *k, const destination *to, int32_t n_to, const operand *x, uint8_t *memory,
                     atomic_int *counter, const pl_member *member) {
    int64_t units = 0;
    for (int32_t i = 0; i < n_to; i++) {
        units += units_of(to[i].w);
    }
    work d = divide(units, x, member->count);
    claim c;
    while (next_claim(&d, counter, member, &c)) {
        for (int64_t number = c.first_unit; number < c.last_unit; number++) {
            const destination *t = to;
            int64_t unit = number;
            while (unit >= units_of(t->w)) {
                unit -= units_of(t->w);
                t++;
            }
            const uint8_t *unfolded = unfold(k, t->w, unit, x, c.last_tile - c.first_tile, memory);
            for (int32_t tile = c.first_tile; tile < c.last_tile; tile++) {
                deliver(k, t, unit, unfolded, x, tile);
            }
        }
    }
}

/* A member's place for one of two unfolded units; NULL if the program's products do without. */
static uint8_t *unfolding_memory(const pl_run_state *s, int32_t which, const pl_member *member) {
    const pl_program *p = s->program;
    return p->unfolding_memory ? p->unfolding_memory + (2 * member->index + which) * p->unfolding_bytes : NULL;
}

static void op_linear(const pl_run_state *s, const pl_op *op, atomic_int *counters, const pl_member *member) {
    destination to[3];
    int32_t n = 0;
    for (; n < 3 && op->dst[n] >= 0; n++) {
        to[n] = (destination){op->w[n], data_of(s, op->dst[n]), op->v[n], op->src[1] < 0 ? NULL : data_of(s, op->src[1]),
                              op->w[n]->n_rows, NULL};
    }
    const operand x = operand_of(s, op->src[0]);
    multiply(s->program->cpu->kernels, to, n, &x, unfolding_memory(s, 0, member), &counters[0], member);
}

static void op_logits(const pl_run_state *s, const pl_op *op, atomic_int *counters, const pl_member *member) {
    const pl_batch *batch = s->batch;
    if (!batch->logits || !batch->n_outputs) {
        return;
    }
    const float factor = op->f[0], cap = op->f[1];
    const bool as_they_are = factor == 1.0f && cap == 0.0f;
    const destination to = {.w = op->w[0], .out = batch->logits, .stride = op->w[0]->n_rows,
                            .peaks = as_they_are ? batch->peaks : NULL};
    const operand x = operand_of(s, op->src[0]);
    multiply(s->program->cpu->kernels, &to, 1, &x, unfolding_memory(s, 0, member), &counters[0], member);
    if (as_they_are) {
        return;
    }
    pl_barrier(member);
    const int32_t n_units = (int32_t)units_of(op->w[0]);
    int32_t first, last;
    even_share(member, n_units, &first, &last);
    for (int32_t row = 0; row < batch->n_outputs; row++) {
        for (int32_t unit = first; unit < last; unit++) {
            float *y = batch->logits + row * to.stride + unit * UNIT_ROWS;
            const int32_t n = (int32_t)PL_MIN(UNIT_ROWS, to.stride - unit * UNIT_ROWS);
            for (int32_t i = 0; i < n; i++) {
                y[i] *= factor;
                if (cap != 0.0f) {
                    y[i] = cap * tanhf(y[i] / cap);
                }
            }
            if (batch->peaks) {
                batch->peaks[(int64_t)row * n_units + unit] = largest(y, n);
            }
        }
    }
}

/* Gate and up products of 32 columns at a time, activated and quantized while they are in cache. */
static void op_glu(const pl_run_state *s, const pl_op *op, atomic_int *counters, const pl_member *member) {
    _Alignas(64) float gate[PL_MAX_LANES][UNIT_ROWS] = {{0}}, up[PL_MAX_LANES][UNIT_ROWS] = {{0}};
    const pl_kernels *k = s->program->cpu->kernels;
    const operand x = operand_of(s, op->src[0]);
    const int32_t width = (int32_t)op->w[0]->n_rows;
    float *y = op->dst[0] < 0 ? NULL : data_of(s, op->dst[0]);
    const pl_q8 q = op->dst[1] < 0 ? (pl_q8){0} : q8_of(s, op->dst[1]);
    work d = divide(units_of(op->w[0]), &x, member->count);
    claim c;
    while (next_claim(&d, &counters[0], member, &c)) {
        for (int64_t unit = c.first_unit; unit < c.last_unit; unit++) {
            const int32_t columns = (int32_t)PL_MIN(UNIT_ROWS, width - unit * UNIT_ROWS);
            const uint8_t *unfolded[2];
            for (int32_t i = 0; i < 2; i++) {
                unfolded[i] = unfold(k, op->w[i], unit, &x, c.last_tile - c.first_tile, unfolding_memory(s, i, member));
            }
            for (int32_t tile = c.first_tile; tile < c.last_tile; tile++) {
                unit_times_tile(k, op->w[0], unit, unfolded[0], &x, tile, gate[0], UNIT_ROWS);
                unit_times_tile(k, op->w[1], unit, unfolded[1], &x, tile, up[0], UNIT_ROWS);
                const int32_t first = tile * x.lanes, rows = PL_MIN(x.lanes, x.n_rows - first);
                k->glu(op->n[0], gate[0], up[0], rows * UNIT_ROWS, gate[0]);
                for (int32_t t = 0; y && t < rows; t++) {
                    memcpy(y + (int64_t)(first + t) * width + unit * UNIT_ROWS, gate[t], sizeof(float) * (size_t)columns);
                }
                if (q.base && x.quantized) { /* both have the same tiles */
                    k->quantize(gate[0], UNIT_ROWS, rows, 1, pl_q8_tile(&q, tile), width, q.lanes, 0, (int32_t)unit);
                }
                for (int32_t t = 0; q.base && !x.quantized && t < rows; t++) {
                    const int32_t row = first + t;
                    k->quantize(gate[t], UNIT_ROWS, 1, 1, pl_q8_tile(&q, row / q.lanes), width, q.lanes, row % q.lanes,
                                (int32_t)unit);
                }
            }
        }
    }
}

/* ---- rows ---------------------------------------------------------------------------------------------------------- */

static void op_embed(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    const int32_t width = width_of(s, op->dst[0]);
    int32_t first, last;
    even_share(member, s->batch->n_tokens, &first, &last);
    float *x = (float *)data_of(s, op->dst[0]) + (int64_t)first * width;
    pl_weight_rows(op->w[0], s->batch->tokens + first, last - first, x, NULL); /* pl_run has checked the tokens */
    for (int64_t i = 0; op->f[0] != 1.0f && i < (int64_t)(last - first) * width; i++) {
        x[i] *= op->f[0];
    }
}

/* cos and sin of every token at its position. */
static void op_rope_table(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    const int32_t half = op->n[0] / 2;
    int32_t first, last;
    even_share(member, s->batch->n_tokens, &first, &last);
    for (int32_t i = 0; i < s->batch->n_sequences; i++) {
        const pl_sequence *sequence = &s->batch->sequences[i];
        const int32_t from = PL_MAX(first, sequence->first), to = PL_MIN(last, sequence->first + sequence->n_tokens);
        for (int32_t t = from; t < to; t++) {
            float *row = (float *)data_of(s, op->dst[0]) + (int64_t)t * 2 * half;
            const double position = sequence->n_past + t - sequence->first;
            for (int32_t j = 0; j < half; j++) {
                const double angle = position * (double)op->v[0][j];
                row[j] = (float)cos(angle) * op->f[0];
                row[half + j] = (float)sin(angle) * op->f[0];
            }
        }
    }
}

static void op_rms_norm(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    enum { ON_STACK = 12288 }; /* floats; program.c sees to it that a row fits */
    const pl_kernels *k = s->program->cpu->kernels;
    const int32_t width = width_of(s, op->src[0]);
    const float *x = data_of(s, op->src[0]);
    float *y = op->dst[0] < 0 ? NULL : data_of(s, op->dst[0]);
    const pl_q8 q = op->dst[1] < 0 ? (pl_q8){0} : q8_of(s, op->dst[1]);
    float on_stack[ON_STACK];
    int32_t first, last;
    if (q.base) {
        tile_share(member, &q, &first, &last);
    } else {
        even_share(member, rows_of(s, op->src[0]), &first, &last);
    }
    for (int32_t row = first, n; row < last; row += n) {
        n = q.base ? rows_of_tile(&q, row, last) : 1;
        n = y ? n : PL_MIN(n, ON_STACK / width);
        float *normed = y ? y + (int64_t)row * width : on_stack;
        for (int32_t i = 0; i < n; i++) {
            k->rms_norm(x + (int64_t)(row + i) * width, op->v[0], op->f[0], width, normed + (int64_t)i * width);
        }
        if (q.base) {
            quantize_rows(k, normed, &q, row, n);
        }
    }
}

static void op_norm_add(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    const int32_t width = width_of(s, op->src[0]);
    const float *residual = data_of(s, op->src[0]), *x = data_of(s, op->src[1]);
    float *y = data_of(s, op->dst[0]);
    int32_t first, last;
    even_share(member, rows_of(s, op->src[0]), &first, &last);
    for (int64_t row = first; row < last; row++) {
        float *sum = y + row * width;
        s->program->cpu->kernels->rms_norm(x + row * width, op->v[0], op->f[0], width, sum);
        for (int32_t i = 0; i < width; i++) {
            sum[i] += residual[row * width + i];
        }
    }
}

static void op_quantize(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    const pl_q8 q = q8_of(s, op->dst[0]);
    quantize_share(s->program->cpu->kernels, data_of(s, op->src[0]), &q, member);
}

static void op_add(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    const int32_t width = width_of(s, op->dst[0]);
    const float *a = data_of(s, op->src[0]), *b = data_of(s, op->src[1]);
    float *y = data_of(s, op->dst[0]);
    int32_t first, last;
    even_share(member, rows_of(s, op->dst[0]), &first, &last);
    for (int64_t i = (int64_t)first * width; i < (int64_t)last * width; i++) {
        y[i] = a[i] + b[i];
    }
}

static void op_scale(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    const int32_t width = width_of(s, op->dst[0]);
    const float *x = data_of(s, op->src[0]);
    float *y = data_of(s, op->dst[0]);
    int32_t first, last;
    even_share(member, rows_of(s, op->dst[0]), &first, &last);
    for (int64_t i = (int64_t)first * width; i < (int64_t)last * width; i++) {
        y[i] = op->f[0] * x[i];
    }
}

static void op_select(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    int32_t first, last;
    even_share(member, s->batch->n_outputs, &first, &last);
    for (int32_t i = 0; i < 3 && op->dst[i] >= 0; i++) {
        const int32_t width = width_of(s, op->dst[i]);
        const float *x = data_of(s, op->src[i]);
        float *y = data_of(s, op->dst[i]);
        for (int32_t row = first; row < last; row++) {
            memcpy(y + (int64_t)row * width, x + (int64_t)s->batch->outputs[row] * width, sizeof(float) * (size_t)width);
        }
    }
}

static void op_hidden(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    if (s->batch->hidden && member->index == 0) {
        memcpy(s->batch->hidden, data_of(s, op->src[0]),
               sizeof(float) * (size_t)s->batch->n_outputs * (size_t)width_of(s, op->src[0]));
    }
}

/* ---- attention ----------------------------------------------------------------------------------------------------- */

/* One head of one token: norm, rotation, factor, and the basis that keys are kept in. */
static void prepare_head(const pl_run_state *s, const pl_op *op, float *x, const float *norm, const float *table,
                         float factor, int32_t head_dim) {
    const pl_kernels *k = s->program->cpu->kernels;
    if (norm) {
        k->rms_norm(x, norm, op->f[0], head_dim, x);
    }
    k->rotate(x, head_dim, table, table ? op->n[2] : 0, op->n[3], factor);
    pl_kv_turn(s->program->kv->key_type, head_dim, x);
}

/* Prepares q and k in place, and stores k and v; an item is what a sequence adds to one block, and one group of heads. */
static void op_qkv(const pl_run_state *s, const pl_op *op, const pl_member *member) {
    const pl_kv *kv = s->program->kv;
    const int32_t n_head = op->n[1], group = n_head / kv->n_head_kv, head_dim = kv->head_dim;
    const int64_t q_stride = (int64_t)n_head * head_dim, kv_stride = (int64_t)kv->n_head_kv * head_dim;
    float *q = data_of(s, op->src[0]), *k = data_of(s, op->src[1]), *v = data_of(s, op->src[2]);
    const float *tables = op->src[3] < 0 ? NULL : data_of(s, op->src[3]);
    int32_t item = 0;
    for (int32_t i = 0; i < s->batch->n_sequences; i++) {
        const pl_sequence *sequence = &s->batch->sequences[i];
        const int32_t last = sequence->n_past + sequence->n_tokens - 1; /* position */
        for (int32_t block = sequence->n_past / PL_BLOCK_TOKENS; block <= last / PL_BLOCK_TOKENS; block++) {
            const int32_t from = PL_MAX(sequence->n_past, block * PL_BLOCK_TOKENS);
            const int32_t to = PL_MIN(last, block * PL_BLOCK_TOKENS + PL_BLOCK_TOKENS - 1);
            for (int32_t head = 0; head < kv->n_head_kv; head++) {
                if (item++ % member->count != member->index) {
                    continue;
                }
                uint8_t *keys = pl_kv_keys(kv, op->n[0], sequence->blocks[block], head);
                uint8_t *values = pl_kv_values(kv, op->n[0], sequence->blocks[block], head);
                for (int32_t position = from; position <= to; position++) {
                    const int64_t t = sequence->first + position - sequence->n_past;
                    const float *table = tables ? tables + t * op->n[2] : NULL;
                    float *key = k + t * kv_stride + (int64_t)head * head_dim;
                    for (int32_t h = head * group; h < (head + 1) * group; h++) {
                        prepare_head(s, op, q + t * q_stride + (int64_t)h * head_dim, op->v[0], table, op->f[1], head_dim);
                    }
                    prepare_head(s, op, key, op->v[1], table, 1.0f, head_dim);
                    pl_kv_put_key(kv, keys, position % PL_BLOCK_TOKENS, key);
                    pl_kv_put_value(kv, values, position % PL_BLOCK_TOKENS, v + t * kv_stride + (int64_t)head * head_dim);
                }
            }
        }
    }
}

static pl_attention_args attention_args(const pl_run_state *s, const pl_op *op) {
    return (pl_attention_args){
        .kernels = s->program->cpu->attention,
        .kv = s->program->kv,
        .layer = op->n[0],
        .n_head = op->n[1],
        .window = op->n[2],
        .softcap = op->f[0],
        .sequences = s->batch->sequences,
        .n_sequences = s->batch->n_sequences,
        .n_tokens = s->batch->n_tokens,
        .q = data_of(s, op->src[0]),
        .out = data_of(s, op->dst[0]),
    };
}

static void op_attention(const pl_run_state *s, const pl_op *op, atomic_int *counters, const pl_member *member) {
    const pl_attention_args args = attention_args(s, op);
    pl_attention_run(&args, s->program->attention_scratch, counters, member);
}

/* ---- the run ------------------------------------------------------------------------------------------------------- */

static void run_op(const pl_run_state *s, const pl_op *op, atomic_int *counters, const pl_member *member) {
    switch (op->kind) {
    case PL_OP_EMBED:
        op_embed(s, op, member);
        break;
    case PL_OP_ROPE_TABLE:
        op_rope_table(s, op, member);
        break;
    case PL_OP_RMS_NORM:
        op_rms_norm(s, op, member);
        break;
    case PL_OP_NORM_ADD:
        op_norm_add(s, op, member);
        break;
    case PL_OP_QUANTIZE:
        op_quantize(s, op, member);
        break;
    case PL_OP_ADD:
        op_add(s, op, member);
        break;
    case PL_OP_SCALE:
        op_scale(s, op, member);
        break;
    case PL_OP_LINEAR:
        op_linear(s, op, counters, member);
        break;
    case PL_OP_GLU:
        op_glu(s, op, counters, member);
        break;
    case PL_OP_QKV:
        op_qkv(s, op, member);
        break;
    case PL_OP_ATTENTION:
        op_attention(s, op, counters, member);
        break;
    case PL_OP_SELECT:
        op_select(s, op, member);
        break;
    case PL_OP_HIDDEN:
        op_hidden(s, op, member);
        break;
    default: /* PL_OP_LOGITS; pl_program_new lets no other kind pass */
        op_logits(s, op, counters, member);
        break;
    }
}

/*
 * With one tile, products wait for memory, and around barriers memory waits: there a member asks for the beginning of
 * the weights that it reads next.
 */
static void look_ahead(const pl_run_state *s, int32_t from, const pl_member *member) {
    enum { LOOK_AHEAD = 4, FETCHED_BYTES = 64 << 10 };
    for (int32_t i = from; i < PL_MIN(from + LOOK_AHEAD, s->program->n_ops); i++) {
        const pl_op *op = &s->program->ops[i];
        if (op->kind != PL_OP_LINEAR && op->kind != PL_OP_GLU && op->kind != PL_OP_LOGITS) {
            continue;
        }
        const operand x = operand_of(s, op->src[0]);
        if (x.n_tiles != 1) {
            return;
        }
        const int32_t n_in_turn = op->kind == PL_OP_GLU ? 1 : 3; /* a gated unit reads both matrices side by side */
        int64_t units = 0;
        for (int32_t j = 0; j < n_in_turn && op->w[j]; j++) {
            units += units_of(op->w[j]);
        }
        int64_t unit = divide(units, &x, member->count).own_units * member->index;
        const pl_weight *const *w = (const pl_weight *const *)op->w;
        for (; unit >= units_of(*w); w++) {
            unit -= units_of(*w);
        }
        for (int32_t j = 0; j < 2; j++) {
            if (j == 0 || op->kind == PL_OP_GLU) {
                member->ahead->at[j] = pl_weight_panel(w[j], unit * UNIT_PANELS);
                member->ahead->end[j] = member->ahead->at[j] +
                                        PL_MIN(FETCHED_BYTES, (w[j]->n_panels - unit * UNIT_PANELS) * w[j]->panel_bytes);
            }
        }
        return;
    }
}

static bool must_meet(const pl_run_state *s, int32_t index, const pl_member *member) {
    if (!s->own || s->program->single.meetings[index] != PL_MEET_UNLESS_HEADS_ARE_KEPT) {
        return !s->own || s->program->single.meetings[index] == PL_MEET;
    }
    const pl_attention_args args = attention_args(s, &s->program->ops[index]);
    return !pl_attention_keeps_heads(&args, member->count);
}

void pl_run_ops(void *run_state, const pl_member *team_member) {
    pl_run_state s = *(const pl_run_state *)run_state;
    const pl_program *p = s.program;
    pl_ahead ahead = {{NULL}, {NULL}};
    pl_member member = *team_member, alone = {0, 1, member.pool, &ahead};
    member.ahead = &ahead;
    if (s.batch->n_tokens == 1 && member.count > 1) {
        s.own = p->single.memory + member.index * p->single.member_bytes;
    }
    for (int32_t i = 0; i < p->n_ops; i++) {
        const pl_op *op = &p->ops[i];
        if (i && must_meet(&s, i, &member)) {
            pl_barrier(&member);
        }
        const int32_t result = op->dst[0] >= 0 ? op->dst[0] : op->dst[1];
        const bool is_own = s.own && result >= 0 && p->single.is_own[result];
        run_op(&s, op, p->counters[i], is_own ? &alone : &member);
        if (op->kind == PL_OP_LINEAR || op->kind == PL_OP_GLU) {
            look_ahead(&s, i + 1, &member);
        }
    }
}

void pl_run_product(void *job_pointer, const pl_member *member) {
    pl_product_job *job = job_pointer;
    const int32_t width = (int32_t)job->w->n_cols, lanes = job->cpu->kernels->max_lanes;
    operand x;
    if (job->q8) {
        const pl_q8 q = pl_q8_view(job->q8, width, job->n, lanes);
        quantize_share(job->cpu->kernels, job->x, &q, member);
        pl_barrier(member);
        x = quantized_operand(q);
    } else {
        x = float_operand(job->x, width, job->n, lanes);
    }
    const destination to = {.w = job->w, .out = job->out, .stride = job->w->n_rows};
    uint8_t *memory = job->unfolding_memory ? job->unfolding_memory + member->index * job->unfolding_bytes : NULL;
    multiply(job->cpu->kernels, &to, 1, &x, memory, &job->next, member);
}

/* weights.c - panels: see weights.h. */
#include "weights.h"

#include "cpu/kernels.h"
#include "pool.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- arenas -------------------------------------------------------------------------------------------------------- */

/* More than any machine has, and no more than there are addresses for. */
static const int64_t most_bytes = (int64_t)PL_MIN((uint64_t)SIZE_MAX / 2, (uint64_t)1 << 46);

struct pl_arena {
    uint8_t *base;
    size_t size, used;
};

PL_API pl_arena *pl_arena_new(int64_t bytes, pl_error *err) {
    if (bytes < 1 || bytes > most_bytes) {
        pl_fail(err, "an arena of %lld bytes was asked for", (long long)bytes);
        return NULL;
    }
    pl_arena *arena = pl_alloc(sizeof *arena, err);
    if (!arena) {
        return NULL;
    }
    arena->size = (size_t)bytes;
    void *p = mmap(NULL, arena->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        pl_fail(err, "out of memory: %lld bytes for weights were asked for", (long long)bytes);
        pl_free(arena);
        return NULL;
    }
    arena->base = p;
#ifdef MADV_HUGEPAGE
    madvise(p, arena->size, MADV_HUGEPAGE); /* a hint: fewer page walks on the way through the weights */
#endif
    return arena;
}

PL_API void pl_arena_free(pl_arena *arena) {
    if (arena) {
        munmap(arena->base, arena->size);
        pl_free(arena);
    }
}

PL_API int32_t pl_arena_lock(pl_arena *arena, pl_error *err) {
    if (mlock(arena->base, arena->size) != 0) {
        return pl_fail(err, "mlock of %zu bytes failed: %s", arena->size, strerror(errno));
    }
    return 0;
}

static uint8_t *arena_take(pl_arena *arena, int64_t bytes, pl_error *err) {
    if ((size_t)bytes > arena->size - arena->used) {
        pl_fail(err, "the weights' arena is full: %zu of %zu bytes used, %lld more asked for", arena->used, arena->size,
                (long long)bytes);
        return NULL;
    }
    uint8_t *p = arena->base + arena->used;
    arena->used += (size_t)bytes;
    return p;
}

/* ---- re-laying ----------------------------------------------------------------------------------------------------- */

static void lay_out(pl_weight *w) {
    const pl_format *f = w->format;
    if (pl_format_is_float(f)) {
        w->panel_bytes = pl_round_up(w->n_cols * PL_PANEL_ROWS * f->block_bytes, 64);
        return;
    }
    const int64_t groups = pl_round_up(w->n_cols / PL_GROUP, pl_line_groups(f->scales));
    w->panel_bytes = pl_place_of(f, groups - 1).codes + pl_code_bytes(f->low_bits, f->two_shift, f->one_shift);
}

/* `out`: where the group's codes begin. */
static void put_codes(const pl_format *f, uint8_t *out, int row, const uint8_t codes[PL_GROUP]) {
    const int low_shift = f->two_shift >= 0 ? f->two_shift : f->one_shift >= 0 ? f->one_shift : 8;
    const uint8_t low_mask = (uint8_t)((1 << low_shift) - 1);
    if (f->low_bits == 8) {
        for (int i = 0; i < 8; i++) {
            memcpy(out + (i * PL_PANEL_ROWS + row) * 4, codes + 4 * i, 4);
        }
    } else if (f->low_bits == 4) {
        for (int i = 0; i < 4; i++) {
            uint8_t *p = out + (i * PL_PANEL_ROWS + row) * 4;
            for (int j = 0; j < 4; j++) {
                p[j] = (uint8_t)((codes[4 * i + j] & low_mask) | (codes[16 + 4 * i + j] & low_mask) << 4);
            }
        }
    }
    if (f->two_shift >= 0) {
        for (int h = 0; h < 2; h++) {
            uint8_t *p = out + pl_two_at(f->low_bits) + (h * PL_PANEL_ROWS + row) * 4;
            for (int j = 0; j < 4; j++) {
                uint8_t bits = 0;
                for (int i = 0; i < 4; i++) {
                    bits |= (uint8_t)((codes[4 * (4 * h + i) + j] >> f->two_shift & 3) << 2 * i);
                }
                p[j] = bits;
            }
        }
    }
    if (f->one_shift >= 0) {
        uint8_t *p = out + pl_one_at(f->low_bits, f->two_shift) + row * 4;
        for (int j = 0; j < 4; j++) {
            uint8_t bits = 0;
            for (int i = 0; i < 8; i++) {
                bits |= (uint8_t)((codes[4 * i + j] >> f->one_shift & 1) << i);
            }
            p[j] = bits;
        }
    }
}

/* The scales of the file's block whose first group is `group`, into a panel. */
static void put_scales(const pl_format *f, uint8_t *panel, int64_t group, int row, const uint8_t *block) {
    uint16_t d, m;
    pl_format_halves(f, block, &d, &m);
    const pl_place first = pl_place_of(f, group);
    if (f->scales == PL_SCALES_D) {
        memcpy(panel + first.line + (group % 2 * PL_PANEL_ROWS + row) * 2, &d, 2);
        return;
    }
    uint8_t *halves = panel + (f->scales == PL_SCALES_DM ? first.line : first.head);
    memcpy(halves + row * 2, &d, 2);
    memcpy(halves + (PL_PANEL_ROWS + row) * 2, &m, 2);
    for (int j = 0; pl_has_heads(f->scales) && j < 256 / f->sub; j++) {
        int32_t scale, min;
        pl_format_factors(f, block, j, &scale, &min);
        const int64_t g = j / (PL_GROUP / f->sub), part = j % (PL_GROUP / f->sub);
        uint8_t *factors = panel + pl_place_of(f, group + g).line + (g % 2 * 2 + part) * PL_PANEL_ROWS + row;
        if (f->scales == PL_SCALES_K32) {
            factors[0] = (uint8_t)scale;
            factors[PL_PANEL_ROWS] = (uint8_t)min;
        } else {
            *factors = (uint8_t)(f->scales == PL_SCALES_K16M ? scale | min << 4 : scale);
        }
    }
}

static int64_t row_bytes(const pl_weight *w) { return w->n_cols / w->format->block_elements * w->format->block_bytes; }

void pl_relay_rows(const pl_weight *w, const uint8_t *data, int64_t n_rows, uint8_t *panel) {
    const pl_format *f = w->format;
    for (int row = 0; row < n_rows; row++) {
        const uint8_t *source = data + row * row_bytes(w);
        if (pl_format_is_float(f)) {
            const int size = f->block_bytes;
            for (int64_t c = 0; c < w->n_cols; c++) {
                memcpy(panel + (c * PL_PANEL_ROWS + row) * size, source + c * size, (size_t)size);
            }
            continue;
        }
        const int groups_per_block = f->block_elements / PL_GROUP;
        for (int64_t group = 0; group < w->n_cols / PL_GROUP; group += groups_per_block, source += f->block_bytes) {
            for (int g = 0; g < groups_per_block; g++) {
                uint8_t codes[PL_GROUP];
                pl_format_codes(f, source, g, codes);
                put_codes(f, panel + pl_place_of(f, group + g).codes, row, codes);
            }
            put_scales(f, panel, group, row, source);
        }
    }
}

/* Where a matrix comes from, and how far the threads are with it. */
typedef struct relay_job {
    const pl_weight *w;
    const uint8_t *data; /* NULL: it is read from the file */
    int file;
    int64_t offset;
    pl_relay relay;
    int64_t step; /* panels that a thread takes at a time */
    atomic_int next;
    atomic_int error; /* that kept a thread from its work: errno, or FILE_ENDS */
} relay_job;

enum { FILE_ENDS = -1 };

/* Reads n bytes from `at` on; 0, errno or FILE_ENDS. */
static int read_all(int file, uint8_t *out, int64_t n, int64_t at) {
    while (n > 0) {
        const ssize_t got = pread(file, out, (size_t)n, (off_t)at);
        if (got > 0) {
            out += got;
            at += got;
            n -= got;
        } else if (got == 0) {
            return FILE_ENDS;
        } else if (errno != EINTR) {
            return errno;
        }
    }
    return 0;
}

/* Panels first .. last - 1, from rows that lie one behind the other at `data`. */
static void relay_panels(const relay_job *job, const uint8_t *data, int64_t first, int64_t last) {
    const pl_weight *w = job->w;
    for (int64_t panel = first; panel < last; panel++, data += PL_PANEL_ROWS * row_bytes(w)) {
        const int64_t n_rows = PL_MIN(w->n_rows - panel * PL_PANEL_ROWS, PL_PANEL_ROWS);
        uint8_t *out = w->panels + panel * w->panel_bytes;
        if (n_rows == PL_PANEL_ROWS) {
            job->relay(w, data, out);
        } else {
            pl_relay_rows(w, data, n_rows, out); /* the other rows are zero, as fresh memory is */
        }
    }
}

static void relay(void *context, const pl_member *member) {
    (void)member;
    relay_job *job = context;
    const pl_weight *w = job->w;
    const int64_t most_rows = PL_MIN(job->step * PL_PANEL_ROWS, w->n_rows);
    uint8_t *buffer = job->data ? NULL : malloc((size_t)(most_rows * row_bytes(w)));
    int error = job->data || buffer ? 0 : ENOMEM;
    while (!error) {
        const int64_t first = (int64_t)pl_claim(&job->next) * job->step, last = PL_MIN(first + job->step, w->n_panels);
        if (first >= w->n_panels) {
            break;
        }
        const int64_t begin = first * PL_PANEL_ROWS * row_bytes(w), end = PL_MIN(last * PL_PANEL_ROWS, w->n_rows) * row_bytes(w);
        if (!job->data) {
            error = read_all(job->file, buffer, end - begin, job->offset + begin);
        }
        if (!error) {
            relay_panels(job, job->data ? job->data + begin : buffer, first, last);
        }
    }
    if (error) {
        atomic_store(&job->error, error);
    }
    free(buffer);
}

static int32_t describe(pl_weight *w, int32_t type, int64_t n_rows, int64_t n_cols, pl_error *err) {
    w->format = pl_format_of(type);
    if (!w->format) {
        return pl_fail(err, "tensor type %d is not one that pyllama reads", type);
    }
    if (n_rows < 1 || n_cols < 1 || n_rows > INT32_MAX || n_cols > INT32_MAX / 64 || n_cols % w->format->block_elements) {
        return pl_fail(err, "a matrix of %lld rows of %lld columns cannot be of tensor type %d", (long long)n_rows,
                       (long long)n_cols, type);
    }
    w->n_rows = n_rows;
    w->n_cols = n_cols;
    w->n_panels = (n_rows + PL_PANEL_ROWS - 1) / PL_PANEL_ROWS;
    lay_out(w);
    if (w->n_panels * w->panel_bytes > most_bytes) {
        return pl_fail(err, "a matrix of %lld rows of %lld columns does not fit into memory", (long long)n_rows, (long long)n_cols);
    }
    return 0;
}

PL_API int64_t pl_weight_panel_bytes(int32_t type, int64_t n_rows, int64_t n_cols, pl_error *err) {
    pl_weight w = {0};
    return describe(&w, type, n_rows, n_cols, err) < 0 ? -1 : w.n_panels * w.panel_bytes;
}

/* A matrix whose panels have yet to be filled. */
static pl_weight *unfilled(pl_arena *arena, int32_t type, int64_t n_rows, int64_t n_cols, int64_t n_bytes, pl_error *err) {
    pl_weight *w = pl_alloc(sizeof *w, err);
    if (!w) {
        return NULL;
    }
    if (describe(w, type, n_rows, n_cols, err) < 0) {
        pl_free(w);
        return NULL;
    }
    if (pl_type_bytes(type, n_rows, n_cols) != n_bytes) {
        pl_fail(err, "a matrix of %lld rows of %lld columns of tensor type %d does not take %lld bytes", (long long)n_rows,
                (long long)n_cols, type, (long long)n_bytes);
        pl_free(w);
        return NULL;
    }
    const int64_t bytes = w->n_panels * w->panel_bytes;
    w->owns_memory = !arena;
    w->panels = arena ? arena_take(arena, bytes, err) : pl_alloc((size_t)bytes, err);
    if (!w->panels) {
        pl_free(w);
        return NULL;
    }
    return w;
}

/* Fills the panels; `source` tells where from. Frees the matrix on failure. */
static pl_weight *filled(pl_weight *w, relay_job source, pl_pool *pool, pl_error *err) {
    /* What a thread reads at once and what it makes of it stay in its second-level cache. */
    enum { MOST_AT_ONCE = 128 << 10, PIECES_PER_THREAD = 4 };
    if (!w) {
        return NULL;
    }
    const int64_t pieces = PIECES_PER_THREAD * pl_pool_size(pool), fair = (w->n_panels + pieces - 1) / pieces;
    source.w = w;
    source.relay = pl_cpu()->relay;
    source.step = PL_MAX(PL_MIN(MOST_AT_ONCE / (PL_PANEL_ROWS * row_bytes(w)), fair), 1);
    pl_pool_run(pool, 0, relay, &source);
    const int error = atomic_load(&source.error);
    if (error) {
        if (error == FILE_ENDS) {
            pl_fail(err, "the file ends within it");
        } else {
            pl_fail(err, "it could not be read: %s", strerror(error));
        }
        pl_weight_free(w);
        return NULL;
    }
    return w;
}

PL_API pl_weight *pl_weight_new(pl_arena *arena, int32_t type, int64_t n_rows, int64_t n_cols, const void *data,
                                int64_t n_bytes, pl_pool *pool, pl_error *err) {
    pl_weight *w = unfilled(arena, type, n_rows, n_cols, n_bytes, err);
    return filled(w, (relay_job){.data = data, .file = -1}, pool, err);
}

PL_API pl_weight *pl_weight_read(pl_arena *arena, int32_t type, int64_t n_rows, int64_t n_cols, int32_t file, int64_t offset,
                                 int64_t n_bytes, pl_pool *pool, pl_error *err) {
    pl_weight *w = unfilled(arena, type, n_rows, n_cols, n_bytes, err);
    return filled(w, (relay_job){.file = file, .offset = offset}, pool, err);
}

PL_API void pl_weight_free(pl_weight *w) {
    if (w) {
        if (w->owns_memory) {
            pl_free(w->panels);
        }
        pl_free(w);
    }
}

/* ---- reading back -------------------------------------------------------------------------------------------------- */

void pl_weight_group(const pl_weight *w, int64_t row, int64_t group, uint8_t codes[PL_GROUP], float d[2], float m[2]) {
    const pl_format *f = w->format;
    const uint8_t *panel = pl_weight_panel(w, row / PL_PANEL_ROWS);
    const int r = (int)(row % PL_PANEL_ROWS);
    const pl_place at = pl_place_of(f, group);
    const uint8_t *low = panel + at.codes, *two = low + pl_two_at(f->low_bits);
    const uint8_t *one = low + pl_one_at(f->low_bits, f->two_shift);
    memset(codes, 0, PL_GROUP);
    for (int k = 0; k < PL_GROUP; k++) {
        const int i = k / 4, j = k % 4;
        if (f->low_bits == 8) {
            codes[k] = low[(i * PL_PANEL_ROWS + r) * 4 + j];
        } else if (f->low_bits == 4) {
            codes[k] = low[(i % 4 * PL_PANEL_ROWS + r) * 4 + j] >> 4 * (i / 4) & 15;
        }
        if (f->two_shift >= 0) {
            codes[k] |= (uint8_t)((two[(i / 4 * PL_PANEL_ROWS + r) * 4 + j] >> 2 * (i % 4) & 3) << f->two_shift);
        }
        if (f->one_shift >= 0) {
            codes[k] |= (uint8_t)((one[r * 4 + j] >> i & 1) << f->one_shift);
        }
    }
    const uint8_t *line = panel + at.line;
    if (f->scales == PL_SCALES_D) {
        d[0] = d[1] = pl_f16_to_f32(pl_load_u16(line + (group % 2 * PL_PANEL_ROWS + r) * 2));
        m[0] = m[1] = d[0] * (float)f->offset;
        return;
    }
    const uint8_t *halves = f->scales == PL_SCALES_DM ? line : panel + at.head;
    const float big_d = pl_f16_to_f32(pl_load_u16(halves + 2 * r));
    const float big_m = pl_f16_to_f32(pl_load_u16(halves + 2 * (PL_PANEL_ROWS + r)));
    if (f->scales == PL_SCALES_DM) {
        d[0] = d[1] = big_d;
        m[0] = m[1] = -big_m;
        return;
    }
    for (int i = 0; i < 2; i++) {
        const uint8_t *factors = line + (group % 2 * 2 + (f->sub == PL_GROUP ? 0 : i)) * PL_PANEL_ROWS + r;
        if (f->scales == PL_SCALES_K32) {
            d[i] = big_d * (float)factors[0];
            m[i] = big_m * (float)factors[PL_PANEL_ROWS];
        } else if (f->scales == PL_SCALES_K16M) {
            d[i] = big_d * (float)(*factors & 15);
            m[i] = big_m * (float)(*factors >> 4);
        } else {
            d[i] = big_d * (float)(int8_t)*factors;
            m[i] = d[i] * (float)f->offset;
        }
    }
}

float pl_weight_float(const pl_weight *w, int64_t row, int64_t column) {
    const uint8_t *panel = pl_weight_panel(w, row / PL_PANEL_ROWS);
    const int64_t at = column * PL_PANEL_ROWS + row % PL_PANEL_ROWS;
    float f;
    switch (w->format->type) {
    case PL_F16:
        return pl_f16_to_f32(pl_load_u16(panel + 2 * at));
    case PL_BF16:
        return pl_bf16_to_f32(pl_load_u16(panel + 2 * at));
    default:
        memcpy(&f, panel + 4 * at, 4);
        return f;
    }
}

PL_API int32_t pl_weight_rows(const pl_weight *w, const int32_t *rows, int32_t n, float *out, pl_error *err) {
    for (int32_t i = 0; i < n; i++) {
        if (rows[i] < 0 || rows[i] >= w->n_rows) {
            return pl_fail(err, "row %d was asked for; the matrix has %lld", rows[i], (long long)w->n_rows);
        }
    }
    for (int32_t i = 0; i < n; i++) {
        float *y = out + i * w->n_cols;
        if (pl_format_is_float(w->format)) {
            for (int64_t c = 0; c < w->n_cols; c++) {
                y[c] = pl_weight_float(w, rows[i], c);
            }
            continue;
        }
        for (int64_t group = 0; group < w->n_cols / PL_GROUP; group++) {
            uint8_t codes[PL_GROUP];
            float d[2], m[2];
            pl_weight_group(w, rows[i], group, codes, d, m);
            for (int j = 0; j < PL_GROUP; j++) {
                y[group * PL_GROUP + j] = w->format->offset ? d[j / 16] * (float)(codes[j] - w->format->offset)
                                                            : d[j / 16] * (float)codes[j] - m[j / 16];
            }
        }
    }
    return 0;
}

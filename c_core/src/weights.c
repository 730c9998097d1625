/* weights.c - panels: see weights.h. */
#include "weights.h"

#include "pool.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

/* Where the parts that belong to a group begin in a panel. */
typedef struct place {
    int64_t head, line, codes;
} place;

static inline place place_of(const pl_format *f, int64_t group) {
    /* One or two groups to a line: shifts, since divisions would take longer than a group. */
    const int shift = pl_line_groups(f->scales) - 1;
    const int64_t code_bytes = pl_code_bytes(f->low_bits, f->two_shift, f->one_shift);
    const int64_t line_bytes = PL_LINE_BYTES + (code_bytes << shift);
    const int64_t heads = pl_has_heads(f->scales) ? (int64_t)((uint64_t)group / PL_HEAD_GROUPS) + 1 : 0;
    const int64_t line = (group >> shift) * line_bytes + heads * PL_LINE_BYTES;
    const int64_t lines_since_head = (int64_t)((uint64_t)group % PL_HEAD_GROUPS) >> shift;
    return (place){line - lines_since_head * line_bytes - PL_LINE_BYTES, line,
                   line + PL_LINE_BYTES + (group & shift) * code_bytes};
}

static void lay_out(pl_weight *w) {
    const pl_format *f = w->format;
    if (pl_format_is_float(f)) {
        w->panel_bytes = pl_round_up(w->n_cols * PL_PANEL_ROWS * f->block_bytes, 64);
        return;
    }
    const int64_t groups = pl_round_up(w->n_cols / PL_GROUP, pl_line_groups(f->scales));
    w->panel_bytes = place_of(f, groups - 1).codes + pl_code_bytes(f->low_bits, f->two_shift, f->one_shift);
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
    const place first = place_of(f, group);
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
        uint8_t *factors = panel + place_of(f, group + g).line + (g % 2 * 2 + part) * PL_PANEL_ROWS + row;
        if (f->scales == PL_SCALES_K32) {
            factors[0] = (uint8_t)scale;
            factors[PL_PANEL_ROWS] = (uint8_t)min;
        } else {
            *factors = (uint8_t)(f->scales == PL_SCALES_K16M ? scale | min << 4 : scale);
        }
    }
}

typedef struct relay_job {
    pl_weight *w;
    const uint8_t *data;
    atomic_int next;
} relay_job;

/* Row by row: for the last panel, which may have fewer rows, and for tests of the faster way. */
void pl_relay_rows(pl_weight *w, const uint8_t *data, int64_t panel) {
    const pl_format *f = w->format;
    const int64_t row_bytes = w->n_cols / f->block_elements * f->block_bytes;
    uint8_t *out = w->panels + panel * w->panel_bytes;
    for (int row = 0; row < PL_PANEL_ROWS; row++) {
        const int64_t r = panel * PL_PANEL_ROWS + row;
        if (r >= w->n_rows) {
            return; /* fresh mapped memory is zero */
        }
        const uint8_t *source = data + r * row_bytes;
        if (pl_format_is_float(f)) {
            const int size = f->block_bytes;
            for (int64_t c = 0; c < w->n_cols; c++) {
                memcpy(out + (c * PL_PANEL_ROWS + row) * size, source + c * size, (size_t)size);
            }
            continue;
        }
        const int groups_per_block = f->block_elements / PL_GROUP;
        for (int64_t group = 0; group < w->n_cols / PL_GROUP; group += groups_per_block, source += f->block_bytes) {
            for (int g = 0; g < groups_per_block; g++) {
                uint8_t codes[PL_GROUP];
                pl_format_codes(f, source, g, codes);
                put_codes(f, out + place_of(f, group + g).codes, row, codes);
            }
            put_scales(f, out, group, row, source);
        }
    }
}

/*
 * All rows of a panel at once. Four neighbouring bytes of each row make 16 lanes of 32 bits, in which codes are taken
 * apart and put together; compilers make vectors of loops over them.
 */
typedef uint32_t lanes[PL_PANEL_ROWS];

#define EACH_LANE for (int lane = 0; lane < PL_PANEL_ROWS; lane++)

typedef struct rows {
    const uint8_t *at[PL_PANEL_ROWS]; /* the same block of each row */
} rows;

static inline void load_lanes(const rows *source, int offset, lanes out) {
    EACH_LANE { memcpy(&out[lane], source->at[lane] + offset, 4); }
}

/* 16 bytes of each row. */
static inline void load_four(const rows *source, int offset, lanes out[4]) {
#if defined(__SSE2__)
    for (int row = 0; row < PL_PANEL_ROWS; row += 4) { /* compilers make something slower of the loop below */
        __m128i r[4];
        for (int i = 0; i < 4; i++) {
            r[i] = _mm_loadu_si128((const __m128i *)(source->at[row + i] + offset));
        }
        const __m128i low01 = _mm_unpacklo_epi32(r[0], r[1]), low23 = _mm_unpacklo_epi32(r[2], r[3]);
        const __m128i high01 = _mm_unpackhi_epi32(r[0], r[1]), high23 = _mm_unpackhi_epi32(r[2], r[3]);
        _mm_storeu_si128((__m128i *)&out[0][row], _mm_unpacklo_epi64(low01, low23));
        _mm_storeu_si128((__m128i *)&out[1][row], _mm_unpackhi_epi64(low01, low23));
        _mm_storeu_si128((__m128i *)&out[2][row], _mm_unpacklo_epi64(high01, high23));
        _mm_storeu_si128((__m128i *)&out[3][row], _mm_unpackhi_epi64(high01, high23));
    }
#else
    for (int i = 0; i < 4; i++) {
        load_lanes(source, offset + 4 * i, out[i]);
    }
#endif
}

/* Shifted and masked bits of 32 bytes. */
static inline void load_bits(const rows *source, int offset, int shift, uint32_t mask, lanes codes[8]) {
    load_four(source, offset, codes);
    load_four(source, offset + 16, codes + 4);
    for (int i = 0; i < 8; i++) {
        EACH_LANE { codes[i][lane] = codes[i][lane] >> shift & mask; }
    }
}

/* The nibbles of 16 bytes: the low ones come first. */
static inline void load_nibbles(const rows *source, int offset, lanes codes[8]) {
    load_four(source, offset, codes);
    for (int i = 0; i < 4; i++) {
        EACH_LANE {
            codes[i + 4][lane] = codes[i][lane] >> 4 & 0x0f0f0f0fu;
            codes[i][lane] &= 0x0f0f0f0fu;
        }
    }
}

/* Adds `mask`ed bits of other bytes above those in `codes`: 32 bytes, of which each has the bits of several groups. */
static inline void add_bits(const rows *source, int offset, int shift, uint32_t mask, int above, lanes codes[8]) {
    lanes bits[8];
    load_four(source, offset, bits);
    load_four(source, offset + 16, bits + 4);
    for (int i = 0; i < 8; i++) {
        EACH_LANE { codes[i][lane] |= (bits[i][lane] >> shift & mask) << above; }
    }
}

/* Spreads four bits of each lane over its bytes, as bit 4. */
static inline void add_fifth_bits(const rows *source, int offset, lanes codes[8]) {
    lanes bits;
    load_lanes(source, offset, bits);
    for (int i = 0; i < 8; i++) { /* bit j of the nibble goes to 8j: 1 + 2^7 + 2^14 + 2^21 shifts it there */
        EACH_LANE { codes[i][lane] |= ((bits[lane] >> 4 * i & 15) * 0x00204081u & 0x01010101u) << 4; }
    }
}

/* The same codes as pl_format_codes: column 4i + j is byte j of codes[i]. */
static inline void load_codes(int32_t type, const rows *source, int group, lanes codes[8]) {
    const uint32_t nibbles = 0x0f0f0f0fu, twos = 0x03030303u, ones = 0x01010101u;
    const int half = group / 4, quarter = group % 4;
    switch (type) {
    case PL_Q4_0:
        load_nibbles(source, 2, codes);
        break;
    case PL_Q4_1:
        load_nibbles(source, 4, codes);
        break;
    case PL_Q5_0:
        load_nibbles(source, 6, codes);
        add_fifth_bits(source, 2, codes);
        break;
    case PL_Q5_1:
        load_nibbles(source, 8, codes);
        add_fifth_bits(source, 4, codes);
        break;
    case PL_Q8_0:
        load_bits(source, 2, 0, UINT32_MAX, codes);
        for (int i = 0; i < 8; i++) {
            EACH_LANE { codes[i][lane] ^= 0x80808080u; }
        }
        break;
    case PL_Q2_K:
        load_bits(source, 16 + 32 * half, 2 * quarter, twos, codes);
        break;
    case PL_Q3_K:
        load_bits(source, 32 + 32 * half, 2 * quarter, twos, codes);
        add_bits(source, 0, group, ones, 2, codes);
        break;
    case PL_Q4_K:
        load_bits(source, 16 + 32 * (group / 2), 4 * (group % 2), nibbles, codes);
        break;
    case PL_Q5_K:
        load_bits(source, 48 + 32 * (group / 2), 4 * (group % 2), nibbles, codes);
        add_bits(source, 16, group, ones, 4, codes);
        break;
    default: /* PL_Q6_K */
        load_bits(source, 64 * half + 32 * (quarter % 2), 4 * (quarter / 2), nibbles, codes);
        add_bits(source, 128 + 32 * half, 2 * quarter, twos, 4, codes);
        break;
    }
}

static inline void store_lanes(uint8_t *out, const lanes values) { memcpy(out, values, sizeof(lanes)); }

/* What put_codes does for one row. */
static inline void store_codes(const pl_format *f, uint8_t *out, lanes codes[8]) {
    const int low_shift = f->two_shift >= 0 ? f->two_shift : f->one_shift >= 0 ? f->one_shift : 8;
    const uint32_t low_mask = (low_shift < 8 ? (1u << low_shift) - 1 : 255u) * 0x01010101u;
    for (int i = 0; f->low_bits == 8 && i < 8; i++) {
        store_lanes(out + i * (int)sizeof(lanes), codes[i]);
    }
    for (int i = 0; f->low_bits == 4 && i < 4; i++) {
        lanes low;
        EACH_LANE { low[lane] = (codes[i][lane] & low_mask) | (codes[i + 4][lane] & low_mask) << 4; }
        store_lanes(out + i * (int)sizeof(lanes), low);
    }
    for (int h = 0; f->two_shift >= 0 && h < 2; h++) {
        lanes two = {0};
        for (int i = 0; i < 4; i++) {
            EACH_LANE { two[lane] |= (codes[4 * h + i][lane] >> f->two_shift & 0x03030303u) << 2 * i; }
        }
        store_lanes(out + pl_two_at(f->low_bits) + h * (int)sizeof(lanes), two);
    }
    if (f->one_shift >= 0) {
        lanes one = {0};
        for (int i = 0; i < 8; i++) {
            EACH_LANE { one[lane] |= (codes[i][lane] >> f->one_shift & 0x01010101u) << i; }
        }
        store_lanes(out + pl_one_at(f->low_bits, f->two_shift), one);
    }
}

static inline void load_halves(const rows *source, int offset, uint8_t *out) {
    EACH_LANE { memcpy(out + 2 * lane, source->at[lane] + offset, 2); }
}

/* The factors of a K format's blocks, four to a lane, as they are kept in a panel; what Q4_K and Q5_K have in `mins` the
 * other formats have not. */
static inline void load_factors(int32_t type, const rows *source, lanes factors[4], lanes mins[2]) {
    lanes s[3];
    switch (type) {
    case PL_Q2_K:
    case PL_Q6_K:
        load_four(source, type == PL_Q2_K ? 0 : 192, factors);
        return;
    case PL_Q3_K:
        for (int i = 0; i < 3; i++) {
            load_lanes(source, 96 + 4 * i, s[i]);
        }
        for (int i = 0; i < 4; i++) { /* six bits less 32, without a borrow between the bytes */
            EACH_LANE {
                const uint32_t low = s[i % 2][lane] >> 4 * (i / 2) & 0x0f0f0f0fu, high = s[2][lane] >> 2 * i & 0x03030303u;
                factors[i][lane] = ((low | high << 4 | 0x80808080u) - 0x20202020u) ^ 0x80808080u;
            }
        }
        return;
    default: /* PL_Q4_K, PL_Q5_K */
        for (int i = 0; i < 3; i++) {
            load_lanes(source, 4 + 4 * i, s[i]);
        }
        EACH_LANE {
            factors[0][lane] = s[0][lane] & 0x3f3f3f3fu;
            factors[1][lane] = (s[2][lane] & 0x0f0f0f0fu) | (s[0][lane] >> 2 & 0x30303030u);
            mins[0][lane] = s[1][lane] & 0x3f3f3f3fu;
            mins[1][lane] = (s[2][lane] >> 4 & 0x0f0f0f0fu) | (s[1][lane] >> 2 & 0x30303030u);
        }
        return;
    }
}

/* Byte `j` of numbers that are four to a lane. */
static inline void store_bytes(uint8_t *out, lanes numbers[], int64_t j) {
    EACH_LANE { out[lane] = (uint8_t)(numbers[j / 4][lane] >> 8 * (j % 4)); }
}

/* What put_scales does for one row. */
static inline void store_scales(const pl_format *f, uint8_t *panel, int64_t group, const rows *source) {
    const place first = place_of(f, group);
    if (f->scales == PL_SCALES_D) {
        load_halves(source, f->d_at, panel + first.line + group % 2 * 2 * PL_PANEL_ROWS);
        return;
    }
    uint8_t *halves = panel + (f->scales == PL_SCALES_DM ? first.line : first.head);
    load_halves(source, f->d_at, halves);
    if (f->m_at >= 0) {
        load_halves(source, f->m_at, halves + 2 * PL_PANEL_ROWS);
    }
    if (f->scales == PL_SCALES_DM) {
        return;
    }
    lanes factors[4], mins[2];
    load_factors(f->type, source, factors, mins);
    for (int j = 0; j < 256 / f->sub; j++) {
        const int64_t g = j / (PL_GROUP / f->sub), part = j % (PL_GROUP / f->sub);
        uint8_t *out = panel + place_of(f, group + g).line + (g % 2 * 2 + part) * PL_PANEL_ROWS;
        store_bytes(out, factors, j);
        if (f->scales == PL_SCALES_K32) {
            store_bytes(out + PL_PANEL_ROWS, mins, j);
        }
    }
}

static void relay_floats(uint8_t *out, const rows *source, int64_t n_cols, int size) {
    for (int64_t c = 0; c < n_cols; c++, out += PL_PANEL_ROWS * size) {
        if (size == 4) {
            EACH_LANE { memcpy(out + 4 * lane, source->at[lane] + 4 * c, 4); }
        } else {
            EACH_LANE { memcpy(out + 2 * lane, source->at[lane] + 2 * c, 2); }
        }
    }
}

void pl_relay_panel(pl_weight *w, const uint8_t *data, int64_t panel) {
    const pl_format *f = w->format;
    const int64_t row_bytes = w->n_cols / f->block_elements * f->block_bytes, first = panel * PL_PANEL_ROWS;
    uint8_t *out = w->panels + panel * w->panel_bytes;
    if (first + PL_PANEL_ROWS > w->n_rows) {
        pl_relay_rows(w, data, panel);
        return;
    }
    rows source;
    EACH_LANE { source.at[lane] = data + (first + lane) * row_bytes; }
    if (pl_format_is_float(f)) {
        relay_floats(out, &source, w->n_cols, f->block_bytes);
        return;
    }
    const int groups_per_block = f->block_elements / PL_GROUP;
    const uint8_t *ahead = source.at[0] + PL_PANEL_ROWS * row_bytes, *end = data + w->n_rows * row_bytes;
    for (int64_t group = 0; group < w->n_cols / PL_GROUP; group += groups_per_block) {
        /* The next panel's rows, one after the other: sixteen rows side by side are more than processors fetch ahead. */
        for (int64_t i = 0; i < PL_PANEL_ROWS * f->block_bytes && ahead < end; i += 64, ahead += 64) {
            __builtin_prefetch(ahead);
        }
        for (int g = 0; g < groups_per_block; g++) {
            lanes codes[8];
            load_codes(f->type, &source, g, codes);
            store_codes(f, out + place_of(f, group + g).codes, codes);
        }
        store_scales(f, out, group, &source);
        EACH_LANE { source.at[lane] += f->block_bytes; }
    }
}

static void relay(void *context, const pl_member *member) {
    (void)member;
    relay_job *job = context;
    const int32_t step = 8;
    for (;;) {
        const int64_t first = (int64_t)pl_claim(&job->next) * step;
        if (first >= job->w->n_panels) {
            return;
        }
        for (int64_t panel = first; panel < PL_MIN(first + step, job->w->n_panels); panel++) {
            pl_relay_panel(job->w, job->data, panel);
        }
    }
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

PL_API pl_weight *pl_weight_new(pl_arena *arena, int32_t type, int64_t n_rows, int64_t n_cols, const void *data,
                                int64_t n_bytes, pl_pool *pool, pl_error *err) {
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
    relay_job job = {.w = w, .data = data};
    pl_pool_run(pool, 0, relay, &job);
    return w;
}

typedef struct release_job {
    uint8_t *first, *last;
    atomic_int next;
} release_job;

static void release(void *context, const pl_member *member) {
    enum { PIECE = 4 << 20 };
    (void)member;
    release_job *job = context;
    for (;;) {
        const int64_t at = (int64_t)pl_claim(&job->next) * PIECE, left = job->last - job->first - at;
        if (left <= 0) {
            return;
        }
        madvise(job->first + at, (size_t)PL_MIN(PIECE, left), MADV_DONTNEED);
    }
}

PL_API void pl_release_mapping(const void *data, int64_t n_bytes, pl_pool *pool) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)data, end = begin + (uintptr_t)n_bytes;
    const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
    if (first < last) {
        release_job job = {.first = (uint8_t *)first, .last = (uint8_t *)last};
        pl_pool_run(pool, 0, release, &job);
    }
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
    const place at = place_of(f, group);
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

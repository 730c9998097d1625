/*
 * relay.h - a whole panel re-laid with vectors; included by each instruction set's file after it has defined RELAY, the
 * function's name, and LANES, the rows that a register holds 32 bits of. weights.h says what a panel is, formats.c what the
 * blocks are that it is made of.
 *
 * A block's bytes become words: vectors of four neighbouring bytes of each row. From them the planes of the codes are put
 * together for all rows at once.
 */
#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

typedef uint32_t word __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

enum { MOST_WORDS = 52, PLANE_BYTES = 4 * PL_PANEL_ROWS };

static const uint32_t nibbles = 0x0f0f0f0fu, pairs = 0x03030303u, ones = 0x01010101u;

/* The same place in LANES rows. */
typedef struct rows {
    const uint8_t *first;
    int64_t apart;
} rows;

INLINE const uint8_t *row_of(rows source, int row) {
    return source.first + row / 4 * 4 * source.apart + row % 4 * source.apart; /* four rows are one base with three indices */
}

/* ---- transposition ------------------------------------------------------------------------------------------------- */

#if LANES == 16
typedef __m512i reg;
#define LOW_WORDS _mm512_unpacklo_epi32
#define HIGH_WORDS _mm512_unpackhi_epi32
#define LOW_PAIRS _mm512_unpacklo_epi64
#define HIGH_PAIRS _mm512_unpackhi_epi64
INLINE __m128i sixteen(rows source, int64_t offset, int row) {
    return _mm_loadu_si128((const __m128i *)(row_of(source, row) + offset));
}
INLINE reg load_rows(rows source, int64_t offset, int i) {
    reg r = _mm512_castsi128_si512(sixteen(source, offset, i));
    r = _mm512_inserti32x4(r, sixteen(source, offset, i + 4), 1);
    r = _mm512_inserti32x4(r, sixteen(source, offset, i + 8), 2);
    return _mm512_inserti32x4(r, sixteen(source, offset, i + 12), 3);
}
#elif LANES == 8
typedef __m256i reg;
#define LOW_WORDS _mm256_unpacklo_epi32
#define HIGH_WORDS _mm256_unpackhi_epi32
#define LOW_PAIRS _mm256_unpacklo_epi64
#define HIGH_PAIRS _mm256_unpackhi_epi64
INLINE reg load_rows(rows source, int64_t offset, int i) {
    return _mm256_loadu2_m128i((const __m128i *)(row_of(source, i + 4) + offset),
                               (const __m128i *)(row_of(source, i) + offset));
}
#elif defined(__SSE2__)
typedef __m128i reg;
#define LOW_WORDS _mm_unpacklo_epi32
#define HIGH_WORDS _mm_unpackhi_epi32
#define LOW_PAIRS _mm_unpacklo_epi64
#define HIGH_PAIRS _mm_unpackhi_epi64
INLINE reg load_rows(rows source, int64_t offset, int i) {
    return _mm_loadu_si128((const __m128i *)(row_of(source, i) + offset));
}
#elif defined(__aarch64__)
typedef uint32x4_t reg;
#define LOW_WORDS vzip1q_u32
#define HIGH_WORDS vzip2q_u32
#define LOW_PAIRS(a, b) (reg)vzip1q_u64((uint64x2_t)(a), (uint64x2_t)(b))
#define HIGH_PAIRS(a, b) (reg)vzip2q_u64((uint64x2_t)(a), (uint64x2_t)(b))
INLINE reg load_rows(rows source, int64_t offset, int i) { return (reg)vld1q_u8(row_of(source, i) + offset); }
#endif

/* 16 bytes of each row. */
INLINE void load_four(rows source, int64_t offset, word out[4]) {
#ifdef LOW_WORDS /* four rows in each 128 bits: rows i, i + 4, i + 8 and i + 12 of a panel are one register */
    const reg a = load_rows(source, offset, 0), b = load_rows(source, offset, 1);
    const reg c = load_rows(source, offset, 2), d = load_rows(source, offset, 3);
    const reg low_ab = LOW_WORDS(a, b), high_ab = HIGH_WORDS(a, b), low_cd = LOW_WORDS(c, d), high_cd = HIGH_WORDS(c, d);
    out[0] = (word)LOW_PAIRS(low_ab, low_cd);
    out[1] = (word)HIGH_PAIRS(low_ab, low_cd);
    out[2] = (word)LOW_PAIRS(high_ab, high_cd);
    out[3] = (word)HIGH_PAIRS(high_ab, high_cd);
#else
    for (int i = 0; i < 4; i++) {
        for (int row = 0; row < LANES; row++) {
            uint32_t four;
            memcpy(&four, row_of(source, row) + offset + 4 * i, 4);
            out[i][row] = four;
        }
    }
#endif
}

/* n words from `offset` on: at least four. */
INLINE void load_words(rows source, int offset, int n, word *out) {
    UNROLL
    for (int i = 0; i < n; i += 4) {
        const int at = PL_MIN(i, n - 4); /* rather some twice than bytes behind the block */
        load_four(source, offset + 4 * at, out + at);
    }
}

INLINE void store(uint8_t *out, word v) { memcpy(out, &v, sizeof v); }

INLINE void store_halves(uint8_t *out, word v) {
    const halves h = __builtin_convertvector(v, halves);
    memcpy(out, &h, sizeof h);
}

/* The lowest byte of each lane. */
INLINE void store_bytes(uint8_t *out, word v) {
#if LANES == 4 && defined(__aarch64__)
    const uint16x4_t narrow = vmovn_u32((reg)v);
    const uint8x8_t b = vmovn_u16(vcombine_u16(narrow, narrow));
#elif LANES == 4 && defined(__SSE2__)
    const __m128i narrow = _mm_packs_epi32((reg)(v & 255), (reg)(v & 255));
    const __m128i b = _mm_packus_epi16(narrow, narrow);
#elif LANES == 8
    const __m128i low = _mm256_castsi256_si128((reg)(v & 255)), high = _mm256_extracti128_si256((reg)(v & 255), 1);
    const __m128i narrow = _mm_packus_epi32(low, high), b = _mm_packus_epi16(narrow, narrow);
#else /* of this compilers make one instruction, of the other widths one for each lane and more */
    const bytes b = __builtin_convertvector(v, bytes);
#endif
    memcpy(out, &b, LANES);
}

/* ---- codes --------------------------------------------------------------------------------------------------------- */

/* The bits of `mask`, which are at `from`, put at `to`. */
INLINE word moved(word v, int from, int to, uint32_t mask) {
    return (from >= to ? v >> (from - to) : v << (to - from)) & mask << to;
}

/* 32 nibbles, those at `from` of 8 words. */
INLINE void store_nibbles(uint8_t *out, const word v[8], int from) {
    UNROLL
    for (int i = 0; i < 4; i++) {
        store(out + i * PLANE_BYTES, moved(v[i], from, 0, nibbles) | moved(v[i + 4], from, 4, nibbles));
    }
}

/* 32 pairs of bits, those at `from` of 8 words. */
INLINE void store_pairs(uint8_t *out, const word v[8], int from) {
    UNROLL
    for (int h = 0; h < 2; h++, v += 4, out += PLANE_BYTES) {
        store(out, moved(v[0], from, 0, pairs) | moved(v[1], from, 2, pairs) | moved(v[2], from, 4, pairs) |
                       moved(v[3], from, 6, pairs));
    }
}

/* 32 bits, those at `from` of 8 words. */
INLINE void store_ones(uint8_t *out, const word v[8], int from) {
    word one = moved(v[0], from, 0, ones);
    UNROLL
    for (int i = 1; i < 8; i++) {
        one |= moved(v[i], from, i, ones);
    }
    store(out, one);
}

/* Those bits of `mask` change places with those that are `distance` above. */
INLINE word exchanged(word v, int distance, uint32_t mask) {
    const word t = (v ^ v >> distance) & mask;
    return v ^ t ^ t << distance;
}

/* Bit 4i + j comes to 8j + i: bits of the number of a bit change places with each other. */
INLINE word spread(word v) {
    v = exchanged(v, 8 - 1, 0x00aa00aau);
    v = exchanged(v, 4 - 1, 0x0a0a0a0au);
    v = exchanged(v, 4 - 2, 0x0c0c0c0cu);
    return exchanged(v, 16 - 4, 0x0000f0f0u);
}

/* The codes of group `g` of a block, of which these are the words. */
INLINE void store_codes(const pl_format *f, const word *v, int g, uint8_t *out) {
    uint8_t *two = out + pl_two_at(f->low_bits), *one = out + pl_one_at(f->low_bits, f->two_shift);
    const int half = g / 4, quarter = g % 4;
    switch (f->type) {
    case PL_Q8_0: /* signed in the file */
        UNROLL
        for (int i = 0; i < 8; i++) {
            store(out + i * PLANE_BYTES, v[i] ^ 0x80808080u);
        }
        break;
    case PL_Q2_K:
        store_pairs(two, v + 4 + 8 * half, 2 * quarter);
        break;
    case PL_Q3_K:
        store_pairs(two, v + 8 + 8 * half, 2 * quarter);
        store_ones(one, v, g);
        break;
    case PL_Q4_K:
        store_nibbles(out, v + 4 + 8 * (g / 2), 4 * (g % 2));
        break;
    case PL_Q5_K:
        store_nibbles(out, v + 12 + 8 * (g / 2), 4 * (g % 2));
        store_ones(one, v + 4, g);
        break;
    case PL_Q6_K:
        store_nibbles(out, v + 16 * half + 8 * (quarter % 2), 4 * (quarter / 2));
        store_pairs(two, v + 32 + 8 * half, 2 * quarter);
        break;
    default: /* nibbles are paired in the file as in a panel */
        if (f->m_at >= 0) {
            v++;
        }
        if (f->one_shift >= 0) {
            store(one, spread(*v++));
        }
        UNROLL
        for (int i = 0; i < 4; i++) {
            store(out + i * PLANE_BYTES, v[i]);
        }
        break;
    }
}

/* ---- scales -------------------------------------------------------------------------------------------------------- */

/* The factors of a K format's block, four to a word, as they are kept in a panel; only Q4_K and Q5_K have some in `mins`. */
INLINE void take_factors(int type, const word *v, word factors[4], word mins[2]) {
    switch (type) {
    case PL_Q2_K:
    case PL_Q6_K:
        UNROLL
        for (int i = 0; i < 4; i++) {
            factors[i] = v[i + (type == PL_Q2_K ? 0 : 48)];
        }
        break;
    case PL_Q3_K:
        UNROLL
        for (int i = 0; i < 4; i++) { /* six bits less 32, without a borrow between the bytes */
            const word six = moved(v[24 + i % 2], 4 * (i / 2), 0, nibbles) | moved(v[26], 2 * i, 4, pairs);
            factors[i] = ((six | 0x80808080u) - 0x20202020u) ^ 0x80808080u;
        }
        break;
    default: /* PL_Q4_K, PL_Q5_K */
        factors[0] = v[1] & 0x3f3f3f3fu;
        factors[1] = moved(v[3], 0, 0, nibbles) | moved(v[1], 6, 4, pairs);
        mins[0] = v[2] & 0x3f3f3f3fu;
        mins[1] = moved(v[3], 4, 0, nibbles) | moved(v[2], 6, 4, pairs);
        break;
    }
}

/* The scales of the block whose first group is `group`, for rows that begin at `row` of the panel. */
INLINE void store_scales(const pl_format *f, rows source, const word *v, uint8_t *panel, int64_t group, int row) {
    const pl_place first = pl_place_of(f, group);
    uint8_t *d = panel + (pl_has_heads(f->scales) ? first.head : first.line) + 2 * row;
    if (f->m_at >= 0) {
        store_halves(d, v[f->d_at / 4]);
        store_halves(d + 2 * PL_PANEL_ROWS, v[f->d_at / 4] >> 16);
    } else {
        d += f->scales == PL_SCALES_D ? group % 2 * 2 * PL_PANEL_ROWS : 0;
        UNROLL
        for (int i = 0; i < LANES; i++) {
            memcpy(d + 2 * i, row_of(source, i) + f->d_at, 2);
        }
    }
    if (!pl_has_heads(f->scales)) {
        return;
    }
    word factors[4], mins[2];
    take_factors(f->type, v, factors, mins);
    const int parts = f->sub == PL_GROUP ? 1 : 2;
    UNROLL
    for (int j = 0; j < PL_HEAD_GROUPS * parts; j++) {
        const int g = j / parts, part = j % parts;
        uint8_t *out = panel + pl_place_of(f, group + g).line + (g % 2 * 2 + part) * PL_PANEL_ROWS + row;
        store_bytes(out, factors[j / 4] >> 8 * (j % 4));
        if (f->scales == PL_SCALES_K32) {
            store_bytes(out + PL_PANEL_ROWS, mins[j / 4] >> 8 * (j % 4));
        }
    }
}

/* ---- panels -------------------------------------------------------------------------------------------------------- */

/* The columns of a float format, for rows that begin at `row` of the panel. */
INLINE void relay_floats(int size, rows source, int64_t n_cols, uint8_t *panel, int row) {
    const int64_t column_bytes = size * PL_PANEL_ROWS, row_bytes = size * n_cols;
    uint8_t *out = panel + size * row;
    int64_t at = 0;
    for (; at + 16 <= row_bytes; at += 16) {
        word v[4];
        load_four(source, at, v);
        UNROLL
        for (int i = 0; i < 4; i++) {
            if (size == 4) {
                store(out, v[i]);
            } else {
                store_halves(out, v[i]);
                store_halves(out + column_bytes, v[i] >> 16);
            }
            out += 4 / size * column_bytes;
        }
    }
    for (; at < row_bytes; at += size, out += column_bytes) {
        for (int i = 0; i < LANES; i++) {
            memcpy(out + size * i, row_of(source, i) + at, (size_t)size);
        }
    }
}

INLINE void relay_block(const pl_format *f, rows source, uint8_t *panel, int64_t group, int row) {
    const int offset = f->scales == PL_SCALES_D ? 2 : 0; /* codes behind a lone half are not at a multiple of four */
    word v[MOST_WORDS];
    load_words(source, offset, (f->block_bytes - offset) / 4, v);
    UNROLL
    for (int g = 0; g < f->block_elements / PL_GROUP; g++) {
        store_codes(f, v, g, panel + pl_place_of(f, group + g).codes + 4 * row);
    }
    store_scales(f, source, v, panel, group, row);
}

INLINE void relay_panel(const pl_format *f, const pl_weight *w, const uint8_t *data, uint8_t *panel) {
    const int64_t row_bytes = w->n_cols / f->block_elements * f->block_bytes;
    if (pl_format_is_float(f)) {
        for (int row = 0; row < PL_PANEL_ROWS; row += LANES) {
            relay_floats(f->block_bytes, (rows){data + row * row_bytes, row_bytes}, w->n_cols, panel, row);
        }
        return;
    }
    const int groups_per_block = PL_MAX(f->block_elements / PL_GROUP, 1);
    for (int64_t group = 0; group < w->n_cols / PL_GROUP; group += groups_per_block, data += f->block_bytes) {
        for (int row = 0; row < PL_PANEL_ROWS; row += LANES) {
            relay_block(f, (rows){data + row * row_bytes, row_bytes}, panel, group, row);
        }
    }
}

/* With the format's members as constants. */
#define CASE(type, ...)                                                                                                     \
    case type: {                                                                                                            \
        static const pl_format f = {type, __VA_ARGS__};                                                                     \
        relay_panel(&f, w, data, out);                                                                                      \
        return;                                                                                                             \
    }

void RELAY(const pl_weight *w, const uint8_t *data, uint8_t *out) {
    switch (w->format->type) {
        PL_FLOAT_FORMATS(CASE)
        PL_QUANTIZED_FORMATS(CASE)
    }
}

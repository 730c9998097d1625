/*
 * attention_vectors.h - attention's inner loops over vectors in the compiler's portable vector type; included by each
 * instruction set's file after it has defined
 *
 *   VECTOR_BYTES        the size of a register: 64, 32 or 16. Compilers make slow code of vectors that are larger
 *   WIDEN(p)            as many halves at p as floats
 *   LARGEST(v)          the largest lane
 *   ALL(x)              x in every lane
 *   ROWS, SIZES(DO, x)  how many rows are taken together at most, and DO(n, x) for each number that may be
 *   COLUMNS(n)          vectors of V that n rows take together, at most MOST_COLUMNS
 *   WIDEN_KEYS_FROM, WIDEN_VALUES_FROM: see attention_kernels.h
 *   TABLE               the name of the kernel table
 *
 * and, if it has instructions for them,
 *
 *   ROUND(x)            to whole numbers
 *   SCALE(x, n)         x * 2^n
 *   LARGER(a, b)        lane by lane; b if one of them is not a number
 *   PAIRS(a, b)         two vectors of floats as pairs (a[i], b[i]) of bfloat16
 *   NEIGHBOURS(a, b)    the same as pairs (a[0], a[1]), (a[2], a[3]) ... (b[14], b[15]) of vectors of 64 bytes
 *   ADD_PAIRS(s, x, y)  s + the products of both numbers of each pair
 *   ADD_FOURS(s, u, x)  s + the products of the four numbers in each lane, unsigned bytes times signed ones
 *   STORE_BYTES(p, v)   the lanes of v as bytes
 *   WHOLE(x)            as whole numbers
 */
#include "attention_kernels.h"

#include <math.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LOG2_E 1.44269504f

typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));

enum { LANES = VECTOR_BYTES / 4, BLOCK_VECTORS = PL_BLOCK_TOKENS / LANES, MOST_COLUMNS = 8 };

#ifdef PAIRS
enum { WIDE = PL_KV_PAIRS };
#else
enum { WIDE = PL_KV_F32 };
#endif

enum { FOURS = PL_KV_GROUP / 4, GROUP_VECTORS = PL_KV_GROUP / LANES };

/* `x` may be the bits of a pair, on which no arithmetic may be done. */
INLINE floats all(float x) { return ALL(x); }

INLINE floats load(const float *p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, floats v) { memcpy(p, &v, sizeof v); }

/* A vector of elements, or of pairs. */
INLINE floats load_as(int type, const void *p, int64_t index) {
    return type == PL_KV_F16 ? WIDEN((const uint16_t *)p + index) : load((const float *)p + index);
}

/* Whether elements are multiplied in pairs: where there are such products, halves become pairs on their way from the block, as
 * they do when it is widened, and with the same results. */
INLINE bool in_pairs(int type) {
#ifdef PAIRS
    return type == PL_KV_PAIRS || type == PL_KV_F16;
#else
    (void)type;
    return false;
#endif
}

/* Rows of a block, elements of K or tokens of V, that a step takes. */
INLINE int rows_of_step(int type) { return in_pairs(type) && type == PL_KV_F16 ? 2 : 1; }

/* What step `step` takes of a block whose rows are `width` wide, from column `at` on; `alone`: there is no second row. */
INLINE floats load_step(int type, const void *p, int64_t step, int64_t width, int64_t at, bool alone) {
#ifdef PAIRS
    if (rows_of_step(type) == 2) {
        return PAIRS(load_as(type, p, 2 * step * width + at), alone ? all(0.0f) : load_as(type, p, (2 * step + 1) * width + at));
    }
#endif
    (void)alone;
    return load_as(type, p, step * width + at);
}

/* Byte b of each four of bytes, as codes: for q4_0, its lower or upper half. */
INLINE floats code_of(int type, bool keys, ints fours, int b, int upper) {
    if (type == PL_KV_Q4_0) {
        return __builtin_convertvector(((fours >> (8 * b + 4 * upper)) & 15) - 8, floats);
    }
    return __builtin_convertvector(keys ? ((fours >> (8 * b)) & 255) - 128 : fours << (24 - 8 * b) >> 24, floats);
}

INLINE ints load_fours(const void *p) {
    ints v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* first, first + 1, ... */
INLINE ints numbers_from(int32_t first) {
    static const int32_t lane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_fours(lane) + first;
}

INLINE floats multiply_add(int type, floats sum, floats x, floats y) {
#ifdef PAIRS
    if (in_pairs(type)) {
        return ADD_PAIRS(sum, x, y);
    }
#endif
    (void)type;
    return sum + x * y;
}

/* 2^x for |x| <= 1/2: Cephes' polynomial (Moshier). */
INLINE floats polynomial(floats x) {
    floats p = all(1.535336188319500e-4f);
    p = p * x + all(1.339887440266574e-3f);
    p = p * x + all(9.618437357674640e-3f);
    p = p * x + all(5.550332471162809e-2f);
    p = p * x + all(2.402264791363012e-1f);
    p = p * x + all(6.931472028550421e-1f);
    return p * x + all(1.0f);
}

INLINE floats choose(ints mask, floats yes, floats no) { return (floats)(((ints)yes & mask) | ((ints)no & ~mask)); }

/* Lane by lane; b where a is no number. */
INLINE floats larger(floats a, floats b) {
#ifdef LARGER
    return LARGER(a, b);
#else
    return choose(a > b, a, b);
#endif
}

/* 2^(x - exponent) for a whole exponent, which the bits of the fraction do not depend on; 0 far below. */
INLINE floats power_of_two(floats x, float exponent) {
#ifdef SCALE
    x = LARGER(all(exponent - 200.0f), x);
    const floats n = ROUND(x);
    return SCALE(polynomial(x - n), n - all(exponent));
#else
    const floats magic = all(12582912.0f), least = all(exponent - 127.0f); /* 1.5 * 2^23: adding it rounds to whole numbers */
    x = choose(x < least, least, x);
    const floats n = (x + magic) - magic;
    const ints scale = (__builtin_convertvector(n - all(exponent), ints) + 127) << 23; /* 0 for -127 */
    return polynomial(x - n) * (floats)scale;
#endif
}

INLINE floats size_of(floats x) { return (floats)((ints)x & INT32_MAX); }

/* cap * tanh(x / cap) */
INLINE floats cap_softly(floats x, float cap) {
    const ints sign = (ints)x & INT32_MIN;
    const floats e = power_of_two(size_of(x) * all(-2 * LOG2_E / cap), 0.0f); /* e^(-2 size / cap) */
    const floats y = all(cap) * (all(1.0f) - e) / (all(1.0f) + e);
    return (floats)((ints)y | sign);
}

/* ---- scores of blocks ---------------------------------------------------------------------------------------------- */

/* Blocks that n rows take together: a row alone would not fill the multipliers, and memory is read faster as one stream. The
 * order of a row's sums is the same for every n, so that a token's result does not depend on what else is in the batch. */
#define AT_ONCE(n) ((n) > 1 ? 1 : ROWS >= 8 ? 4 : 2)

/*
 * q of n rows times K of some blocks, [n_rows][32] each; a step takes an element, or a pair. q is packed as
 * [steps / LANES][n][LANES], so that one register finds all rows.
 */
INLINE void score(int n, int n_blocks, int type, const float *q, const void *const *keys, const void *const *next,
                  int32_t n_rows, float *scores) {
    const int bytes = type == PL_KV_F16 ? 2 : 4, rows = rows_of_step(type);
    const int32_t n_steps = (n_rows + rows - 1) / rows;
    floats s[PL_SPAN_BLOCKS][ROWS][BLOCK_VECTORS];
    UNROLL for (int b = 0; b < n_blocks; b++) {
        UNROLL for (int r = 0; r < n; r++) {
            UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
                s[b][r][v] = all(0.0f);
            }
        }
    }
    for (int32_t step = 0; step < n_steps; step += LANES, q += n * LANES) {
        const int32_t count = PL_MIN(LANES, n_steps - step);
        for (int32_t i = 0; i < count; i++) {
            const int64_t row = (int64_t)(step + i) * rows;
            UNROLL for (int b = 0; b < n_blocks; b++) {
                UNROLL for (int line = 0; line < rows * PL_BLOCK_TOKENS * bytes; line += 64) {
                    __builtin_prefetch((const char *)next[b] + row * PL_BLOCK_TOKENS * bytes + line);
                }
                floats k[BLOCK_VECTORS];
                UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
                    k[v] = load_step(type, keys[b], step + i, PL_BLOCK_TOKENS, v * LANES, row + 1 == n_rows);
                }
                UNROLL for (int r = 0; r < n; r++) {
                    const floats x = all(q[r * LANES + i]);
                    UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
                        s[b][r][v] = multiply_add(type, s[b][r][v], x, k[v]);
                    }
                }
            }
        }
    }
    UNROLL for (int b = 0; b < n_blocks; b++) {
        UNROLL for (int r = 0; r < n; r++) {
            UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
                store(scores + r * PL_SPAN_TOKENS + b * PL_BLOCK_TOKENS + v * LANES, s[b][r][v]);
            }
        }
    }
}

#ifdef ADD_FOURS
enum { SCALE_AT = FOURS, START_AT }; /* places of a group of q: codes, scale, what a sum starts with */

/* The same for quantized K and q, packed as [head_dim / 32][n][16]. */
INLINE void score_quantized(int n, int type, const float *q, const void *keys, const char *next, int32_t head_dim, float *scores) {
    const uint8_t *codes = keys;
    const uint16_t *scales = (const uint16_t *)(codes + pl_kv_scales(type, head_dim));
    const int per_load = type == PL_KV_Q4_0 ? 2 : 1; /* fours of a load */
    floats s[ROWS][BLOCK_VECTORS];
    UNROLL for (int r = 0; r < n; r++) {
        UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
            s[r][v] = all(0.0f);
        }
    }
    for (int32_t group = 0; group < head_dim / PL_KV_GROUP; group++, q += n * PL_LANES, scales += PL_BLOCK_TOKENS) {
        ints sum[ROWS][BLOCK_VECTORS];
        UNROLL for (int r = 0; r < n; r++) {
            UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
                sum[r][v] = (ints)all(q[r * PL_LANES + START_AT]);
            }
        }
        __builtin_prefetch(next + ((const char *)scales - (const char *)keys));
        for (int i = 0; i < FOURS; i += per_load, codes += 4 * PL_BLOCK_TOKENS) {
            __builtin_prefetch(next + (codes - (const uint8_t *)keys));
            __builtin_prefetch(next + (codes - (const uint8_t *)keys) + 64);
            UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
                const ints bytes = load_fours(codes + v * VECTOR_BYTES);
                UNROLL for (int part = 0; part < per_load; part++) {
                    const ints fours = type == PL_KV_Q4_0 ? (bytes >> (4 * part)) & 0x0f0f0f0f : bytes;
                    UNROLL for (int r = 0; r < n; r++) {
                        sum[r][v] = ADD_FOURS(sum[r][v], fours, (ints)all(q[r * PL_LANES + i + part]));
                    }
                }
            }
        }
        UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
            const floats scale = WIDEN(scales + v * LANES);
            UNROLL for (int r = 0; r < n; r++) {
                s[r][v] += __builtin_convertvector(sum[r][v], floats) * (scale * all(q[r * PL_LANES + SCALE_AT]));
            }
        }
    }
    UNROLL for (int r = 0; r < n; r++) {
        UNROLL for (int v = 0; v < BLOCK_VECTORS; v++) {
            store(scores + r * PL_SPAN_TOKENS + v * LANES, s[r][v]);
        }
    }
}

/* 32 elements of q as bytes with a scale, as score_quantized() wants them. */
INLINE void pack_quantized(int32_t key_type, const float *q, float *packed) {
    floats largest = all(0.0f);
    UNROLL for (int d = 0; d < PL_KV_GROUP; d += LANES) {
        const floats size = size_of(load(q + d));
        largest = choose(size > largest, size, largest);
    }
    const float scale = LARGEST(largest) / 127, inverse = scale != 0 ? 1 / scale : 0;
    int8_t codes[PL_KV_GROUP];
    UNROLL for (int d = 0; d < PL_KV_GROUP; d += LANES) {
        STORE_BYTES(codes + d, WHOLE(load(q + d) * all(inverse)));
    }
    int32_t sum = 0;
    for (int i = 0; i < PL_KV_GROUP; i++) {
        sum += codes[i];
    }
    sum *= key_type == PL_KV_Q8_0 ? -128 : -8; /* what is added to K's codes */
    memcpy(packed, codes, sizeof codes);
    memcpy(packed + SCALE_AT, &scale, sizeof scale);
    memcpy(packed + START_AT, &sum, sizeof sum);
}
#endif

#define SCORE(n, type)                                                                                                      \
    case n:                                                                                                                 \
        for (; begin + AT_ONCE(n) <= end; begin += AT_ONCE(n)) {                                                            \
            score(n, AT_ONCE(n), type, q, span->keys + begin, span->next_keys + begin, n_rows,                              \
                  scores + begin * PL_BLOCK_TOKENS);                                                                        \
        }                                                                                                                   \
        for (; begin < end; begin++) {                                                                                      \
            score(n, 1, type, q, span->keys + begin, span->next_keys + begin, n_rows, scores + begin * PL_BLOCK_TOKENS);    \
        }                                                                                                                   \
        break;
#define SCORE_QUANTIZED(n, type)                                                                                            \
    case n:                                                                                                                 \
        for (; begin < end; begin++) {                                                                                      \
            score_quantized(n, type, q, span->keys[begin], span->next_keys[begin], head_dim,                                \
                            scores + begin * PL_BLOCK_TOKENS);                                                              \
        }                                                                                                                   \
        break;

/* Scores of n rows with the span's blocks [begin, end): scores[n][PL_SPAN_TOKENS]. */
static void score_blocks(int32_t n, const float *q, const pl_attention_span *span, int32_t head_dim, int32_t begin, int32_t end,
                         float *scores) {
    const int32_t n_rows = span->key_type == PL_KV_PAIRS ? (head_dim + 1) / 2 : head_dim;
    switch (span->key_type) {
    case PL_KV_F16:
        switch (n) { SIZES(SCORE, PL_KV_F16) }
        break;
    case PL_KV_F32:
        switch (n) { SIZES(SCORE, PL_KV_F32) }
        break;
#ifdef PAIRS
    case PL_KV_PAIRS:
        switch (n) { SIZES(SCORE, PL_KV_PAIRS) }
        break;
#endif
#ifdef ADD_FOURS
    case PL_KV_Q8_0:
        switch (n) { SIZES(SCORE_QUANTIZED, PL_KV_Q8_0) }
        break;
    case PL_KV_Q4_0:
        switch (n) { SIZES(SCORE_QUANTIZED, PL_KV_Q4_0) }
        break;
#endif
    }
}

/* ---- weights of a span --------------------------------------------------------------------------------------------- */

/* Stores the weights of vectors v and v + 1 in the order of tokens, as pairs in the first half of the room or as they are. */
INLINE void store_weights(bool as_pairs, float *s, int32_t v, floats a, floats b) {
#ifdef PAIRS
    if (as_pairs) {
        store(s + v / 2 * LANES, NEIGHBOURS(a, b));
        return;
    }
#endif
    (void)as_pairs;
    store(s + v * LANES, a);
    store(s + (v + 1) * LANES, b);
}

/* The softmax of row r as it goes on: the scores of the span's vectors [begin, end) become weights, 0 where the row does not look.
 * Returns by how much what was summed before shrinks. */
INLINE float soften(bool as_pairs, pl_attention_rows *rows, int32_t r, float *s, int32_t from, int32_t to, int32_t begin,
                    int32_t end) {
    if (from >= to) {
        memset(s, 0, sizeof(float) * PL_SPAN_TOKENS);
        return 1.0f;
    }
    floats largest = all(-INFINITY);
    const bool all_as_they_are = from <= begin * LANES && to >= end * LANES && rows->softcap == 0;
    for (int32_t v = begin; v < end && all_as_they_are; v++) {
        largest = larger(load(s + v * LANES), largest);
    }
    for (int32_t v = begin; v < end && !all_as_they_are; v++) {
        floats x = load(s + v * LANES);
        if (rows->softcap != 0) {
            x = cap_softly(x, rows->softcap);
        }
        if (from > v * LANES || to < (v + 1) * LANES) {
            const ints token = numbers_from(v * LANES);
            x = choose((token >= from) & (token < to), x, all(-INFINITY));
        }
        largest = larger(x, largest);
        store(s + v * LANES, x);
    }
    const float here = LARGEST(largest) * LOG2_E;
    float shrink = 1.0f;
    if (here > rows->exponent[r] + PL_HEADROOM) {
        shrink = pl_shrink(rows->exponent[r] - rintf(here)); /* 0 at a row's first span */
        rows->exponent[r] = rintf(here);
    }
    floats sum = load(rows->sum + r * PL_LANES) * all(shrink);
    const float exponent = rows->exponent[r];
    for (int32_t v = begin; v < end; v += 2) { /* a block is two vectors or more */
        const floats a = power_of_two(load(s + v * LANES) * all(LOG2_E), exponent);
        const floats b = power_of_two(load(s + (v + 1) * LANES) * all(LOG2_E), exponent);
        sum += a;
        sum += b;
        store_weights(as_pairs, s, v, a, b);
    }
    store(rows->sum + r * PL_LANES, sum);
    return shrink;
}

/* ---- weighted sums ------------------------------------------------------------------------------------------------- */

/* total[n][width] = total * shrink + p[n][..] times V of tokens [first, last), `columns` vectors from column `at` on. */
INLINE void weigh(int n, int columns, int type, const float *p, const pl_attention_span *span, int64_t width, int64_t at,
                  int32_t first, int32_t last, const float *shrink, float *total) {
    const int32_t tokens = in_pairs(type) ? 2 : 1, bytes = type == PL_KV_F16 ? 2 : 4, rows = rows_of_step(type);
    floats sum[ROWS][MOST_COLUMNS];
    UNROLL for (int r = 0; r < n; r++) {
        UNROLL for (int c = 0; c < columns; c++) {
            sum[r][c] = load(total + r * width + at + LANES * c) * all(shrink[r]);
        }
    }
    for (int32_t block = first / PL_BLOCK_TOKENS; block * PL_BLOCK_TOKENS < last; block++) {
        const int32_t base = block * PL_BLOCK_TOKENS / tokens; /* steps before the block */
        const int32_t begin = PL_MAX(first / tokens, base);
        const int32_t end = PL_MIN((last + tokens - 1) / tokens, base + PL_BLOCK_TOKENS / tokens);
        const void *values = span->values[block];
        const char *next = span->next_values[block];
        for (int32_t t = begin; t < end; t++) {
            UNROLL for (int j = 0; j < rows; j++) {
                UNROLL for (int c = 0; c < columns; c += 64 / (LANES * bytes)) {
                    __builtin_prefetch(next + (((t - base) * rows + j) * width + at + LANES * c) * bytes);
                }
            }
            floats v[MOST_COLUMNS];
            UNROLL for (int c = 0; c < columns; c++) { /* what lies behind the last token may be anything */
                v[c] = load_step(type, values, t - base, width, at + LANES * c, tokens * t + 1 == last);
            }
            UNROLL for (int r = 0; r < n; r++) {
                const floats x = all(p[r * PL_SPAN_TOKENS + t]);
                UNROLL for (int c = 0; c < columns; c++) {
                    sum[r][c] = multiply_add(type, sum[r][c], x, v[c]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < n; r++) {
        UNROLL for (int c = 0; c < columns; c++) {
            store(total + r * width + at + LANES * c, sum[r][c]);
        }
    }
}

INLINE void weigh_all(int n, int type, const float *p, const pl_attention_span *span, int32_t head_dim, int32_t first,
                      int32_t last, const float *shrink, float *total) {
    const int64_t width = pl_kv_width(head_dim);
    int64_t at = 0;
    for (; at + LANES * COLUMNS(n) <= width; at += LANES * COLUMNS(n)) {
        weigh(n, COLUMNS(n), type, p, span, width, at, first, last, shrink, total);
    }
    for (; at < width; at += LANES) {
        weigh(n, 1, type, p, span, width, at, first, last, shrink, total);
    }
}

/* Whether V's scales go into the weights, so that codes are multiplied as they are. Where V is also widened to floats, which
 * are codes times scales, those are multiplied here as well, so that results are the same. */
#ifdef ADD_FOURS
enum { SCALED_WEIGHTS = true };
#else
enum { SCALED_WEIGHTS = false };
#endif

/* The same with quantized V. */
INLINE void weigh_quantized(int n, int type, const float *p, const pl_attention_span *span, int32_t head_dim, int32_t first,
                            int32_t last, const float *shrink, float *total) {
    const int32_t columns = type == PL_KV_Q4_0 ? head_dim / 2 : head_dim; /* bytes of a token */
    for (int32_t group = 0; group < head_dim / PL_KV_GROUP; group++) {
        float *own = total + group * PL_KV_GROUP;
        floats sum[ROWS][GROUP_VECTORS];
        UNROLL for (int r = 0; r < n; r++) {
            UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
                sum[r][v] = load(own + (int64_t)r * head_dim + v * LANES) * all(shrink[r]);
            }
        }
        for (int32_t block = first / PL_BLOCK_TOKENS; block * PL_BLOCK_TOKENS < last; block++) {
            const int32_t base = block * PL_BLOCK_TOKENS;
            const uint8_t *values = span->values[block];
            const uint16_t *scales = (const uint16_t *)(values + pl_kv_scales(type, head_dim)) + group * PL_BLOCK_TOKENS;
            _Alignas(64) float scaled[ROWS][PL_BLOCK_TOKENS], scale_of[PL_BLOCK_TOKENS];
            UNROLL for (int t = 0; t < PL_BLOCK_TOKENS; t += LANES) {
                const ints token = numbers_from(base + t);
                const floats scale = choose((token >= first) & (token < last), WIDEN(scales + t), all(0.0f));
                store(scale_of + t, scale);
                UNROLL for (int r = 0; r < n; r++) {
                    const floats weight = load(p + r * PL_SPAN_TOKENS + base + t);
                    store(scaled[r] + t, SCALED_WEIGHTS ? weight * scale : weight);
                }
            }
            const uint8_t *codes = values + (type == PL_KV_Q4_0 ? 64 : 128) * (int64_t)group;
            const char *next = span->next_values[block];
            __builtin_prefetch(next + ((const char *)scales - (const char *)values));
            for (int32_t fours = PL_MAX(0, first - base) / 4; fours < FOURS && base + fours * 4 < last; fours++) {
                const uint8_t *row = codes + (int64_t)fours * columns * 4;
                ints bytes[GROUP_VECTORS];
                UNROLL for (int v = 0; v < GROUP_VECTORS; v++) { /* of q4_0, both halves of a byte */
                    bytes[v] = load_fours(row + (type == PL_KV_Q4_0 ? v % (GROUP_VECTORS / 2) : v) * VECTOR_BYTES);
                }
                __builtin_prefetch(next + (row - values));
                __builtin_prefetch(next + (row - values) + 64);
                UNROLL for (int b = 0; b < 4; b++) {
                    const floats scale = SCALED_WEIGHTS ? all(1.0f) : all(scale_of[fours * 4 + b]);
                    UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
                        const floats codes = code_of(type, false, bytes[v], b, v / (GROUP_VECTORS / 2)) * scale;
                        UNROLL for (int r = 0; r < n; r++) {
                            sum[r][v] += all(scaled[r][fours * 4 + b]) * codes;
                        }
                    }
                }
            }
        }
        UNROLL for (int r = 0; r < n; r++) {
            UNROLL for (int v = 0; v < GROUP_VECTORS; v++) {
                store(own + (int64_t)r * head_dim + v * LANES, sum[r][v]);
            }
        }
    }
}

#define WEIGH(n, type)                                                                                                      \
    case n:                                                                                                                 \
        weigh_all(n, type, p, span, head_dim, first, last, shrink, total);                                                  \
        break;
#define WEIGH_QUANTIZED(n, type)                                                                                            \
    case n:                                                                                                                 \
        weigh_quantized(n, type, p, span, head_dim, first, last, shrink, total);                                            \
        break;

static void weigh_span(int32_t n, const float *p, const pl_attention_span *span, int32_t head_dim, int32_t first, int32_t last,
                       const float *shrink, float *total) {
    switch (span->value_type) {
    case PL_KV_F16:
        switch (n) { SIZES(WEIGH, PL_KV_F16) }
        break;
    case PL_KV_F32:
        switch (n) { SIZES(WEIGH, PL_KV_F32) }
        break;
#ifdef PAIRS
    case PL_KV_PAIRS:
        switch (n) { SIZES(WEIGH, PL_KV_PAIRS) }
        break;
#endif
    case PL_KV_Q8_0:
        switch (n) { SIZES(WEIGH_QUANTIZED, PL_KV_Q8_0) }
        break;
    case PL_KV_Q4_0:
        switch (n) { SIZES(WEIGH_QUANTIZED, PL_KV_Q4_0) }
        break;
    }
}

/* ---- the whole ----------------------------------------------------------------------------------------------------- */

/* How many of the rows that are left are taken together. */
static int32_t piece_of(int32_t left) {
    int32_t n = 1;
#define TAKE(size, unused) n = size <= left ? size : n;
    SIZES(TAKE, )
    return n;
}

/* The elements of a row of q from d on, 0 behind its end. */
INLINE floats q_elements(const float *q, int32_t d, int32_t head_dim) {
    floats v = all(0.0f);
    memcpy(&v, q + d, sizeof(float) * (size_t)PL_MAX(0, PL_MIN(LANES, head_dim - d)));
    return v;
}

static void begin(pl_attention_rows *rows, int32_t key_type) {
    const bool quantized = key_type == PL_KV_Q8_0 || key_type == PL_KV_Q4_0;
    const int32_t head_dim = rows->head_dim, slot = quantized ? PL_LANES : LANES; /* floats that hold .. */
    const int32_t elements = quantized ? PL_KV_GROUP : in_pairs(key_type) ? 2 * LANES : LANES; /* .. so many of q */
    for (int32_t r = 0, n; r < rows->n; r += n) {
        n = piece_of(rows->n - r);
        float *packed = rows->packed_q + r * pl_kv_width(head_dim);
        for (int32_t d = 0; d < head_dim; d += elements, packed += n * slot) {
            for (int32_t i = 0; i < n; i++) {
                const float *q = rows->q[r + i];
#ifdef PAIRS
                if (in_pairs(key_type)) {
                    store(packed + i * slot,
                          NEIGHBOURS(q_elements(q, d, head_dim), q_elements(q, d + LANES, head_dim)));
                    continue;
                }
#endif
#ifdef ADD_FOURS
                if (quantized) {
                    pack_quantized(key_type, q + d, packed + i * slot);
                    continue;
                }
#endif
                store(packed + i * slot, q_elements(q, d, head_dim));
            }
        }
    }
}

static void take_span(pl_attention_rows *rows, const pl_attention_span *span) {
    _Alignas(64) float p[ROWS * PL_SPAN_TOKENS];
    float shrink[ROWS];
    const int64_t width = pl_kv_width(rows->head_dim);
    for (int32_t r = 0, n; r < rows->n; r += n) {
        n = piece_of(rows->n - r);
        int32_t first = PL_SPAN_TOKENS, last = 0;
        for (int32_t i = r; i < r + n; i++) {
            if (span->from[i] < span->to[i]) {
                first = PL_MIN(first, span->from[i]);
                last = PL_MAX(last, span->to[i]);
            }
        }
        if (first >= last) {
            continue;
        }
        const int32_t begin = first / PL_BLOCK_TOKENS, end = (last + PL_BLOCK_TOKENS - 1) / PL_BLOCK_TOKENS; /* blocks */
        score_blocks(n, rows->packed_q + r * width, span, rows->head_dim, begin, end, p);
        for (int32_t i = 0; i < n; i++) {
            float *own = p + i * PL_SPAN_TOKENS;
            const int32_t from = span->from[r + i], to = span->to[r + i];
            shrink[i] = in_pairs(span->value_type)
                            ? soften(true, rows, r + i, own, from, to, BLOCK_VECTORS * begin, BLOCK_VECTORS * end)
                            : soften(false, rows, r + i, own, from, to, BLOCK_VECTORS * begin, BLOCK_VECTORS * end);
        }
        weigh_span(n, p, span, rows->head_dim, first, last, shrink, rows->total + r * width);
    }
}

static void join(pl_attention_rows *whole, const pl_attention_rows *part, int32_t from, int32_t to) {
    const int64_t width = pl_kv_width(whole->head_dim);
    for (int32_t r = from; r < to; r++) {
        const float exponent = fmaxf(whole->exponent[r], part->exponent[r]);
        const floats shrink = all(pl_shrink(whole->exponent[r] - exponent));
        const floats weight = all(pl_shrink(part->exponent[r] - exponent));
        whole->exponent[r] = exponent;
        float *sum = whole->sum + r * PL_LANES, *total = whole->total + r * width;
        store(sum, load(sum) * shrink + load(part->sum + r * PL_LANES) * weight);
        for (int64_t d = 0; d < width; d += LANES) {
            store(total + d, load(total + d) * shrink + load(part->total + r * width + d) * weight);
        }
    }
}

/* ---- widening ------------------------------------------------------------------------------------------------------ */

/* Element d of K of some tokens. */
INLINE floats key_element(int type, int32_t head_dim, const void *keys, int32_t d, int32_t token) {
    if (type == PL_KV_F16 || type == PL_KV_F32) {
        return load_as(type, keys, (int64_t)d * PL_BLOCK_TOKENS + token);
    }
    const int32_t fours = type == PL_KV_Q4_0 ? d / 8 : d / 4;
    const uint16_t *scales = (const uint16_t *)((const uint8_t *)keys + pl_kv_scales(type, head_dim));
    return code_of(type, true, load_fours((const uint8_t *)keys + (fours * PL_BLOCK_TOKENS + token) * 4), d % 4, d / 4 % 2) *
           WIDEN(scales + d / PL_KV_GROUP * PL_BLOCK_TOKENS + token);
}

/* A token's V from column d on. */
INLINE floats value_elements(int type, int32_t head_dim, const void *values, int32_t token, int32_t d) {
    if (type == PL_KV_F16 || type == PL_KV_F32) {
        return load_as(type, values, token * pl_kv_width(head_dim) + d);
    }
    const int32_t columns = type == PL_KV_Q4_0 ? head_dim / 2 : head_dim;
    const int32_t column = type == PL_KV_Q4_0 ? d / PL_KV_GROUP * 16 + d % 16 : d;
    const uint16_t *scales = (const uint16_t *)((const uint8_t *)values + pl_kv_scales(type, head_dim));
    return code_of(type, false, load_fours((const uint8_t *)values + (token / 4 * columns + column) * 4), token % 4, d / 16 % 2) *
           all(pl_f16_to_f32(scales[d / PL_KV_GROUP * PL_BLOCK_TOKENS + token]));
}

INLINE void widen_keys_of(int type, int32_t head_dim, const void *keys, float *wide) {
    for (int32_t token = 0; token < PL_BLOCK_TOKENS; token += LANES) {
#ifdef PAIRS
        for (int32_t d = 0; d < head_dim; d += 2) {
            store(wide + d / 2 * PL_BLOCK_TOKENS + token,
                  PAIRS(key_element(type, head_dim, keys, d, token),
                        d + 1 < head_dim ? key_element(type, head_dim, keys, d + 1, token) : all(0.0f)));
        }
#else
        for (int32_t d = 0; d < head_dim; d++) {
            store(wide + d * PL_BLOCK_TOKENS + token, key_element(type, head_dim, keys, d, token));
        }
#endif
    }
}

INLINE void widen_values_of(int type, int32_t head_dim, const void *values, int32_t n, float *wide) {
    const int64_t width = pl_kv_width(head_dim);
    for (int32_t d = 0; d < width; d += LANES) {
#ifdef PAIRS
        for (int32_t t = 0; t < n; t += 2) {
            store(wide + t / 2 * width + d, PAIRS(value_elements(type, head_dim, values, t, d),
                                                  t + 1 < n ? value_elements(type, head_dim, values, t + 1, d) : all(0.0f)));
        }
#else
        for (int32_t t = 0; t < n; t++) {
            store(wide + t * width + d, value_elements(type, head_dim, values, t, d));
        }
#endif
    }
}

static void widen_keys(int32_t type, int32_t head_dim, const void *keys, void *wide) {
    switch (type) {
    case PL_KV_F16:
        widen_keys_of(PL_KV_F16, head_dim, keys, wide);
        break;
    case PL_KV_Q8_0:
        widen_keys_of(PL_KV_Q8_0, head_dim, keys, wide);
        break;
    default: /* floats are never widened */
        widen_keys_of(PL_KV_Q4_0, head_dim, keys, wide);
        break;
    }
}

static void widen_values(int32_t type, int32_t head_dim, const void *values, int32_t n, void *wide) {
    switch (type) {
    case PL_KV_F16:
        widen_values_of(PL_KV_F16, head_dim, values, n, wide);
        break;
    case PL_KV_Q8_0:
        widen_values_of(PL_KV_Q8_0, head_dim, values, n, wide);
        break;
    default:
        widen_values_of(PL_KV_Q4_0, head_dim, values, n, wide);
        break;
    }
}

const pl_attention_kernels TABLE = {
    .widen_keys_from = WIDEN_KEYS_FROM,
    .widen_values_from = WIDEN_VALUES_FROM,
    .wide_type = WIDE,
    .begin = begin,
    .span = take_span,
    .join = join,
    .widen_keys = widen_keys,
    .widen_values = widen_values,
};

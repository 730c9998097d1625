/*
 * attention_vectors.h - attention's inner loops over vectors of 16 floats, in the compiler's portable vector type; included
 * by each instruction set's file after it has defined
 *
 *   WIDEN16(p)   16 halves at p as 16 floats
 *   ROWS         rows that are taken together: as many as the registers hold
 *   COLUMNS      vectors of V that are taken together
 *   TABLE        the name of the kernel table
 */
#include "attention_kernels.h"

#include <math.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* every function with such an argument is inlined */

#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));

INLINE floats all(float x) { return x - (floats){0}; }

INLINE floats load(const void *p, bool half, int64_t index) {
    if (half) {
        return WIDEN16((const uint16_t *)p + index);
    }
    floats v;
    memcpy(&v, (const float *)p + index, sizeof v);
    return v;
}

INLINE floats choose(ints mask, floats yes, floats no) { return (floats)(((ints)yes & mask) | ((ints)no & ~mask)); }

/* e^x for x <= 0, 0 below -87: Cephes' polynomial (Moshier) on |rest| <= ln(2)/2. */
INLINE floats exponential(floats x) {
    const floats magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to whole numbers */
    const ints tiny = x < all(-87.0f);
    x = choose(tiny, all(-87.0f), x);
    const floats n = (x * all(1.44269504f) + magic) - magic;
    const floats r = (x - n * all(0.693359375f)) - n * all(-2.12194440e-4f);
    floats p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * (r * r) + (r + all(1.0f));
    const ints scale = (__builtin_convertvector(n, ints) + 127) << 23;
    return choose(tiny, all(0.0f), p * (floats)scale);
}

INLINE float largest_of(floats a) {
    float m = a[0];
    for (int i = 1; i < 16; i++) {
        m = m > a[i] ? m : a[i];
    }
    return m;
}

INLINE float sum_of(floats a) {
    float s = 0;
    for (int i = 0; i < 16; i++) {
        s += a[i];
    }
    return s;
}

/* Scores of `n` rows and the block's 32 tokens. */
INLINE void score(int n, bool half, const float *const *q, const void *keys, int32_t head_dim, floats scores[][2]) {
    floats s[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++) {
        s[r][0] = s[r][1] = all(0.0f);
    }
    for (int32_t d = 0; d < head_dim; d++) {
        const floats k0 = load(keys, half, (int64_t)d * PL_BLOCK_TOKENS), k1 = load(keys, half, (int64_t)d * PL_BLOCK_TOKENS + 16);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            const floats x = all(q[r][d]);
            s[r][0] += x * k0;
            s[r][1] += x * k1;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++) {
        scores[r][0] = s[r][0];
        scores[r][1] = s[r][1];
    }
}

/* total[n][head_dim] += p[n][32] times V, `columns` vectors from column `at` on. */
INLINE void weigh(int n, int columns, bool half, const float (*p)[PL_BLOCK_TOKENS], const void *values, int32_t head_dim,
                  int32_t at, int32_t first, int32_t last, float *total) {
    floats sum[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) {
            sum[r][c] = load(total + (int64_t)r * head_dim, false, at + 16 * c);
        }
    }
    for (int32_t t = first; t < last; t++) {
        floats v[COLUMNS];
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) {
            v[c] = load(values, half, (int64_t)t * head_dim + at + 16 * c);
        }
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            const floats x = all(p[r][t]);
#pragma GCC unroll 8
            for (int c = 0; c < columns; c++) {
                sum[r][c] += x * v[c];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; r++) {
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++) {
            memcpy(total + (int64_t)r * head_dim + at + 16 * c, &sum[r][c], sizeof(floats));
        }
    }
}

/* The running softmax of one row: scores become weights, what was summed before shrinks. */
INLINE void soften(pl_attention_rows *rows, int32_t r, floats s[2], int32_t from, int32_t to, float *p) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float *total = rows->total + (int64_t)r * rows->head_dim;
    if (from >= to) {
        memset(p, 0, sizeof(float) * PL_BLOCK_TOKENS);
        return;
    }
    if (rows->softcap != 0) {
        for (int i = 0; i < PL_BLOCK_TOKENS; i++) {
            s[i / 16][i % 16] = rows->softcap * tanhf(s[i / 16][i % 16] / rows->softcap);
        }
    }
    if (from > 0 || to < PL_BLOCK_TOKENS) {
        for (int h = 0; h < 2; h++) {
            s[h] = choose((lane + 16 * h >= from) & (lane + 16 * h < to), s[h], all(-INFINITY));
        }
    }
    const float before = rows->max[r], here = largest_of(choose(s[0] > s[1], s[0], s[1]));
    if (here > before) {
        const float shrink = expf(before - here);
        rows->max[r] = here;
        rows->sum[r] *= shrink;
        for (int32_t d = 0; d < rows->head_dim; d++) {
            total[d] *= shrink;
        }
    }
    const floats p0 = exponential(s[0] - all(rows->max[r])), p1 = exponential(s[1] - all(rows->max[r]));
    rows->sum[r] += sum_of(p0 + p1);
    memcpy(p, &p0, sizeof p0);
    memcpy(p + 16, &p1, sizeof p1);
}

/* `n` rows from row `r` on; n and half are constants after inlining. */
INLINE void some_rows(int n, bool half, pl_attention_rows *rows, int32_t r, const void *keys, const void *values,
                      const int32_t *from, const int32_t *to) {
    floats scores[ROWS][2];
    float p[ROWS][PL_BLOCK_TOKENS];
    const int32_t head_dim = rows->head_dim;
    int32_t first = PL_BLOCK_TOKENS, last = 0;
    for (int i = 0; i < n; i++) {
        if (from[r + i] < to[r + i]) {
            first = PL_MIN(first, from[r + i]);
            last = PL_MAX(last, to[r + i]);
        }
    }
    if (first >= last) {
        return;
    }
    score(n, half, rows->q + r, keys, head_dim, scores);
    for (int i = 0; i < n; i++) {
        soften(rows, r + i, scores[i], from[r + i], to[r + i], p[i]);
    }
    float *total = rows->total + (int64_t)r * head_dim;
    int32_t at = 0;
    for (; at + 16 * COLUMNS <= head_dim; at += 16 * COLUMNS) {
        weigh(n, COLUMNS, half, p, values, head_dim, at, first, last, total);
    }
    for (; at < head_dim; at += 16) {
        weigh(n, 1, half, p, values, head_dim, at, first, last, total);
    }
}

#define CASE(n)                                                                                                             \
    case n:                                                                                                                 \
        if (half) {                                                                                                         \
            some_rows(n, true, rows, r, keys, values, from, to);                                                            \
        } else {                                                                                                            \
            some_rows(n, false, rows, r, keys, values, from, to);                                                           \
        }                                                                                                                   \
        break;

static void block(pl_attention_rows *rows, const void *keys, const void *values, bool half, const int32_t *from,
                  const int32_t *to) {
    if (rows->head_dim % 16) {
        pl_attention_scalar.block(rows, keys, values, half, from, to);
        return;
    }
    for (int32_t r = 0; r < rows->n; r += ROWS) {
        switch (PL_MIN(ROWS, rows->n - r)) {
            CASE(1)
            CASE(2)
#if ROWS >= 4
            CASE(3)
            CASE(4)
#endif
#if ROWS >= 6
            CASE(5)
            CASE(6)
#endif
        }
    }
}

static void widen(const uint16_t *from, int64_t n, float *to) {
    for (int64_t i = 0; i < n; i += 16) {
        const floats v = WIDEN16(from + i);
        memcpy(to + i, &v, sizeof v);
    }
}

const pl_attention_kernels TABLE = {block, widen};

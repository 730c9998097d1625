/*
 * exp_sum.h - the sum that a softmax divides by, in the compiler's portable vector type; included by each instruction set's
 * file after it has defined EXP_SUM, the function's name, and LANES, the floats of a register. The order of the additions
 * does not depend on LANES.
 */
#include "kernels.h"

#include <float.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    CHUNK = 64,
    VECTORS = CHUNK / LANES,
    CHUNKS = 16, /* that are summed up in single precision */
};

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t uints __attribute__((vector_size(4 * LANES)));

/* a where the condition holds, b elsewhere. */
INLINE floats choose(ints condition, floats a, float b) {
    const floats all = b - (floats){0};
    return (floats)((condition & (ints)a) | (~condition & (ints)all));
}

/* e^x for -87 <= x <= 0 within 2 units in the last place (Cody and Waite's reduction, minimax polynomial). */
INLINE floats exp_of_negative(floats x) {
    const floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds, the integer in the low bits */
    const floats whole = shifted - 12582912.0f;
    const floats r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (floats)(((uints)shifted << 23) + (127u << 23));
}

/* What is far below, or NaN, becomes e^-87: nothing beside the best one's 1. */
INLINE void add_chunk(floats sum[VECTORS], const float *x, float best, float scale, float floor) {
    for (int i = 0; i < VECTORS; i++) {
        floats v;
        memcpy(&v, x + i * LANES, sizeof v);
        const ints counts = v >= floor;
        v = (choose(v < FLT_MAX, v, FLT_MAX) - best) * scale;
        sum[i] += exp_of_negative(choose(counts & (v > -87.0f), v, -87.0f));
    }
}

static float fold(const floats sum[VECTORS]) {
    float part[CHUNK];
    memcpy(part, sum, sizeof part);
    for (int half = CHUNK / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            part[i] += part[i + half];
        }
    }
    return part[0];
}

double EXP_SUM(const float *x, int32_t n, float best, float scale, float floor) {
    double total = 0;
    int32_t i = 0;
    while (i + CHUNK <= n) {
        floats sum[VECTORS] = {{0}};
        for (int chunk = 0; chunk < CHUNKS && i + CHUNK <= n; chunk++, i += CHUNK) {
            add_chunk(sum, x + i, best, scale, floor);
        }
        total += fold(sum);
    }
    if (i < n) {
        float rest[CHUNK];
        for (int j = 0; j < CHUNK; j++) {
            rest[j] = i + j < n ? x[i + j] : -INFINITY;
        }
        floats sum[VECTORS] = {{0}};
        add_chunk(sum, rest, best, scale, floor);
        total += fold(sum);
    }
    return total;
}

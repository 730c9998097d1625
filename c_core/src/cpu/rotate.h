/*
 * rotate.h - the rotation of heads, in plain loops that the compiler makes vectors of; included by each instruction set's file,
 * which is compiled for that instruction set.
 */
#ifndef PL_ROTATE_H
#define PL_ROTATE_H

#include "common.h"

static void rotate(float *x, int32_t n, const float *table, int32_t n_rotated, int32_t kind, float factor) {
    const int32_t half = n_rotated / 2;
    const float *cosine = table, *sine = table + half;
    if (kind == PL_ROPE_PAIRS) {
        float *restrict pairs = x;
        for (int32_t i = 0; i < half; i++) {
            const float a = pairs[2 * i], b = pairs[2 * i + 1];
            pairs[2 * i] = (a * cosine[i] - b * sine[i]) * factor;
            pairs[2 * i + 1] = (a * sine[i] + b * cosine[i]) * factor;
        }
    } else {
        float *restrict first = x, *restrict second = x + half;
        for (int32_t i = 0; i < half; i++) {
            const float a = first[i], b = second[i];
            first[i] = (a * cosine[i] - b * sine[i]) * factor;
            second[i] = (a * sine[i] + b * cosine[i]) * factor;
        }
    }
    for (int32_t i = n_rotated; i < n; i++) {
        x[i] *= factor;
    }
}

#endif

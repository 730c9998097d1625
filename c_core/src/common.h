/* common.h - what every part of the core shares: errors, small numeric helpers, the export mark. */
#ifndef PL_COMMON_H
#define PL_COMMON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "pyllama_core.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are read as they stand in files, which are little-endian");

#define PL_API __attribute__((visibility("default")))
#define PL_MIN(a, b) ((a) < (b) ? (a) : (b))
#define PL_MAX(a, b) ((a) > (b) ? (a) : (b))

/* Writes a printf-style message (cut to fit) and returns -1, so that `return pl_fail(err, ...)` reads well. */
int32_t pl_fail(pl_error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Zeroed memory aligned to 64 bytes; NULL (with *err filled) when there is none. Freed with pl_free. */
void *pl_alloc(size_t bytes, pl_error *err);
void pl_free(void *p);

static inline int64_t pl_round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline uint16_t pl_load_u16(const void *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* IEEE half to single, exact, subnormals, infinities and NaN included. */
static inline float pl_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff, bits;
    float f;
    if (magnitude >= 0x7c00) {
        bits = sign | 0x7f800000u | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x0400) {
        bits = sign | ((magnitude << 13) + ((127 - 15) << 23));
    } else { /* subnormal: magnitude * 2^-24 */
        f = (float)magnitude * 0x1p-24f;
        memcpy(&bits, &f, sizeof bits);
        bits |= sign;
    }
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Single to IEEE half, to nearest, ties to even. */
static inline uint16_t pl_f32_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits >= 0x47800000) { /* 65536 and up, infinities, NaN */
        return sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00);
    }
    if (bits < 0x38800000) { /* below 2^-14: adding 0.5 puts the half's subnormal bits at the bottom, rounded */
        float magnitude, shifted;
        memcpy(&magnitude, &bits, sizeof magnitude);
        shifted = magnitude + 0.5f;
        memcpy(&bits, &shifted, sizeof bits);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits >> 13) - ((127 - 15) << 10));
}

/* To nearest, ties to even; NaN stays one. */
static inline uint16_t pl_f32_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return (uint16_t)(bits >> 16 | 0x40);
    }
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float pl_bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

#endif

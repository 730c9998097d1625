/*
 * formats.h - GGUF's quantized formats, all told in one way.
 *
 * Every quantized format is a run of groups of 32 columns. A column's code is a small unsigned number u, and its value is
 * d * (u - offset) in the symmetric formats and d * u - m in the others, where d and m belong to `sub` (32 or 16)
 * neighbouring columns. So a format is described by where its code bits lie and how d and m are stored; panels, kernels and
 * dequantization follow from the description.
 */
#ifndef PL_FORMATS_H
#define PL_FORMATS_H

#include "common.h"

enum { PL_GROUP = 32 }; /* columns that share one activation scale */

/* How d and m are kept, in the file and in a panel. */
typedef enum pl_scales {
    PL_SCALES_NONE, /* float formats */
    PL_SCALES_D,    /* half d per group */
    PL_SCALES_DM,   /* half d and half -m per group */
    PL_SCALES_K32,  /* half D, dmin per 256; 6-bit factors of both per group of 32 (Q4_K, Q5_K) */
    PL_SCALES_K16M, /* half D, dmin per 256; 4-bit factors of both per 16 (Q2_K) */
    PL_SCALES_K16   /* half D per 256; signed 8-bit factor per 16 (Q3_K, Q6_K) */
} pl_scales;

typedef struct pl_format {
    int32_t type; /* enum pl_type */
    int32_t block_elements, block_bytes;
    int32_t low_bits;  /* plane of the low code bits: 8, 4, or 0 when the codes begin with the two-bit plane */
    int32_t two_shift; /* where the two-bit plane's bits go in a code, -1 for no such plane */
    int32_t one_shift; /* the same for the one-bit plane */
    int32_t sub;       /* columns per d and m */
    int32_t offset;    /* symmetric formats: value = d * (u - offset); 0 in the others */
    pl_scales scales;
    int16_t d_at, m_at; /* where in a block the halves D (d) and dmin (m) are; -1: there is none */
} pl_format;

/* F(...) for each format: the members of its pl_format. */
#define PL_FLOAT_FORMATS(F)                                                                                                 \
    F(PL_F32, 1, 4, 0, -1, -1, 0, 0, PL_SCALES_NONE, -1, -1)                                                                \
    F(PL_F16, 1, 2, 0, -1, -1, 0, 0, PL_SCALES_NONE, -1, -1)                                                                \
    F(PL_BF16, 1, 2, 0, -1, -1, 0, 0, PL_SCALES_NONE, -1, -1)
/*    type   elements bytes low two one sub off scales d m */
#define PL_QUANTIZED_FORMATS(F)                                                                                             \
    F(PL_Q4_0, 32, 18, 4, -1, -1, 32, 8, PL_SCALES_D, 0, -1)                                                                \
    F(PL_Q4_1, 32, 20, 4, -1, -1, 32, 0, PL_SCALES_DM, 0, 2)                                                                \
    F(PL_Q5_0, 32, 22, 4, -1, 4, 32, 16, PL_SCALES_D, 0, -1)                                                                \
    F(PL_Q5_1, 32, 24, 4, -1, 4, 32, 0, PL_SCALES_DM, 0, 2)                                                                 \
    F(PL_Q8_0, 32, 34, 8, -1, -1, 32, 128, PL_SCALES_D, 0, -1)                                                              \
    F(PL_Q2_K, 256, 84, 0, 0, -1, 16, 0, PL_SCALES_K16M, 80, 82)                                                            \
    F(PL_Q3_K, 256, 110, 0, 0, 2, 16, 4, PL_SCALES_K16, 108, -1)                                                            \
    F(PL_Q4_K, 256, 144, 4, -1, -1, 32, 0, PL_SCALES_K32, 0, 2)                                                             \
    F(PL_Q5_K, 256, 176, 4, -1, 4, 32, 0, PL_SCALES_K32, 0, 2)                                                              \
    F(PL_Q6_K, 256, 210, 4, 4, -1, 16, 32, PL_SCALES_K16, 208, -1)

/* The format of a type, or NULL. */
const pl_format *pl_format_of(int32_t type);

static inline bool pl_format_is_float(const pl_format *f) { return f->scales == PL_SCALES_NONE; }

/* Codes of group `group` (0 .. block_elements/32 - 1) of the block at `block`. */
void pl_format_codes(const pl_format *f, const uint8_t *block, int32_t group, uint8_t codes[PL_GROUP]);

/* d and m of the group's first and second 16 columns (m = d * offset in the symmetric formats). */
void pl_format_affine(const pl_format *f, const uint8_t *block, int32_t group, float d[2], float m[2]);

/* Raw factors of sub-block `j` of a K format's 256 columns: 6-bit (Q4_K, Q5_K), 4-bit (Q2_K), signed (Q3_K, Q6_K). */
void pl_format_factors(const pl_format *f, const uint8_t *block, int32_t j, int32_t *scale, int32_t *min);

/* The block's half-precision D and dmin (or d and m of the simple formats) as stored; 0 where there is none. */
void pl_format_halves(const pl_format *f, const uint8_t *block, uint16_t *d, uint16_t *m);

#endif

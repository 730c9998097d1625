/* attention_kernels.h - the inner loops of attention that an instruction set brings: see attention.h for the whole. */
#ifndef PL_ATTENTION_KERNELS_H
#define PL_ATTENTION_KERNELS_H

#include "kv.h"

#include <math.h>

/* Blocks that are taken into the rows together: a row's exponent is looked at once in a span. */
enum { PL_SPAN_BLOCKS = 4, PL_SPAN_TOKENS = PL_SPAN_BLOCKS * PL_BLOCK_TOKENS };

/* What kernels read: the types of the store (enum pl_kv_type), and
 * PL_KV_PAIRS: bfloat16, K as [head_dim / 2, rounded up][32][2], V as [32 / 2][width][2 tokens]. */
enum { PL_N_KV_TYPES = 4, PL_KV_PAIRS = 4 };

enum { PL_ALWAYS = 1, PL_NEVER = INT32_MAX }; /* when to widen */

enum { PL_LANES = 16 }; /* floats of a widest register: what rows are padded to */

/*
 * Some rows of one key/value head on their way over the blocks. A score's weight is 2^(score * log2(e) - exponent). Since the
 * exponent is a whole number, another one would change no bit of a weight's or a sum's fraction: it only has to be so near the
 * largest score that nothing of importance overflows or vanishes. So it need not follow every new maximum, and sums with
 * different exponents can be joined as if they had had the same all along.
 */
typedef struct pl_attention_rows {
    int32_t n, head_dim;
    const float *const *q; /* [n] rows of head_dim */
    float *packed_q;       /* [n][width]: room for q in the form that the kernel likes; width is pl_kv_width(head_dim) */
    float *exponent;       /* [n]: -inf before the first score */
    float *sum;            /* [n][PL_LANES], 64-byte aligned: the row's sum is that of its lanes */
    float *total;          /* [n][width], 64-byte aligned */
    float softcap;
} pl_attention_rows;

/* An exponent is raised when a score is so far (powers of two) above it. */
enum { PL_HEADROOM = 32 };

/* 2^e of a whole e <= 0; 0 where that is too small to matter. */
static inline float pl_shrink(float e) { return e >= -126 ? ldexpf(1.0f, (int)e) : 0.0f; }

/* Some blocks of that head. */
typedef struct pl_attention_span {
    int32_t key_type, value_type;
    const void *keys[PL_SPAN_BLOCKS], *values[PL_SPAN_BLOCKS];
    /* What comes some blocks after each of them, to be fetched meanwhile. */
    const void *next_keys[PL_SPAN_BLOCKS], *next_values[PL_SPAN_BLOCKS];
    const int32_t *from, *to; /* [n]: the row sees the span's tokens [from, to), which may be none */
} pl_attention_span;

typedef struct pl_attention_kernels {
    /* For each type of the store: from how many new tokens of a sequence on blocks are widened before `span` reads them. */
    int32_t widen_keys_from[PL_N_KV_TYPES], widen_values_from[PL_N_KV_TYPES];
    int32_t wide_type;
    /* Brings q into the form that goes with keys of a type; before the first span. */
    void (*begin)(pl_attention_rows *rows, int32_t key_type);
    /* Takes a span into the rows. */
    void (*span)(pl_attention_rows *rows, const pl_attention_span *span);
    /* Adds what rows [from, to) of `part` have summed to what the same rows of `whole` have. */
    void (*join)(pl_attention_rows *whole, const pl_attention_rows *part, int32_t from, int32_t to);
    /* One block and head as `wide_type`; of V the first n tokens, and what is paired with the last one is 0. */
    void (*widen_keys)(int32_t type, int32_t head_dim, const void *keys, void *wide);
    void (*widen_values)(int32_t type, int32_t head_dim, const void *values, int32_t n, void *wide);
} pl_attention_kernels;

extern const pl_attention_kernels pl_attention_scalar;
#if defined(__x86_64__)
extern const pl_attention_kernels pl_attention_avx2, pl_attention_avx_vnni, pl_attention_avx512, pl_attention_avx512_bf16;
#elif defined(__aarch64__)
extern const pl_attention_kernels pl_attention_neon, pl_attention_neon_i8mm;
#endif

#endif

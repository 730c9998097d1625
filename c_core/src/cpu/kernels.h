/*
 * kernels.h - what an instruction set brings: the product and row kernels. `pl_cpu()` gives the best set for this processor;
 * every set is tested against `pl_kernels_scalar`. Attention's kernels are in attention_kernels.h.
 */
#ifndef PL_KERNELS_H
#define PL_KERNELS_H

#include "activations.h"
#include "weights.h"

enum { PL_READ_UNIT = 1024, PL_ROUND_PRODUCTS = 8192 };

/* Up to so many tokens, memory bounds a product, and one stream is read faster than two side by side: one panel at a time. */
enum { PL_STREAMING_LANES = 2 };

/* What will be read after a product: it may fetch these bytes into the caches on its way. */
typedef struct pl_next {
    const uint8_t *at;
    int64_t bytes;
} pl_next;

/* out[lane][0 .. 15 or 31], rows `stride` floats apart = one or two panels of a quantized matrix times a tile. */
typedef void (*pl_panel_product)(const pl_weight *w, const uint8_t *panel, uint8_t *tile, float *out, int64_t stride,
                                 pl_next next);

/*
 * Products of a format with many tiles. What a product would work out again for each tile, as the scales of 32 columns, is
 * unfolded once for a pair of panels. The results are those of the other products, to the last bit.
 */
typedef void (*pl_unfolded_product)(const pl_weight *w, const uint8_t *panel, const uint8_t *unfolded, uint8_t *tile,
                                    float *out, int64_t stride, pl_next next);
enum { PL_UNFOLDED_LANES = 5 }; /* tiles have so many lanes at least where there are many of them */
typedef struct pl_unfolded_products {
    int32_t group_bytes;                                                   /* of 32 columns of two panels, unfolded */
    void (*unfold)(const pl_weight *w, const uint8_t *panel, uint8_t *to); /* to multiples of 64 bytes */
    pl_unfolded_product product[PL_MAX_LANES - PL_UNFOLDED_LANES + 1];
} pl_unfolded_products;

typedef struct pl_kernels {
    int32_t max_lanes;  /* rows of a tile, at most PL_MAX_LANES */
    int32_t max_panels; /* 1 or 2 neighbouring ones in a product */

    /* The product for a format, a number of lanes (1 .. max_lanes) and of panels (1 .. max_panels). */
    pl_panel_product (*product)(const pl_format *format, int32_t lanes, int32_t panels);
    /* out[n][16] = one panel of a float matrix times n <= max_lanes rows of x; their rows are so many floats apart. */
    void (*product_float)(const pl_weight *w, const uint8_t *panel, const float *x, int64_t stride, int32_t n, float *out,
                          int64_t out_stride);

    /* Quantizes n groups of 32 columns of some rows, which lie `stride` floats apart at x, into a tile from lane `lane` and
     * column group `group` on. */
    void (*quantize)(const float *x, int64_t stride, int32_t rows, int32_t n, uint8_t *tile, int32_t width, int32_t lanes,
                     int32_t lane, int32_t group);
    /* y = x / sqrt(mean(x^2) + epsilon) * factor; y may be x. Zhang and Sennrich 2019. */
    void (*rms_norm)(const float *x, const float *factor, float epsilon, int32_t n, float *y);
    /* y = activation(gate) * up; y may be gate or up. */
    void (*glu)(int32_t activation, const float *gate, const float *up, int32_t n, float *y);
    /* A head of n elements: turns the first n_rotated, paired as `kind` says, by the angles whose cos[n_rotated / 2] and
     * sin[n_rotated / 2] are at `table` (Su et al. 2021), and multiplies all with `factor`. */
    void (*rotate)(float *x, int32_t n, const float *table, int32_t n_rotated, int32_t kind, float factor);
    /* y = x as IEEE halves, to nearest, ties to even. */
    void (*halve)(const float *x, int32_t n, uint16_t *y);

    /* For measuring the machine's limits (measure.c). The results only keep the work from being optimized away. */
    /* Reads `bytes`, a multiple of PL_READ_UNIT, at `p`, which is aligned to 64. */
    int32_t (*read)(const uint8_t *p, int64_t bytes);
    /* `rounds` times PL_ROUND_PRODUCTS products of two int8 numbers, summed, with all operands in registers. */
    int32_t (*multiply_add)(int64_t rounds);

    /* A format's products with many tiles, or NULL where product() does as well; NULL: there are none. */
    const pl_unfolded_products *(*unfolded)(const pl_format *format);
} pl_kernels;

extern const pl_kernels pl_kernels_scalar;
#if defined(__x86_64__)
extern const pl_kernels pl_kernels_avx2, pl_kernels_avx_vnni, pl_kernels_avx512;
#elif defined(__aarch64__)
extern const pl_kernels pl_kernels_neon, pl_kernels_neon_i8mm;
#endif

#include "attention_kernels.h"

/* Sum of e^((x - best) * scale) over those of x[n] that are at least `floor`; none is larger than `best`, but for +infinity,
 * which counts as the largest finite number. scale > 0; NaN counts as nothing. */
typedef double (*pl_exp_sum)(const float *x, int32_t n, float best, float scale, float floor);

double pl_exp_sum_scalar(const float *x, int32_t n, float best, float scale, float floor);
#if defined(__x86_64__)
double pl_exp_sum_avx2(const float *x, int32_t n, float best, float scale, float floor);
double pl_exp_sum_avx512(const float *x, int32_t n, float best, float scale, float floor);
#elif defined(__aarch64__)
double pl_exp_sum_neon(const float *x, int32_t n, float best, float scale, float floor);
#endif

/* Re-lays 16 rows, which lie one behind the other at `data` as in the file, into a panel: what pl_relay_rows does. */
typedef void (*pl_relay)(const pl_weight *w, const uint8_t *data, uint8_t *panel);

void pl_relay_scalar(const pl_weight *w, const uint8_t *data, uint8_t *panel);
#if defined(__x86_64__)
void pl_relay_avx2(const pl_weight *w, const uint8_t *data, uint8_t *panel);
void pl_relay_avx512(const pl_weight *w, const uint8_t *data, uint8_t *panel);
#endif

typedef struct pl_cpu_set {
    const char *name;
    const pl_kernels *kernels;
    const pl_attention_kernels *attention;
    pl_exp_sum exp_sum;
    pl_relay relay;
} pl_cpu_set;

/* The set in use: the one that PYLLAMA_CPU names, or the best that this processor runs. Where the variable names none that it
 * runs, the first function fails, for whoever makes something that works with a set; the second one takes the best. */
const pl_cpu_set *pl_cpu_wanted(pl_error *err);
const pl_cpu_set *pl_cpu(void);

#endif

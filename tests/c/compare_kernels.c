/*
 * compare_kernels.c - every kernel set that this processor runs against the scalar one: products of all formats for all
 * numbers of lanes, quantization (bit for bit), norms and activations, with nothing written outside of the results; the
 * softmax's sum against the C library's exp; panels that are re-laid as a whole against the same made row by row. Also the
 * thread pool, the pool of keys and values, and programs.
 *
 * Linked with the core's sources. Prints one line for each set and for each difference; exits with the number of differences.
 */
#include "compare.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static int differences;

void differ(const char *set, const char *what, int32_t a, int32_t b) {
    printf("%s: %s differs (%d, %d)\n", set, what, a, b);
    differences++;
}

static uint32_t state = 1;

uint32_t random_bits(void) { /* xorshift: Marsaglia 2003 */
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

float random_float(void) { return (float)random_bits() / 2147483648.0f - 1.0f; }

bool close_to(const float *a, const float *b, int32_t n, float tolerance) {
    for (int32_t i = 0; i < n; i++) {
        if (!(fabsf(a[i] - b[i]) <= tolerance)) {
            return false;
        }
    }
    return true;
}

/* Random bytes with scales from -1 to 1: half-precision numbers are found by trial, whatever their place in a block. */
static uint8_t *random_matrix(int32_t type, int64_t n_rows, int64_t n_cols, int64_t *bytes) {
    *bytes = pl_type_bytes(type, n_rows, n_cols);
    uint8_t *data = malloc((size_t)*bytes);
    float *values = malloc(sizeof(float) * (size_t)n_cols);
    const int64_t row_bytes = *bytes / n_rows;
    for (int64_t row = 0; row < n_rows; row++) {
        bool good = false;
        while (!good) {
            for (int64_t i = 0; i < row_bytes; i++) {
                data[row * row_bytes + i] = (uint8_t)(random_bits() >> 11);
            }
            pl_dequantize(type, data + row * row_bytes, row_bytes, n_cols, values, NULL);
            good = true;
            for (int64_t i = 0; i < n_cols && good; i++) {
                good = fabsf(values[i]) <= 1e4f;
            }
            if (type == PL_F32) {
                for (int64_t i = 0; i < n_cols; i++) {
                    const float f = random_float();
                    memcpy(data + row * row_bytes + 4 * i, &f, 4);
                }
                good = true;
            } else if (type == PL_F16 || type == PL_BF16) {
                for (int64_t i = 0; i < n_cols; i++) {
                    const float f = random_float();
                    uint32_t bits;
                    memcpy(&bits, &f, 4);
                    const uint16_t h = type == PL_F16 ? pl_f32_to_f16(f) : (uint16_t)(bits >> 16);
                    memcpy(data + row * row_bytes + 2 * i, &h, 2);
                }
                good = true;
            }
        }
    }
    free(values);
    return data;
}

/* One tile of `lanes` rows; memory that is exactly as large as it has to be. */
static uint8_t *quantized_tile(const pl_kernels *k, const float *x, int32_t width, int32_t lanes) {
    uint8_t *tile = pl_alloc((size_t)pl_q8_tile_bytes(width, lanes), NULL);
    for (int32_t lane = 0; lane < lanes; lane++) {
        k->quantize(x + (int64_t)lane * width, width, 1, width / PL_GROUP, tile, width, lanes, lane, 0);
    }
    return tile;
}

/* The largest element of some rows of a matrix. */
static float largest_of(const pl_weight *w, int64_t first, int64_t last) {
    float largest = 0, *row = malloc(sizeof(float) * (size_t)w->n_cols);
    for (int32_t r = (int32_t)first; r < last; r++) {
        pl_weight_rows(w, &r, 1, row, NULL);
        for (int64_t i = 0; i < w->n_cols; i++) {
            largest = fmaxf(largest, fabsf(row[i]));
        }
    }
    free(row);
    return largest;
}

/* Some panels times some rows of x: all kinds of products of a set, into rows that lie `STRIDE` apart. */
static void compare_product(const pl_cpu_set *set, const pl_weight *w, int64_t panel, int32_t panels, int32_t lanes,
                            const float *x) {
    enum { MOST = 2 * PL_PANEL_ROWS, STRIDE = MOST + 3 };
    const pl_kernels *k = set->kernels, *scalar = &pl_kernels_scalar;
    const int32_t width = (int32_t)w->n_cols, type = w->format->type, columns = panels * PL_PANEL_ROWS;
    const int64_t last_row = PL_MIN((panel + panels) * PL_PANEL_ROWS, w->n_rows);
    const float tolerance = largest_of(w, panel * PL_PANEL_ROWS, last_row) * (float)width * 1e-6f;
    const uint8_t *p = pl_weight_panel(w, panel);
    float got[PL_MAX_LANES * STRIDE], expected[PL_PANEL_ROWS];
    for (int32_t i = 0; i < PL_MAX_LANES * STRIDE; i++) {
        got[i] = -7;
    }
    if (pl_format_is_float(w->format)) {
        k->product_float(w, p, x, width, lanes, got, STRIDE);
    } else {
        uint8_t *tile = quantized_tile(k, x, width, lanes);
        k->product(w->format, lanes, panels)(w, p, tile, got, STRIDE, (pl_next){p, panels * w->panel_bytes});
        pl_free(tile);
    }
    for (int32_t i = 0; i < PL_MAX_LANES * STRIDE; i++) {
        if ((i / STRIDE >= lanes || i % STRIDE >= columns) && got[i] != -7) {
            differ(set->name, "what lies beside a product", type, lanes);
        }
    }
    for (int32_t lane = 0; lane < lanes; lane++) {
        for (int32_t i = 0; i < panels; i++) {
            if (pl_format_is_float(w->format)) {
                scalar->product_float(w, p, x + lane * width, width, 1, expected, PL_PANEL_ROWS);
            } else {
                uint8_t *tile = quantized_tile(scalar, x + lane * width, width, 1);
                scalar->product(w->format, 1, 1)(w, p + i * w->panel_bytes, tile, expected, PL_PANEL_ROWS, (pl_next){0});
                pl_free(tile);
            }
            if (!close_to(got + lane * STRIDE + i * PL_PANEL_ROWS, expected, PL_PANEL_ROWS, tolerance)) {
                differ(set->name, "a product", type, lanes);
            }
        }
    }
}

/* Two panels unfolded, times as many rows of x: what the other product gives, to the last bit. */
static void compare_unfolded(const pl_cpu_set *set, const pl_weight *w, int64_t panel, int32_t lanes, const float *x) {
    enum { STRIDE = 2 * PL_PANEL_ROWS + 3 };
    const pl_kernels *k = set->kernels;
    const int32_t width = (int32_t)w->n_cols;
    const pl_unfolded_products *u = k->unfolded(w->format);
    if (!u) {
        return;
    }
    uint8_t *unfolded = pl_alloc((size_t)(width / PL_GROUP * u->group_bytes), NULL);
    uint8_t *tile = quantized_tile(k, x, width, lanes);
    const uint8_t *p = pl_weight_panel(w, panel);
    const pl_next next = {p, 2 * w->panel_bytes};
    float got[PL_MAX_LANES * STRIDE], expected[PL_MAX_LANES * STRIDE];
    for (int32_t i = 0; i < PL_MAX_LANES * STRIDE; i++) {
        got[i] = expected[i] = -7;
    }
    u->unfold(w, p, unfolded);
    u->product[lanes - PL_UNFOLDED_LANES](w, p, unfolded, tile, got, STRIDE, next);
    k->product(w->format, lanes, 2)(w, p, tile, expected, STRIDE, next);
    if (memcmp(got, expected, sizeof got) != 0) {
        differ(set->name, "an unfolded product", w->format->type, lanes);
    }
    pl_free(tile);
    pl_free(unfolded);
}

static void compare_products(const pl_cpu_set *set, int32_t type) {
    const int32_t unit = pl_type_block_elements(type), width = unit == 1 ? 67 : 3 * unit, n_rows = 37;
    int64_t bytes;
    uint8_t *data = random_matrix(type, n_rows, width, &bytes);
    pl_weight *w = pl_weight_new(NULL, type, n_rows, width, data, bytes, NULL, NULL);
    float *x = malloc(sizeof(float) * (size_t)width * PL_MAX_LANES);
    for (int32_t i = 0; i < width * PL_MAX_LANES; i++) {
        x[i] = random_float();
    }
    const int32_t most_panels = pl_format_is_float(w->format) ? 1 : set->kernels->max_panels;
    for (int32_t panels = 1; panels <= most_panels; panels++) {
        for (int64_t panel = 0; panel + panels <= w->n_panels; panel++) {
            for (int32_t lanes = 1; lanes <= set->kernels->max_lanes; lanes++) {
                compare_product(set, w, panel, panels, lanes, x);
                if (panels == 2 && lanes >= PL_UNFOLDED_LANES && set->kernels->unfolded) {
                    compare_unfolded(set, w, panel, lanes, x);
                }
            }
        }
    }
    free(x);
    pl_weight_free(w);
    free(data);
}

/* Panels that are re-laid as a whole against those that are re-laid row by row. The memory is exactly as large as it has to be. */
static void compare_panels(const pl_cpu_set *set, int32_t type) {
    const int32_t unit = pl_type_block_elements(type);
    for (int32_t n = 1; n <= (unit == 1 ? 67 : 3); n++) {
        int64_t bytes;
        uint8_t *data = random_matrix(type, PL_PANEL_ROWS, n * unit, &bytes);
        pl_weight *w = pl_weight_new(NULL, type, PL_PANEL_ROWS, n * unit, data, bytes, NULL, NULL);
        uint8_t *by_rows = calloc(1, (size_t)w->panel_bytes), *whole = calloc(1, (size_t)w->panel_bytes);
        pl_relay_rows(w, data, PL_PANEL_ROWS, by_rows);
        set->relay(w, data, whole);
        if (memcmp(by_rows, whole, (size_t)w->panel_bytes) != 0) {
            differ(set->name, "a re-laid panel", type, n);
        }
        free(by_rows);
        free(whole);
        pl_weight_free(w);
        free(data);
    }
}

/* The same tile, made of `first` rows and then the others; of each first one group alone and then the others. */
static uint8_t *tile_made_of_parts(const pl_kernels *k, const float *x, int32_t width, int32_t lanes, int32_t first) {
    uint8_t *tile = pl_alloc((size_t)pl_q8_tile_bytes(width, lanes), NULL);
    for (int32_t lane = 0, rows = first; lane < lanes; lane += rows, rows = lanes - first) {
        k->quantize(x + lane * width, width, rows, 1, tile, width, lanes, lane, 0);
        k->quantize(x + lane * width + PL_GROUP, width, rows, width / PL_GROUP - 1, tile, width, lanes, lane, 1);
    }
    return tile;
}

static void compare_quantization(const pl_cpu_set *set) {
    enum { WIDTH = 5 * PL_GROUP };
    float x[PL_MAX_LANES * WIDTH];
    for (int32_t lanes = 1; lanes <= set->kernels->max_lanes; lanes++) {
        for (int32_t round = 0; round < 200; round++) {
            const float size = ldexpf(1.0f, (int)(random_bits() >> 8) % 250 - 125);
            for (int32_t i = 0; i < lanes * WIDTH; i++) {
                x[i] = round == 0 ? 0.0f : round == 1 ? (float)(i % 64) - 31.5f : size * random_float();
            }
            if (round == 1) {
                for (int32_t i = 0; i < lanes * WIDTH; i += PL_GROUP) {
                    x[i] = -127.0f; /* a scale of 1: the other numbers are ties */
                }
            }
            uint8_t *expected = quantized_tile(&pl_kernels_scalar, x, WIDTH, lanes);
            uint8_t *by_rows = quantized_tile(set->kernels, x, WIDTH, lanes);
            const size_t bytes = (size_t)pl_q8_tile_bytes(WIDTH, lanes);
            bool good = memcmp(by_rows, expected, bytes) == 0;
            for (int32_t first = 1; first <= lanes; first++) {
                uint8_t *tile = tile_made_of_parts(set->kernels, x, WIDTH, lanes, first);
                good = good && memcmp(tile, expected, bytes) == 0;
                pl_free(tile);
            }
            if (!good) {
                differ(set->name, "quantization", lanes, round);
            }
            pl_free(by_rows);
            pl_free(expected);
        }
    }
}

/* An infinite number shows in its group's scale, and nothing overflows on the way. */
static void quantize_infinity(const pl_cpu_set *set) {
    enum { WIDTH = 2 * PL_GROUP };
    float x[WIDTH];
    for (int32_t at = 0; at < PL_GROUP; at++) {
        for (int32_t i = 0; i < WIDTH; i++) {
            x[i] = i == at ? INFINITY : i == PL_GROUP + at ? NAN : random_float();
        }
        uint8_t *tile = quantized_tile(set->kernels, x, WIDTH, 1);
        if (pl_q8_d(tile, WIDTH, 1)[0] != INFINITY) {
            differ(set->name, "the scale of infinity", at, 0);
        }
        pl_free(tile);
    }
}

static void compare_rows(const pl_cpu_set *set) {
    enum { MOST = 150 };
    float x[MOST], factor[MOST], got[MOST + 1], expected[MOST];
    for (int32_t n = 1; n <= MOST; n++) {
        for (int32_t i = 0; i < n; i++) {
            x[i] = 3 * random_float();
            factor[i] = random_float();
        }
        got[n] = -7;
        set->kernels->rms_norm(x, factor, 1e-5f, n, got);
        pl_kernels_scalar.rms_norm(x, factor, 1e-5f, n, expected);
        if (!close_to(got, expected, n, 2e-6f) || got[n] != -7) {
            differ(set->name, "the norm", n, 0);
        }
        memcpy(got, x, sizeof(float) * (size_t)n);
        set->kernels->rms_norm(got, factor, 1e-5f, n, got);
        if (!close_to(got, expected, n, 2e-6f)) {
            differ(set->name, "the norm in place", n, 0);
        }
        for (int32_t activation = PL_SILU; activation <= PL_GELU_TANH; activation++) {
            const float size = n % 3 == 0 ? 1.0f : n % 3 == 1 ? 10.0f : 200.0f;
            for (int32_t i = 0; i < n; i++) {
                x[i] = size * random_float();
            }
            set->kernels->glu(activation, x, factor, n, got);
            pl_kernels_scalar.glu(activation, x, factor, n, expected);
            if (!close_to(got, expected, n, 1e-6f * size) || got[n] != -7) {
                differ(set->name, "an activation", activation, n);
            }
            memcpy(got, x, sizeof(float) * (size_t)n);
            set->kernels->glu(activation, got, factor, n, got);
            if (!close_to(got, expected, n, 1e-6f * size)) {
                differ(set->name, "an activation in place", activation, n);
            }
        }
    }
}

static void compare_heads(const pl_cpu_set *set) {
    enum { MOST = 70 };
    float x[MOST], table[MOST], got[MOST + 1], expected[MOST];
    uint16_t halves[MOST + 1];
    for (int32_t n = 1; n <= MOST; n++) {
        for (int32_t i = 0; i < n; i++) {
            x[i] = ldexpf(random_float(), (int)(random_bits() >> 8) % 60 - 35); /* subnormal and infinite halves are among them */
        }
        halves[n] = 7;
        set->kernels->halve(x, n, halves);
        for (int32_t i = 0; i < n; i++) {
            if (halves[i] != pl_f32_to_f16(x[i])) {
                differ(set->name, "a half", n, i);
            }
        }
        if (halves[n] != 7) {
            differ(set->name, "what lies beside halves", n, 0);
        }
        for (int32_t n_rotated = 0; n_rotated <= n; n_rotated += 2) {
            for (int32_t kind = PL_ROPE_PAIRS; kind <= PL_ROPE_HALVES; kind++) {
                for (int32_t i = 0; i < n; i++) {
                    expected[i] = got[i] = random_float();
                    table[i] = random_float();
                }
                got[n] = -7;
                set->kernels->rotate(got, n, table, n_rotated, kind, 1.5f);
                pl_kernels_scalar.rotate(expected, n, table, n_rotated, kind, 1.5f);
                if (!close_to(got, expected, n, 1e-6f) || got[n] != -7) {
                    differ(set->name, "a rotation", n, n_rotated);
                }
            }
        }
    }
}

static void compare_exp_sum(const pl_cpu_set *set) {
    enum { MOST = 2200 };
    float x[MOST];
    for (int32_t n = 1; n <= MOST; n += n < 140 ? 1 : 103) {
        for (int32_t i = 0; i < n; i++) {
            x[i] = i % 7 == 3 ? NAN : i % 11 == 5 ? -INFINITY : 40 * random_float();
        }
        x[n / 2] = n % 3 ? 40 : INFINITY;
        const float best = n % 3 ? 40 : 3.4028235e38f;
        const float floor = n % 2 ? -INFINITY : 10;
        double expected = 0;
        for (int32_t i = 0; i < n; i++) {
            expected += x[i] >= floor ? exp(((x[i] > best ? best : x[i]) - (double)best) * 0.7) : 0;
        }
        const double got = set->exp_sum(x, n, best, 0.7f, floor);
        if (!(fabs(got - expected) <= 2e-6 * expected)) {
            differ(set->name, "the sum of a softmax", n, 0);
        }
    }
}

int main(void) {
    static const char *const names[] = {"scalar", "avx2", "avx_vnni", "avx512", "avx512_bf16", "neon", "neon_i8mm"};
    static const int32_t types[] = {PL_F32,  PL_F16,  PL_BF16, PL_Q4_0, PL_Q4_1, PL_Q5_0, PL_Q5_1,
                                    PL_Q8_0, PL_Q2_K, PL_Q3_K, PL_Q4_K, PL_Q5_K, PL_Q6_K};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        setenv("PYLLAMA_CPU", names[i], 1);
        const pl_cpu_set *set = pl_cpu();
        if (strcmp(set->name, names[i]) != 0) {
            continue;
        }
        printf("%s\n", set->name);
        for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
            compare_panels(set, types[t]);
            compare_products(set, types[t]);
        }
        compare_quantization(set);
        quantize_infinity(set);
        compare_rows(set);
        compare_heads(set);
        compare_exp_sum(set);
        compare_attention(set);
    }
    check_pool();
    unsetenv("PYLLAMA_CPU");
    check_kv();
    check_program();
    return PL_MIN(differences, 100);
}

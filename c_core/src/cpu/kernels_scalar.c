/* kernels_scalar.c - the reference: plain C, one element after another, in the order in which the formulas read. */
#include "kernels.h"
#include "rotate.h"

#include <float.h>
#include <math.h>

static void product(const pl_weight *w, const uint8_t *panel, uint8_t *tile, int32_t lanes, float *out, int64_t stride) {
    const int32_t width = (int32_t)w->n_cols;
    const int64_t first_row = (panel - w->panels) / w->panel_bytes * PL_PANEL_ROWS;
    const int8_t *q = (const int8_t *)tile;
    const float *dx = pl_q8_d(tile, width, lanes);
    const int32_t *minus16 = pl_q8_minus16(tile, width, lanes), offset = w->format->offset;
    for (int32_t t = 0; t < lanes; t++) {
        memset(out + t * stride, 0, sizeof(float) * PL_PANEL_ROWS);
    }
    for (int r = 0; r < PL_PANEL_ROWS; r++) {
        for (int32_t group = 0; group < width / PL_GROUP; group++) {
            uint8_t codes[PL_GROUP];
            float d[2], m[2];
            pl_weight_group(w, first_row + r, group, codes, d, m);
            for (int t = 0; t < lanes; t++) {
                for (int half = 0; half < 2; half++) {
                    const int32_t minus = minus16[(2 * group + half) * lanes + t];
                    int32_t sum = offset * minus;
                    for (int k = 16 * half; k < 16 * half + 16; k++) {
                        sum += codes[k] * q[((group * PL_GROUP + k) / 4 * lanes + t) * 4 + k % 4];
                    }
                    float *y = &out[t * stride + r];
                    *y += d[half] * dx[group * lanes + t] * (float)sum;
                    if (!offset) {
                        *y += m[half] * (dx[group * lanes + t] * (float)minus);
                    }
                }
            }
        }
    }
}

#define PRODUCT(lanes)                                                                                                      \
    static void product_##lanes(const pl_weight *w, const uint8_t *panel, uint8_t *tile, float *out, int64_t stride,        \
                                pl_next next) {                                                                             \
        (void)next;                                                                                                         \
        product(w, panel, tile, lanes, out, stride);                                                                        \
    }
PRODUCT(1)
PRODUCT(2)
PRODUCT(3)
PRODUCT(4)

static pl_panel_product product_for(const pl_format *format, int32_t lanes, int32_t panels) {
    static const pl_panel_product by_lanes[] = {product_1, product_2, product_3, product_4};
    (void)format;
    (void)panels;
    return by_lanes[lanes - 1];
}

static void product_float(const pl_weight *w, const uint8_t *panel, const float *x, int64_t stride, int32_t n, float *out,
                          int64_t out_stride) {
    const int64_t first_row = (panel - w->panels) / w->panel_bytes * PL_PANEL_ROWS;
    for (int32_t t = 0; t < n; t++) {
        for (int r = 0; r < PL_PANEL_ROWS; r++) {
            float sum = 0;
            for (int64_t c = 0; c < w->n_cols; c++) {
                sum += pl_weight_float(w, first_row + r, c) * x[t * stride + c];
            }
            out[t * out_stride + r] = sum;
        }
    }
}

static void quantize(const float *x, int64_t stride, int32_t rows, int32_t n, uint8_t *tile, int32_t width, int32_t lanes,
                     int32_t lane, int32_t group) {
    float *d = pl_q8_d(tile, width, lanes), *sum32 = pl_q8_sum32(tile, width, lanes);
    int32_t *minus32 = pl_q8_minus32(tile, width, lanes), *minus16 = pl_q8_minus16(tile, width, lanes);
    for (int32_t i = 0; i < rows * n; i++) {
        const int32_t g = group + i % n, to_lane = lane + i / n;
        const float *from = x + i / n * stride + i % n * PL_GROUP;
        float largest = 0;
        for (int j = 0; j < PL_GROUP; j++) {
            largest = fmaxf(largest, fabsf(from[j]));
        }
        const float scale = largest / 127.0f, inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
        int32_t sum[2] = {0, 0};
        for (int j = 0; j < PL_GROUP; j++) {
            const int32_t q = (int32_t)fminf(fmaxf(rintf(from[j] * inverse), -127.0f), 127.0f);
            sum[j / 16] += q;
            ((int8_t *)tile)[((g * PL_GROUP + j) / 4 * lanes + to_lane) * 4 + j % 4] = (int8_t)q;
        }
        d[g * lanes + to_lane] = scale;
        sum32[g * lanes + to_lane] = scale * (float)(sum[0] + sum[1]);
        minus32[g * lanes + to_lane] = -(sum[0] + sum[1]);
        minus16[2 * g * lanes + to_lane] = -sum[0];
        minus16[(2 * g + 1) * lanes + to_lane] = -sum[1];
    }
}

static void rms_norm(const float *x, const float *factor, float epsilon, int32_t n, float *y) {
    float squares = 0;
    for (int32_t i = 0; i < n; i++) {
        squares += x[i] * x[i];
    }
    const float scale = 1.0f / sqrtf(squares / (float)n + epsilon);
    for (int32_t i = 0; i < n; i++) {
        y[i] = x[i] * scale * factor[i];
    }
}

static void glu(int32_t activation, const float *gate, const float *up, int32_t n, float *y) {
    for (int32_t i = 0; i < n; i++) {
        const float g = gate[i];
        if (activation == PL_SILU) {
            y[i] = g / (1.0f + expf(-g)) * up[i];
        } else { /* the tanh form: Hendrycks and Gimpel 2016 */
            y[i] = 0.5f * g * (1.0f + tanhf(0.79788456f * (g + 0.044715f * g * g * g))) * up[i];
        }
    }
}

static void halve(const float *x, int32_t n, uint16_t *y) {
    for (int32_t i = 0; i < n; i++) {
        y[i] = pl_f32_to_f16(x[i]);
    }
}

static int32_t read(const uint8_t *p, int64_t bytes) {
    uint64_t all = 0;
    for (int64_t i = 0; i < bytes; i += 8) {
        uint64_t eight;
        memcpy(&eight, p + i, sizeof eight);
        all ^= eight;
    }
    return (int32_t)all;
}

static int32_t multiply_add(int64_t rounds) {
    uint8_t codes[PL_GROUP];
    int8_t q[PL_GROUP];
    memset(codes, 3, sizeof codes);
    memset(q, -5, sizeof q);
    int32_t all = 0;
    for (int64_t i = 0; i < rounds * (PL_ROUND_PRODUCTS / PL_GROUP); i++) {
        __asm__ volatile("" : : "r"(codes), "r"(q) : "memory"); /* the compiler shall not know what they hold */
        int32_t sum = 0;
        for (int k = 0; k < PL_GROUP; k++) {
            sum += codes[k] * q[k];
        }
        all ^= sum;
    }
    return all;
}

const pl_kernels pl_kernels_scalar = {
    4, 1, product_for, product_float, quantize, rms_norm, glu, rotate, halve, read, multiply_add, NULL,
};

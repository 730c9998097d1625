/*
 * kernels_neon.h - kernels for Arm's Advanced SIMD with dot products (from Armv8.2). Included by kernels_neon.c and
 * kernels_neon_i8mm.c, which define I8MM, 0 or 1, and TABLE, the name of the kernel table.
 *
 * A register holds one 32-bit number for each of four rows, so a panel is walked as two halves of two registers: both halves
 * at once while there are registers for it (up to three lanes), one after the other otherwise. SDOT multiplies four codes of
 * each row with four activations that it takes from any quarter of a second register: a tile's codes are used as they lie
 * in memory, sixteen bytes at a time.
 *
 * With I8MM, USMMLA multiplies eight codes of two rows with eight activations of two lanes: twice as much in an instruction.
 * What it takes, and its 2x2 sums, are put together from the same layouts.
 */
#include "kernels.h"
#include "rotate.h"

#include <arm_neon.h>
#include <float.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

enum { QUARTER_ROWS = PL_PANEL_ROWS / 4, QUARTER_BYTES = 16, MAX_LANES = 6 };

/* Bytes shifted by a number of bits that is a constant after inlining; negative: to the right. */
INLINE uint8x16_t shifted(uint8x16_t v, int bits) { return vshlq_u8(v, vdupq_n_s8((int8_t)bits)); }

/* Codes of columns 4i .. 4i+3 of a group, for 4 rows. The parameters before `low` are constants after inlining. */
INLINE uint8x16_t codes(int low_bits, int two_shift, int one_shift, const uint8_t *low, const uint8_t *two, const uint8_t *one,
                       int i) {
    uint8x16_t u = vdupq_n_u8(0);
    if (low_bits == 8) { /* u = q + 128, and it is q that SDOT wants */
        u = veorq_u8(vld1q_u8(low + 64 * i), vdupq_n_u8(I8MM ? 0 : 0x80));
    } else if (low_bits == 4) {
        u = vld1q_u8(low + 64 * (i % 4));
        u = i < 4 ? vandq_u8(u, vdupq_n_u8(15)) : vshrq_n_u8(u, 4);
    }
    if (two_shift >= 0) { /* bits 2(i%4).. of each byte go to bits two_shift.. */
        const uint8x16_t bits = shifted(vld1q_u8(two + 64 * (i / 4)), two_shift - 2 * (i % 4));
        u = vorrq_u8(u, vandq_u8(bits, vdupq_n_u8((uint8_t)(3 << two_shift))));
    }
    if (one_shift >= 0) {
        const uint8x16_t bits = shifted(vld1q_u8(one), one_shift - i);
        u = vorrq_u8(u, vandq_u8(bits, vdupq_n_u8((uint8_t)(1 << one_shift))));
    }
    return u;
}

INLINE float32x4_t halves(const uint8_t *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }

INLINE uint8x8_t four_bytes(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    return vreinterpret_u8_u32(vdup_n_u32(four));
}

INLINE float32x4_t unsigned_bytes(uint8x8_t v) { return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(v)))); }
INLINE float32x4_t signed_bytes(uint8x8_t v) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(v)))));
}

/* d and, in the formats that have it, m (to be subtracted) of rows 4 * quarter .. + 3 for sub-block `part` of the line's
 * `group`. */
INLINE void affine(int kind, const uint8_t *head, const uint8_t *line, int group, int part, int quarter,
                   float32x4_t *d, float32x4_t *m) {
    *m = vdupq_n_f32(0);
    const int at = quarter * QUARTER_ROWS;
    if (kind == PL_SCALES_D) {
        *d = halves(line + group * 32 + 2 * at);
    } else if (kind == PL_SCALES_DM) {
        *d = halves(line + 2 * at);
        *m = vnegq_f32(halves(line + 32 + 2 * at));
    } else {
        const uint8_t *factors = line + 32 * group + 16 * part + at;
        const float32x4_t big_d = halves(head + 2 * at);
        if (kind == PL_SCALES_K32) {
            *d = vmulq_f32(big_d, unsigned_bytes(four_bytes(factors)));
            *m = vmulq_f32(halves(head + 32 + 2 * at), unsigned_bytes(four_bytes(factors + 16)));
        } else if (kind == PL_SCALES_K16M) {
            const uint8x8_t both = four_bytes(factors);
            *d = vmulq_f32(big_d, unsigned_bytes(vand_u8(both, vdup_n_u8(15))));
            *m = vmulq_f32(halves(head + 32 + 2 * at), unsigned_bytes(vshr_n_u8(both, 4)));
        } else {
            *d = vmulq_f32(big_d, signed_bytes(four_bytes(factors)));
        }
    }
}

/* sum += the products of each row's four codes with quarter `quarter` of x; the instruction wants to know it beforehand. */
#if I8MM
#define DOT(sum, u, x, quarter) vusdotq_laneq_s32(sum, u, x, quarter)
#else
#define DOT(sum, u, x, quarter) vdotq_laneq_s32(sum, vreinterpretq_s8_u8(u), x, quarter)
#endif
INLINE int32x4_t dot(int32x4_t sum, uint8x16_t u, int8x16_t x, int quarter) {
    switch (quarter) {
    case 0:
        return DOT(sum, u, x, 0);
    case 1:
        return DOT(sum, u, x, 1);
    case 2:
        return DOT(sum, u, x, 2);
    default:
        return DOT(sum, u, x, 3);
    }
}

/* Adds the products of pieces [first, last) of a group to sum[n quarters][lanes]; the first quarter's codes are at `at`. */
INLINE void add_products(int low_bits, int two_shift, int one_shift, int first, int last, int lanes, int n, const uint8_t *at,
                         const int8_t *q, int32x4_t *sum) {
#pragma GCC unroll 8
    for (int i = first; i < last; i++) {
#pragma GCC unroll 4
        for (int k = 0; k < n; k++) {
            const uint8_t *low = at + k * QUARTER_BYTES, *two = low + pl_two_at(low_bits);
            const uint8x16_t u = codes(low_bits, two_shift, one_shift, low, two, low + pl_one_at(low_bits, two_shift), i);
#pragma GCC unroll 6
            for (int t = 0; t < lanes; t++) {
                const int four = i * lanes + t;
                sum[k * lanes + t] = dot(sum[k * lanes + t], u, vld1q_s8(q + four / 4 * 16), four % 4);
            }
        }
    }
}

#if I8MM
/* Four activations each of two neighbouring lanes. Behind an odd last lane lie other numbers, whose sums nobody takes. */
INLINE uint32x4_t fours_of_two(const int8_t *q) {
    const uint32x2_t fours = vreinterpret_u32_s8(vld1_s8(q));
    return vcombine_u32(fours, fours);
}

/* The same, two pieces and two lanes at a time. */
INLINE void add_matrix_products(int low_bits, int two_shift, int one_shift, int first, int last, int lanes, int n,
                                const uint8_t *at, const int8_t *q, int32x4_t *sum) {
    const int pairs = (lanes + 1) / 2;
    int32x4_t square[4][2][MAX_LANES / 2]; /* of a quarter's first two rows or last two, and two lanes */
#pragma GCC unroll 4
    for (int k = 0; k < n; k++) {
#pragma GCC unroll 3
        for (int pair = 0; pair < pairs; pair++) {
            square[k][0][pair] = square[k][1][pair] = vdupq_n_s32(0);
        }
    }
#pragma GCC unroll 4
    for (int i = first; i < last; i += 2) {
        int8x16_t x[MAX_LANES / 2];
#pragma GCC unroll 3
        for (int pair = 0; pair < pairs; pair++) {
            const int8_t *four = q + (i * lanes + 2 * pair) * 4;
            x[pair] = vreinterpretq_s8_u32(vzip1q_u32(fours_of_two(four), fours_of_two(four + 4 * lanes)));
        }
#pragma GCC unroll 4
        for (int k = 0; k < n; k++) {
            const uint8_t *low = at + k * QUARTER_BYTES, *two = low + pl_two_at(low_bits);
            const uint8_t *one = low + pl_one_at(low_bits, two_shift);
            const uint32x4_t a = vreinterpretq_u32_u8(codes(low_bits, two_shift, one_shift, low, two, one, i));
            const uint32x4_t b = vreinterpretq_u32_u8(codes(low_bits, two_shift, one_shift, low, two, one, i + 1));
            const uint8x16_t rows[2] = {vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))};
#pragma GCC unroll 3
            for (int pair = 0; pair < pairs; pair++) {
                square[k][0][pair] = vusmmlaq_s32(square[k][0][pair], rows[0], x[pair]);
                square[k][1][pair] = vusmmlaq_s32(square[k][1][pair], rows[1], x[pair]);
            }
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < n; k++) {
#pragma GCC unroll 6
        for (int t = 0; t < lanes; t++) {
            const int32x4_t upper = square[k][0][t / 2], lower = square[k][1][t / 2];
            const int32x4_t of_lane = t % 2 ? vuzp2q_s32(upper, lower) : vuzp1q_s32(upper, lower);
            sum[k * lanes + t] = vaddq_s32(sum[k * lanes + t], of_lane);
        }
    }
}
#endif

/* `n` quarters of the panel from `first_quarter` on times a tile. */
INLINE void product_quarters(int low_bits, int two_shift, int one_shift, int sub, int kind, int offset, int lanes, int n,
                             int first_quarter, const pl_weight *w, const uint8_t *panel, const uint8_t *tile,
                             const float *dx, const float *sums, const int32_t *minus, float *out, int64_t stride) {
    const int64_t groups = w->n_cols / PL_GROUP;
    const int in_line = pl_line_groups(kind), parts = PL_GROUP / sub, pieces = sub / 4;
    const bool signs = low_bits == 8 && !I8MM; /* there is no offset then */
    const uint8_t *at = panel, *head = panel, *line = panel;
    const int8_t *q = (const int8_t *)tile;
    float32x4_t total[2 * MAX_LANES];
#pragma GCC unroll 12
    for (int t = 0; t < n * lanes; t++) {
        total[t] = vdupq_n_f32(0);
    }
    for (int64_t group = 0; group < groups; group++) {
        pl_pass_scales(kind, group, &at, &head, &line);
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
            int32x4_t sum[2 * MAX_LANES];
#pragma GCC unroll 12
            for (int t = 0; t < n * lanes; t++) {
                sum[t] = vdupq_n_s32(offset && !signs ? minus[t % lanes] * offset : 0);
            }
            const uint8_t *codes_at = at + first_quarter * QUARTER_BYTES;
            const int first = part * pieces, last = first + pieces;
#if I8MM
            if (lanes > 1) {
                add_matrix_products(low_bits, two_shift, one_shift, first, last, lanes, n, codes_at, q, sum);
            } else
#endif
            {
                add_products(low_bits, two_shift, one_shift, first, last, lanes, n, codes_at, q, sum);
            }
#pragma GCC unroll 4
            for (int k = 0; k < n; k++) {
                float32x4_t d, m;
                affine(kind, head, line, (int)(group % in_line), part, first_quarter + k, &d, &m);
#pragma GCC unroll 6
                for (int t = 0; t < lanes; t++) {
                    float32x4_t *to = &total[k * lanes + t];
                    *to = vfmaq_f32(*to, vmulq_n_f32(d, dx[t]), vcvtq_f32_s32(sum[k * lanes + t]));
                    if (kind == PL_SCALES_DM || kind == PL_SCALES_K32) {
                        *to = vfmsq_n_f32(*to, m, sums[t]);
                    } else if (kind == PL_SCALES_K16M) {
                        *to = vfmaq_n_f32(*to, m, dx[t] * (float)minus[t]);
                    }
                }
            }
            minus += lanes;
        }
        at += pl_code_bytes(low_bits, two_shift, one_shift);
        q += PL_GROUP * lanes;
        dx += lanes;
        sums += lanes;
    }
#pragma GCC unroll 4
    for (int k = 0; k < n; k++) {
#pragma GCC unroll 6
        for (int t = 0; t < lanes; t++) {
            vst1q_f32(out + t * stride + (first_quarter + k) * QUARTER_ROWS, total[k * lanes + t]);
        }
    }
}

INLINE void product(int low_bits, int two_shift, int one_shift, int sub, int kind, int offset, int lanes, const pl_weight *w,
                    const uint8_t *panel, uint8_t *tile, float *out, int64_t stride) {
    const int32_t width = (int32_t)w->n_cols;
    const float *dx = pl_q8_d(tile, width, lanes), *sums = pl_q8_sum32(tile, width, lanes);
    const int32_t *minus = sub == 32 ? pl_q8_minus32(tile, width, lanes) : pl_q8_minus16(tile, width, lanes);
    const int n = lanes <= MAX_LANES / 2 ? 4 : 2;
    for (int quarter = 0; quarter < 4; quarter += n) {
        product_quarters(low_bits, two_shift, one_shift, sub, kind, offset, lanes, n, quarter, w, panel, tile, dx, sums, minus,
                         out, stride);
    }
}

/* One function for each format and each number of lanes. */
#define PRODUCT(name, lanes, ...)                                                                                           \
    static void name##_##lanes(const pl_weight *w, const uint8_t *panel, uint8_t *tile, float *out, int64_t stride,         \
                               pl_next next) {                                                                              \
        (void)next;                                                                                                         \
        product(__VA_ARGS__, lanes, w, panel, tile, out, stride);                                                           \
    }
#define PRODUCTS(name, ...)                                                                                                 \
    PRODUCT(name, 1, __VA_ARGS__)                                                                                           \
    PRODUCT(name, 2, __VA_ARGS__)                                                                                           \
    PRODUCT(name, 3, __VA_ARGS__)                                                                                           \
    PRODUCT(name, 4, __VA_ARGS__)                                                                                           \
    PRODUCT(name, 5, __VA_ARGS__)                                                                                           \
    PRODUCT(name, 6, __VA_ARGS__)                                                                                           \
    static const pl_panel_product name[] = {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6};

/*              low two one sub scales offset: as in formats.c */
PRODUCTS(q4_0, 4, -1, -1, 32, PL_SCALES_D, 8)
PRODUCTS(q4_1, 4, -1, -1, 32, PL_SCALES_DM, 0)
PRODUCTS(q5_0, 4, -1, 4, 32, PL_SCALES_D, 16)
PRODUCTS(q5_1, 4, -1, 4, 32, PL_SCALES_DM, 0)
PRODUCTS(q8_0, 8, -1, -1, 32, PL_SCALES_D, 128)
PRODUCTS(q2_k, 0, 0, -1, 16, PL_SCALES_K16M, 0)
PRODUCTS(q3_k, 0, 0, 2, 16, PL_SCALES_K16, 4)
PRODUCTS(q4_k, 4, -1, -1, 32, PL_SCALES_K32, 0)
PRODUCTS(q5_k, 4, -1, 4, 32, PL_SCALES_K32, 0)
PRODUCTS(q6_k, 4, 4, -1, 16, PL_SCALES_K16, 32)

static pl_panel_product product_for(const pl_format *format, int32_t lanes, int32_t panels) {
    (void)panels; /* one at a time */
    static const pl_panel_product *const by_type[] = {
        [PL_Q4_0] = q4_0, [PL_Q4_1] = q4_1, [PL_Q5_0] = q5_0, [PL_Q5_1] = q5_1, [PL_Q8_0] = q8_0,
        [PL_Q2_K] = q2_k, [PL_Q3_K] = q3_k, [PL_Q4_K] = q4_k, [PL_Q5_K] = q5_k, [PL_Q6_K] = q6_k,
    };
    return by_type[format->type][lanes - 1];
}

/* One column of a quarter of a panel of a float matrix. */
INLINE float32x4_t float_column(int type, const uint8_t *panel, int64_t at) {
    if (type == PL_F32) {
        return vld1q_f32((const float *)panel + at);
    }
    if (type == PL_F16) {
        return halves(panel + 2 * at);
    }
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(panel + 2 * at)), 16));
}

/* So many independent accumulators a lane and quarter hide the latency of the multiply-add when there is one lane; with more,
 * they are the same, so that a row's sums are. */
enum { CHAINS = 2 };

INLINE void product_float_n(int type, int lanes, int64_t columns, const uint8_t *panel, const float *x,
                            int64_t stride, float *out, int64_t out_stride) {
    float32x4_t total[24];
#pragma GCC unroll 24
    for (int t = 0; t < 4 * lanes * CHAINS; t++) {
        total[t] = vdupq_n_f32(0);
    }
    for (int64_t c = 0; c < columns; c += CHAINS) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++) {
            if (c + chain >= columns) {
                break;
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                const float32x4_t u = float_column(type, panel, (c + chain) * PL_PANEL_ROWS + k * QUARTER_ROWS);
#pragma GCC unroll 4
                for (int t = 0; t < lanes; t++) {
                    float32x4_t *to = &total[(chain * 4 + k) * lanes + t];
                    *to = vfmaq_n_f32(*to, u, x[t * stride + c + chain]);
                }
            }
        }
    }
#pragma GCC unroll 24
    for (int i = 0; i < 4 * lanes; i++) {
#pragma GCC unroll 4
        for (int chain = 1; chain < CHAINS; chain++) {
            total[i] = vaddq_f32(total[i], total[chain * 4 * lanes + i]);
        }
        vst1q_f32(out + i % lanes * out_stride + i / lanes * QUARTER_ROWS, total[i]);
    }
}

INLINE void product_float_type(int type, const pl_weight *w, const uint8_t *panel, const float *x, int64_t stride, int32_t n,
                               float *out, int64_t out_stride) {
    for (; n >= 3; n -= 3, x += 3 * stride, out += 3 * out_stride) {
        product_float_n(type, 3, w->n_cols, panel, x, stride, out, out_stride);
    }
    for (; n > 0; n--, x += stride, out += out_stride) {
        product_float_n(type, 1, w->n_cols, panel, x, stride, out, out_stride);
    }
}

static void product_float(const pl_weight *w, const uint8_t *panel, const float *x, int64_t stride, int32_t n, float *out,
                          int64_t out_stride) {
    switch (w->format->type) {
    case PL_F32:
        product_float_type(PL_F32, w, panel, x, stride, n, out, out_stride);
        break;
    case PL_F16:
        product_float_type(PL_F16, w, panel, x, stride, n, out, out_stride);
        break;
    default:
        product_float_type(PL_BF16, w, panel, x, stride, n, out, out_stride);
        break;
    }
}

static void quantize(const float *x, int64_t stride, int32_t rows, int32_t n, uint8_t *tile, int32_t width, int32_t lanes,
                     int32_t lane, int32_t group) {
    float *d = pl_q8_d(tile, width, lanes), *sum32 = pl_q8_sum32(tile, width, lanes);
    int32_t *minus32 = pl_q8_minus32(tile, width, lanes), *minus16 = pl_q8_minus16(tile, width, lanes);
    for (int32_t i = 0; i < rows * n; i++) {
        const int32_t g = group + i % n, to_lane = lane + i / n;
        const float *from = x + i / n * stride + i % n * PL_GROUP;
        float32x4_t v[8], largest = vdupq_n_f32(0);
        for (int i = 0; i < 8; i++) {
            v[i] = vld1q_f32(from + 4 * i);
            largest = vmaxq_f32(largest, vabsq_f32(v[i]));
        }
        const float scale = vmaxvq_f32(largest) / 127.0f;
        const float inverse = scale >= FLT_MIN ? 1.0f / scale : 0.0f;
        int32x4_t halves_sum[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
        int32_t *to = (int32_t *)tile + (int64_t)g * 8 * lanes + to_lane;
        for (int i = 0; i < 8; i++) {
            const int16x4_t narrow = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(v[i], inverse)));
            halves_sum[i / 4] = vaddw_s16(halves_sum[i / 4], narrow);
            to[i * lanes] = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(narrow, narrow))), 0);
        }
        const int32_t sum_a = vaddvq_s32(halves_sum[0]), sum_b = vaddvq_s32(halves_sum[1]);
        d[g * lanes + to_lane] = scale;
        sum32[g * lanes + to_lane] = scale * (float)(sum_a + sum_b);
        minus32[g * lanes + to_lane] = -(sum_a + sum_b);
        minus16[2 * g * lanes + to_lane] = -sum_a;
        minus16[(2 * g + 1) * lanes + to_lane] = -sum_b;
    }
}

static void rms_norm(const float *x, const float *factor, float epsilon, int32_t n, float *y) {
    const int32_t whole = n / 4 * 4;
    float32x4_t by_four = vdupq_n_f32(0);
    for (int32_t i = 0; i < whole; i += 4) {
        const float32x4_t v = vld1q_f32(x + i);
        by_four = vfmaq_f32(by_four, v, v);
    }
    float squares = vaddvq_f32(by_four);
    for (int32_t i = whole; i < n; i++) {
        squares += x[i] * x[i];
    }
    const float scale = 1.0f / sqrtf(squares / (float)n + epsilon);
    for (int32_t i = 0; i < whole; i += 4) {
        vst1q_f32(y + i, vmulq_f32(vmulq_n_f32(vld1q_f32(x + i), scale), vld1q_f32(factor + i)));
    }
    for (int32_t i = whole; i < n; i++) {
        y[i] = x[i] * scale * factor[i];
    }
}

/* e^x: 2^n times a polynomial in the rest, |rest| <= ln(2)/2; the polynomial is Cephes' expf's (Moshier). */
INLINE float32x4_t exp_ps(float32x4_t x) {
    x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(-87.3f)), vdupq_n_f32(88.3f));
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
    float32x4_t r = vfmsq_n_f32(x, n, 0.693359375f);
    r = vfmsq_n_f32(r, n, -2.12194440e-4f);
    float32x4_t p = vdupq_n_f32(1.9875691500e-4f);
    p = vfmaq_f32(vdupq_n_f32(1.3981999507e-3f), p, r);
    p = vfmaq_f32(vdupq_n_f32(8.3334519073e-3f), p, r);
    p = vfmaq_f32(vdupq_n_f32(4.1665795894e-2f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.6666665459e-1f), p, r);
    p = vfmaq_f32(vdupq_n_f32(5.0000001201e-1f), p, r);
    p = vfmaq_f32(vaddq_f32(r, vdupq_n_f32(1.0f)), p, vmulq_f32(r, r));
    /* n is -126 .. 127: the bits of 2^n */
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(p, vreinterpretq_f32_s32(power));
}

/* Both activations are gate times a logistic function: silu of gate itself; gelu's 0.5 (1 + tanh z) is logistic(2z). */
INLINE float32x4_t activated(int32_t activation, float32x4_t g, float32x4_t up) {
    const float32x4_t one = vdupq_n_f32(1.0f);
    float32x4_t z = g;
    if (activation == PL_GELU_TANH) {
        const float32x4_t cubic = vfmaq_f32(one, vmulq_f32(g, g), vdupq_n_f32(0.044715f));
        z = vmulq_n_f32(vmulq_f32(g, cubic), 2 * 0.79788456f);
    }
    return vdivq_f32(vmulq_f32(g, up), vaddq_f32(one, exp_ps(vnegq_f32(z))));
}

static void glu(int32_t activation, const float *gate, const float *up, int32_t n, float *y) {
    const int32_t whole = n / 4 * 4;
    for (int32_t i = 0; i < whole; i += 4) {
        vst1q_f32(y + i, activated(activation, vld1q_f32(gate + i), vld1q_f32(up + i)));
    }
    if (whole < n) {
        const size_t rest = sizeof(float) * (size_t)(n - whole);
        float g[4] = {0}, u[4] = {0};
        memcpy(g, gate + whole, rest);
        memcpy(u, up + whole, rest);
        vst1q_f32(g, activated(activation, vld1q_f32(g), vld1q_f32(u)));
        memcpy(y + whole, g, rest);
    }
}

static void halve(const float *x, int32_t n, uint16_t *y) {
    const int32_t whole = n / 4 * 4;
    for (int32_t i = 0; i < whole; i += 4) {
        vst1_u16(y + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
    }
    for (int32_t i = whole; i < n; i++) {
        y[i] = pl_f32_to_f16(x[i]);
    }
}

static int32_t read(const uint8_t *p, int64_t bytes) {
    uint8x16_t all[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        all[j] = vdupq_n_u8(0);
    }
    for (int64_t i = 0; i < bytes; i += 128) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            all[j] = veorq_u8(all[j], vld1q_u8(p + i + 16 * j));
        }
    }
#pragma GCC unroll 8
    for (int j = 1; j < 8; j++) {
        all[0] = veorq_u8(all[0], all[j]);
    }
    return vaddvq_s32(vreinterpretq_s32_u8(all[0]));
}

static int32_t multiply_add(int64_t rounds) {
    enum { SUMS = 16, STEPS = PL_ROUND_PRODUCTS / (SUMS * (I8MM ? 32 : 16)) };
    const uint8x16_t u = vdupq_n_u8(3);
    const int8x16_t x = vdupq_n_s8(-5);
    int32x4_t sum[SUMS];
#pragma GCC unroll 16
    for (int t = 0; t < SUMS; t++) {
        sum[t] = vdupq_n_s32(0);
    }
    for (int64_t i = 0; i < rounds * STEPS; i++) {
#pragma GCC unroll 16
        for (int t = 0; t < SUMS; t++) {
#if I8MM
            sum[t] = vusmmlaq_s32(sum[t], u, x);
#else
            sum[t] = dot(sum[t], u, x, t % 4);
#endif
            __asm__ volatile("" : "+w"(sum[t])); /* the compiler shall not see that all sums are equal */
        }
    }
#pragma GCC unroll 16
    for (int t = 1; t < SUMS; t++) {
        sum[0] = veorq_s32(sum[0], sum[t]);
    }
    return vaddvq_s32(sum[0]);
}

const pl_kernels TABLE = {
    MAX_LANES, 1, product_for, product_float, quantize, rms_norm, glu, rotate, halve, read, multiply_add, NULL,
};

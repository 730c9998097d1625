/*
 * kernels_avx512.c - AVX-512 with VNNI.
 *
 * A register holds one 32-bit number for each of a panel's 16 rows. The product of a panel and a tile keeps one integer and
 * one float accumulator a lane; four codes of each row meet four int8 of a lane in one VPDPBUSD, whose second operand is
 * broadcast from memory, and after 32 (or 16) columns the integers are scaled into the floats. Codes are unpacked in
 * registers on the way, once for all lanes.
 */
#if defined(__x86_64__)
#include "kernels.h"
#include "rotate.h"

#include <float.h>
#include <immintrin.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

/*
 * With few lanes, how far ahead of the codes that are multiplied others are fetched: memory answers after some 500 cycles, in
 * which a product gets through forty groups. Products of more lanes fetch what their caller names.
 */
enum { AHEAD = 4096 };

/* Codes of columns 4i .. 4i+3 of a group, for 16 rows. The parameters before `low` are constants after inlining. */
INLINE __m512i codes(int low_bits, int two_shift, int one_shift, const uint8_t *low, const uint8_t *two, const uint8_t *one,
                     int i) {
    __m512i u = _mm512_setzero_si512();
    if (low_bits == 8) {
        u = _mm512_load_si512(low + 64 * i);
    } else if (low_bits == 4) {
        u = _mm512_load_si512(low + 64 * (i % 4));
        u = _mm512_and_si512(i < 4 ? u : _mm512_srli_epi16(u, 4), _mm512_set1_epi8(15));
    }
    if (two_shift >= 0) { /* bits 2(i%4).. of each byte go to bits two_shift.. */
        __m512i bits = _mm512_load_si512(two + 64 * (i / 4));
        const int shift = 2 * (i % 4) - two_shift;
        bits = shift >= 0 ? _mm512_srli_epi16(bits, (unsigned)shift) : _mm512_slli_epi16(bits, (unsigned)-shift);
        u = _mm512_ternarylogic_epi32(u, bits, _mm512_set1_epi8((char)(3 << two_shift)), 0xf8); /* u | (bits & mask) */
    }
    if (one_shift >= 0) {
        __m512i bits = _mm512_load_si512(one);
        const int shift = i - one_shift;
        bits = shift >= 0 ? _mm512_srli_epi16(bits, (unsigned)shift) : _mm512_slli_epi16(bits, (unsigned)-shift);
        u = _mm512_ternarylogic_epi32(u, bits, _mm512_set1_epi8((char)(1 << one_shift)), 0xf8);
    }
    return u;
}

INLINE __m512 halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m512 unsigned_bytes(__m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(v)); }

/* d and, in the formats that have it, m (to be subtracted) of 16 rows for sub-block `part` of the line's `group`. */
INLINE void affine(int kind, const uint8_t *head, const uint8_t *line, int group, int part, __m512 *d, __m512 *m) {
    *m = _mm512_setzero_ps();
    if (kind == PL_SCALES_D) {
        *d = halves(line + group * 32);
    } else if (kind == PL_SCALES_DM) {
        *d = halves(line);
        *m = _mm512_xor_ps(halves(line + 32), _mm512_set1_ps(-0.0f));
    } else {
        const uint8_t *factors = line + 32 * group + 16 * part;
        const __m512 big_d = halves(head);
        if (kind == PL_SCALES_K32) {
            *d = _mm512_mul_ps(big_d, unsigned_bytes(_mm_loadu_si128((const __m128i *)factors)));
            *m = _mm512_mul_ps(halves(head + 32), unsigned_bytes(_mm_loadu_si128((const __m128i *)(factors + 16))));
        } else if (kind == PL_SCALES_K16M) {
            const __m128i both = _mm_loadu_si128((const __m128i *)factors), nibble = _mm_set1_epi8(15);
            *d = _mm512_mul_ps(big_d, unsigned_bytes(_mm_and_si128(both, nibble)));
            *m = _mm512_mul_ps(halves(head + 32), unsigned_bytes(_mm_and_si128(_mm_srli_epi16(both, 4), nibble)));
        } else {
            const __m128i factor = _mm_loadu_si128((const __m128i *)factors);
            *d = _mm512_mul_ps(big_d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(factor)));
        }
    }
}

/*
 * Of a pair of panels that meets many tiles, what a product would work out again for each tile is unfolded once:
 *
 *   uint8 codes[8][2 panels][16 rows][4]   of a group; where they are 4 bits alone, products take them from the panel
 *   float d[parts][2 panels][16]           a part has `sub` columns
 *   float m[parts][2 panels][16]           in the formats that have it
 */
#define UNFOLDS_CODES(low_bits, two_shift, one_shift) ((low_bits) != 4 || (two_shift) >= 0 || (one_shift) >= 0)
#define HAS_MINIMUM(kind) ((kind) == PL_SCALES_K32 || (kind) == PL_SCALES_K16M)
#define UNFOLDED_CODE_BYTES(low_bits, two_shift, one_shift)                                                                 \
    (UNFOLDS_CODES(low_bits, two_shift, one_shift) ? 2 * PL_GROUP * PL_PANEL_ROWS : 0)
#define UNFOLDED_GROUP_BYTES(low_bits, two_shift, one_shift, sub, kind)                                                     \
    (UNFOLDED_CODE_BYTES(low_bits, two_shift, one_shift) + PL_GROUP / (sub) * (HAS_MINIMUM(kind) ? 256 : 128))

INLINE void unfold_panels(int low_bits, int two_shift, int one_shift, int sub, int kind, const pl_weight *w,
                          const uint8_t *panel, uint8_t *unfolded) {
    const int64_t groups = w->n_cols / PL_GROUP;
    const int in_line = pl_line_groups(kind), parts = PL_GROUP / sub;
    const int64_t apart = w->panel_bytes;
    const uint8_t *at = panel, *head = at, *line = at;
    for (int64_t group = 0; group < groups; group++) {
        pl_pass_scales(kind, group, &at, &head, &line);
        if (UNFOLDS_CODES(low_bits, two_shift, one_shift)) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
#pragma GCC unroll 2
                for (int p = 0; p < 2; p++, unfolded += 64) {
                    const uint8_t *low = at + p * apart, *two = low + pl_two_at(low_bits);
                    const uint8_t *one = low + pl_one_at(low_bits, two_shift);
                    _mm512_store_si512(unfolded, codes(low_bits, two_shift, one_shift, low, two, one, i));
                }
            }
        }
        float *scales = (float *)unfolded;
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
                __m512 d, m;
                affine(kind, head + p * apart, line + p * apart, (int)(group % in_line), part, &d, &m);
                _mm512_store_ps(scales + 32 * part + PL_PANEL_ROWS * p, d);
                if (HAS_MINIMUM(kind)) {
                    _mm512_store_ps(scales + 32 * (parts + part) + PL_PANEL_ROWS * p, m);
                }
            }
        }
        at += pl_code_bytes(low_bits, two_shift, one_shift);
        unfolded += parts * (HAS_MINIMUM(kind) ? 256 : 128);
    }
}

/*
 * `panels` (1 or 2) neighbouring panels times a tile. In the formats with an offset the integer sums begin at minus the offset
 * times the sum of the activations, so that codes need not become signed. `unfolded`: what unfold_panels() wrote, or NULL.
 */
INLINE void product(int low_bits, int two_shift, int one_shift, int sub, int kind, int offset, int lanes, int panels,
                    const pl_weight *w, const uint8_t *panel, const uint8_t *unfolded, uint8_t *tile, float *out,
                    int64_t stride, pl_next next) {
    const int32_t width = (int32_t)w->n_cols;
    const int64_t groups = width / PL_GROUP, apart = w->panel_bytes;
    const int in_line = pl_line_groups(kind), parts = PL_GROUP / sub, n = panels * lanes;
    const uint8_t *at = panel, *head = panel, *line = panel, *q = tile;
    const float *dx = pl_q8_d(tile, width, lanes), *sums = pl_q8_sum32(tile, width, lanes);
    const int32_t *minus = sub == 32 ? pl_q8_minus32(tile, width, lanes) : pl_q8_minus16(tile, width, lanes);
    const uint8_t *fetched = next.at, *const end = fetched + next.bytes;
    const int64_t lines_per_group = (next.bytes / 64 + groups - 1) / groups;
    __m512 total[2 * PL_MAX_LANES];
#pragma GCC unroll 12
    for (int t = 0; t < n; t++) {
        total[t] = _mm512_setzero_ps();
    }
    for (int64_t group = 0; group < groups; group++) {
        pl_pass_scales(kind, group, &at, &head, &line);
        const uint8_t *codes_at[2] = {at, at + (panels - 1) * apart};
        __asm__("" : "+r"(codes_at[1])); /* one register instead of many sums of addresses */
        if (lanes <= PL_STREAMING_LANES) {
#pragma GCC unroll 8
            for (int i = 0; i < pl_code_bytes(low_bits, two_shift, one_shift); i += 64) {
                _mm_prefetch((const char *)(at + AHEAD + i), _MM_HINT_T0);
            }
        } else {
            for (int64_t i = 0; i < lines_per_group && fetched < end; i++, fetched += 64) {
                _mm_prefetch((const char *)fetched, _MM_HINT_T0);
            }
        }
#pragma GCC unroll 2
        for (int part = 0; part < parts; part++) {
            __m512i sum[2 * PL_MAX_LANES];
#pragma GCC unroll 6
            for (int t = 0; t < lanes; t++) {
                sum[t] = offset ? _mm512_slli_epi32(_mm512_set1_epi32(minus[t]), __builtin_ctz((unsigned)offset | 1u << 31))
                                : _mm512_setzero_si512();
                sum[(panels - 1) * lanes + t] = sum[t];
            }
#pragma GCC unroll 8
            for (int i = part * (sub / 4); i < (part + 1) * (sub / 4); i++) {
                __m512i u[2];
#pragma GCC unroll 2
                for (int p = 0; p < panels; p++) {
                    const uint8_t *low = codes_at[p], *two = low + pl_two_at(low_bits);
                    u[p] = unfolded && UNFOLDS_CODES(low_bits, two_shift, one_shift)
                               ? _mm512_load_si512(unfolded + 128 * i + 64 * p)
                               : codes(low_bits, two_shift, one_shift, low, two, low + pl_one_at(low_bits, two_shift), i);
                }
#pragma GCC unroll 6
                for (int t = 0; t < lanes; t++) {
                    int32_t four;
                    memcpy(&four, q + (i * lanes + t) * 4, 4);
                    const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 2
                    for (int p = 0; p < panels; p++) {
                        sum[p * lanes + t] = _mm512_dpbusd_epi32(sum[p * lanes + t], u[p], x);
                    }
                }
            }
#pragma GCC unroll 2
            for (int p = 0; p < panels; p++) {
                __m512 d, m;
                if (unfolded) {
                    const int code_bytes = UNFOLDED_CODE_BYTES(low_bits, two_shift, one_shift);
                    const float *scales = (const float *)(unfolded + code_bytes) + PL_PANEL_ROWS * p;
                    d = _mm512_load_ps(scales + 32 * part);
                    m = HAS_MINIMUM(kind) ? _mm512_load_ps(scales + 32 * (parts + part)) : d;
                } else {
                    affine(kind, head + p * apart, line + p * apart, (int)(group % in_line), part, &d, &m);
                }
#pragma GCC unroll 6
                for (int t = 0; t < lanes; t++) {
                    __m512 *to = &total[p * lanes + t];
                    const __m512 scaled = _mm512_mul_ps(d, _mm512_set1_ps(dx[t]));
                    *to = _mm512_fmadd_ps(scaled, _mm512_cvtepi32_ps(sum[p * lanes + t]), *to);
                    if (kind == PL_SCALES_DM || kind == PL_SCALES_K32) {
                        *to = _mm512_fnmadd_ps(m, _mm512_set1_ps(sums[t]), *to);
                    } else if (kind == PL_SCALES_K16M) {
                        *to = _mm512_fmadd_ps(m, _mm512_set1_ps(dx[t] * (float)minus[t]), *to);
                    }
                }
            }
            minus += lanes;
        }
        at += pl_code_bytes(low_bits, two_shift, one_shift);
        if (unfolded) {
            unfolded += UNFOLDED_GROUP_BYTES(low_bits, two_shift, one_shift, sub, kind);
        }
        q += PL_GROUP * lanes;
        dx += lanes;
        sums += lanes;
    }
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++) {
#pragma GCC unroll 6
        for (int t = 0; t < lanes; t++) {
            _mm512_storeu_ps(out + t * stride + p * PL_PANEL_ROWS, total[p * lanes + t]);
        }
    }
}

/* One function for each format, number of panels and number of lanes. */
#define PRODUCT(name, lanes, panels, ...)                                                                                   \
    static void name##_##panels##_##lanes(const pl_weight *w, const uint8_t *panel, uint8_t *tile, float *out,              \
                                          int64_t stride, pl_next next) {                                                   \
        product(__VA_ARGS__, lanes, panels, w, panel, NULL, tile, out, stride, next);                                       \
    }
#define PRODUCTS_OF(name, panels, ...)                                                                                      \
    PRODUCT(name, 1, panels, __VA_ARGS__)                                                                                   \
    PRODUCT(name, 2, panels, __VA_ARGS__)                                                                                   \
    PRODUCT(name, 3, panels, __VA_ARGS__)                                                                                   \
    PRODUCT(name, 4, panels, __VA_ARGS__)                                                                                   \
    PRODUCT(name, 5, panels, __VA_ARGS__)                                                                                   \
    PRODUCT(name, 6, panels, __VA_ARGS__)
#define ROW(name, panels)                                                                                                   \
    {name##_##panels##_1, name##_##panels##_2, name##_##panels##_3, name##_##panels##_4, name##_##panels##_5,               \
     name##_##panels##_6}
#define PRODUCTS(name, ...)                                                                                                 \
    PRODUCTS_OF(name, 1, __VA_ARGS__)                                                                                       \
    PRODUCTS_OF(name, 2, __VA_ARGS__)                                                                                       \
    static const pl_panel_product name[2][PL_MAX_LANES] = {ROW(name, 1), ROW(name, 2)};

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
    static const pl_panel_product (*const by_type[])[PL_MAX_LANES] = {
        [PL_Q4_0] = q4_0, [PL_Q4_1] = q4_1, [PL_Q5_0] = q5_0, [PL_Q5_1] = q5_1, [PL_Q8_0] = q8_0,
        [PL_Q2_K] = q2_k, [PL_Q3_K] = q3_k, [PL_Q4_K] = q4_k, [PL_Q5_K] = q5_k, [PL_Q6_K] = q6_k,
    };
    return by_type[format->type][panels - 1][lanes - 1];
}

/* The same for formats that are unfolded: two panels, and as many lanes as batches of many tiles have. */
#define UNFOLDED_PRODUCT(name, lanes, ...)                                                                                  \
    static void name##_unfolded_##lanes(const pl_weight *w, const uint8_t *panel, const uint8_t *unfolded, uint8_t *tile,   \
                                        float *out, int64_t stride, pl_next next) {                                         \
        product(__VA_ARGS__, lanes, 2, w, panel, unfolded, tile, out, stride, next);                                        \
    }
#define UNFOLDED(name, low_bits, two_shift, one_shift, sub, kind, offset)                                                   \
    static void name##_unfold(const pl_weight *w, const uint8_t *panel, uint8_t *to) {                                      \
        unfold_panels(low_bits, two_shift, one_shift, sub, kind, w, panel, to);                                             \
    }                                                                                                                       \
    UNFOLDED_PRODUCT(name, 5, low_bits, two_shift, one_shift, sub, kind, offset)                                            \
    UNFOLDED_PRODUCT(name, 6, low_bits, two_shift, one_shift, sub, kind, offset)                                            \
    static const pl_unfolded_products name##_unfolded = {                                                                   \
        UNFOLDED_GROUP_BYTES(low_bits, two_shift, one_shift, sub, kind), name##_unfold,                                     \
        {name##_unfolded_5, name##_unfolded_6}};

UNFOLDED(q5_0, 4, -1, 4, 32, PL_SCALES_D, 16)
UNFOLDED(q2_k, 0, 0, -1, 16, PL_SCALES_K16M, 0)
UNFOLDED(q3_k, 0, 0, 2, 16, PL_SCALES_K16, 4)
UNFOLDED(q4_k, 4, -1, -1, 32, PL_SCALES_K32, 0)
UNFOLDED(q5_k, 4, -1, 4, 32, PL_SCALES_K32, 0)
UNFOLDED(q6_k, 4, 4, -1, 16, PL_SCALES_K16, 32)

static const pl_unfolded_products *unfolded_for(const pl_format *format) {
    switch (format->type) {
    case PL_Q5_0:
        return &q5_0_unfolded;
    case PL_Q2_K:
        return &q2_k_unfolded;
    case PL_Q3_K:
        return &q3_k_unfolded;
    case PL_Q4_K:
        return &q4_k_unfolded;
    case PL_Q5_K:
        return &q5_k_unfolded;
    case PL_Q6_K:
        return &q6_k_unfolded;
    default:
        return NULL;
    }
}

/* So many independent accumulators a lane hide the latency of the multiply-add when there are few lanes; with many, they are
 * the same, so that a row's sums are. */
enum { CHAINS = 4 };

INLINE void product_float_n(int type, int lanes, int64_t columns, const uint8_t *panel, const float *x,
                            int64_t stride, float *out, int64_t out_stride) {
    __m512 total[CHAINS * PL_MAX_LANES];
#pragma GCC unroll 24
    for (int t = 0; t < lanes * CHAINS; t++) {
        total[t] = _mm512_setzero_ps();
    }
    for (int64_t c = 0; c < columns; c += CHAINS) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++) {
            if (c + chain >= columns) {
                break;
            }
            const int64_t at = (c + chain) * PL_PANEL_ROWS;
            __m512 u;
            if (type == PL_F32) {
                u = _mm512_loadu_ps((const float *)panel + at);
            } else if (type == PL_F16) {
                u = halves(panel + 2 * at);
            } else {
                const __m256i bits = _mm256_loadu_si256((const __m256i *)(panel + 2 * at));
                u = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
            }
#pragma GCC unroll 12
            for (int t = 0; t < lanes; t++) {
                __m512 *to = &total[t * CHAINS + chain];
                *to = _mm512_fmadd_ps(u, _mm512_set1_ps(x[t * stride + c + chain]), *to);
            }
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < lanes; t++) {
#pragma GCC unroll 4
        for (int chain = 1; chain < CHAINS; chain++) {
            total[t * CHAINS] = _mm512_add_ps(total[t * CHAINS], total[t * CHAINS + chain]);
        }
        _mm512_storeu_ps(out + t * out_stride, total[t * CHAINS]);
    }
}

INLINE void product_float_type(int type, const pl_weight *w, const uint8_t *panel, const float *x, int64_t stride, int32_t n,
                               float *out, int64_t out_stride) {
    for (; n >= 6; n -= 6, x += 6 * stride, out += 6 * out_stride) {
        product_float_n(type, 6, w->n_cols, panel, x, stride, out, out_stride);
    }
    for (; n >= 2; n -= 2, x += 2 * stride, out += 2 * out_stride) {
        product_float_n(type, 2, w->n_cols, panel, x, stride, out, out_stride);
    }
    if (n) {
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

INLINE __m512 larger_magnitude(__m512 a, __m512 b) { return _mm512_range_ps(a, b, 0xb); }

/* The largest of each quarter of four groups' 16 columns: in every 128-bit lane that of one group, four times. */
INLINE __m512 largest_of_four(const __m512 m[4]) {
    __m512 half[2];
    for (int i = 0; i < 2; i++) {
        half[i] = _mm512_max_ps(_mm512_shuffle_f32x4(m[2 * i], m[2 * i + 1], 0x44),
                                _mm512_shuffle_f32x4(m[2 * i], m[2 * i + 1], 0xee));
    }
    __m512 v = _mm512_max_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
    v = _mm512_max_ps(v, _mm512_permute_ps(v, 0xb1));
    return _mm512_max_ps(v, _mm512_permute_ps(v, 0x4e));
}

/*
 * Up to four groups at a time, so that they share the reductions and divisions. Across, what belongs to neighbouring lanes lies
 * side by side and is stored together; along a row everything has a place of its own.
 */
INLINE void quantize_fours(const float *x, int64_t stride, int32_t n, uint8_t *tile, int32_t width, int32_t lanes, int32_t lane,
                           int32_t group, bool across) {
    enum { AT_ONCE = 4, FOURS = PL_GROUP / 4 };
    const int64_t apart = across ? stride : PL_GROUP;
    for (int32_t first = 0; first < n; first += AT_ONCE) {
        const int32_t count = PL_MIN(n - first, AT_ONCE);
        __m512 a[AT_ONCE], b[AT_ONCE], most[AT_ONCE];
#pragma GCC unroll 4
        for (int i = 0; i < AT_ONCE; i++) {
            const float *from = x + PL_MIN(first + i, n - 1) * apart; /* past the end the last one again */
            a[i] = _mm512_loadu_ps(from);
            b[i] = _mm512_loadu_ps(from + 16);
            most[i] = larger_magnitude(a[i], b[i]);
        }
        const __m512i lane_firsts = _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0);
        const __m128 largest = _mm512_castps512_ps128(_mm512_permutexvar_ps(lane_firsts, largest_of_four(most)));
        const __m128 scale = _mm_div_ps(largest, _mm_set1_ps(127.0f));
        const __mmask8 normal = _mm_cmp_ps_mask(scale, _mm_set1_ps(FLT_MIN), _CMP_GE_OQ);
        const __m512 inverses = _mm512_castps128_ps512(_mm_maskz_div_ps(normal, _mm_set1_ps(1.0f), scale));
        __m512i bytes[2]; /* of two groups: in 128-bit lane k four k of the first's 16 columns, its others, the second's */
        __m128i sums[2];  /* in the same order */
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; pair++) {
            __m512i narrow[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const __m512 inverse = _mm512_permutexvar_ps(_mm512_set1_epi32(2 * pair + i), inverses);
                narrow[i] = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(a[2 * pair + i], inverse)),
                                               _mm512_cvtps_epi32(_mm512_mul_ps(b[2 * pair + i], inverse)));
            }
            bytes[pair] = _mm512_packs_epi16(narrow[0], narrow[1]);
            const __m512i of_fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes[pair]);
            const __m256i folded = _mm256_add_epi32(_mm512_castsi512_si256(of_fours), _mm512_extracti64x4_epi64(of_fours, 1));
            sums[pair] = _mm_add_epi32(_mm256_castsi256_si128(folded), _mm256_extracti128_si256(folded, 1));
        }
        /* Now in the order of the four groups: first columns, last columns. */
        const __m512 pairs[2] = {_mm512_castsi512_ps(bytes[0]), _mm512_castsi512_ps(bytes[1])};
        const __m512i first_fours = _mm512_castps_si512(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88));
        const __m512i last_fours = _mm512_castps_si512(_mm512_shuffle_ps(pairs[0], pairs[1], 0xdd));
        const __m128 sum_pairs[2] = {_mm_castsi128_ps(sums[0]), _mm_castsi128_ps(sums[1])};
        const __m128i zero = _mm_setzero_si128();
        const __m128i minus_a = _mm_sub_epi32(zero, _mm_castps_si128(_mm_shuffle_ps(sum_pairs[0], sum_pairs[1], 0x88)));
        const __m128i minus_b = _mm_sub_epi32(zero, _mm_castps_si128(_mm_shuffle_ps(sum_pairs[0], sum_pairs[1], 0xdd)));
        const __m128i minus = _mm_add_epi32(minus_a, minus_b);
        const __m128 sum = _mm_mul_ps(scale, _mm_cvtepi32_ps(_mm_sub_epi32(zero, minus)));

        const int32_t to_lane = across ? lane + first : lane, to_group = across ? group : group + first;
        const int64_t at = (int64_t)to_group * lanes + to_lane, at16 = at + (int64_t)to_group * lanes;
        int32_t *q = (int32_t *)tile + (int64_t)to_group * FOURS * lanes + to_lane;
        float *d = pl_q8_d(tile, width, lanes) + at, *sum32 = pl_q8_sum32(tile, width, lanes) + at;
        int32_t *minus32 = pl_q8_minus32(tile, width, lanes) + at, *minus16 = pl_q8_minus16(tile, width, lanes) + at16;
        if (across) {
            const __mmask8 mask = (__mmask8)((1 << count) - 1);
#define STORE_FOURS(k)                                                                                                      \
    _mm_mask_storeu_epi32(q + (k) * lanes, mask, _mm512_extracti32x4_epi32(first_fours, k));                                \
    _mm_mask_storeu_epi32(q + (4 + (k)) * lanes, mask, _mm512_extracti32x4_epi32(last_fours, k))
            STORE_FOURS(0);
            STORE_FOURS(1);
            STORE_FOURS(2);
            STORE_FOURS(3);
#undef STORE_FOURS
            _mm_mask_storeu_ps(d, mask, scale);
            _mm_mask_storeu_ps(sum32, mask, sum);
            _mm_mask_storeu_epi32(minus32, mask, minus);
            _mm_mask_storeu_epi32(minus16, mask, minus_a);
            _mm_mask_storeu_epi32(minus16 + lanes, mask, minus_b);
            continue;
        }
        _Alignas(64) int32_t fours[2][16], of_minus[3][AT_ONCE];
        _Alignas(16) float of_d[AT_ONCE], of_sum[AT_ONCE];
        _mm512_store_si512(fours[0], first_fours);
        _mm512_store_si512(fours[1], last_fours);
        _mm_store_ps(of_d, scale);
        _mm_store_ps(of_sum, sum);
        _mm_store_si128((__m128i *)of_minus[0], minus);
        _mm_store_si128((__m128i *)of_minus[1], minus_a);
        _mm_store_si128((__m128i *)of_minus[2], minus_b);
        for (int32_t i = 0; i < count; i++, q += FOURS * lanes) {
#pragma GCC unroll 8
            for (int k = 0; k < FOURS; k++) {
                q[k * lanes] = fours[k / 4][4 * (k % 4) + i];
            }
            d[i * lanes] = of_d[i];
            sum32[i * lanes] = of_sum[i];
            minus32[i * lanes] = of_minus[0][i];
            minus16[2 * i * lanes] = of_minus[1][i];
            minus16[(2 * i + 1) * lanes] = of_minus[2][i];
        }
    }
}

/* One group of all rows of a tile of six: its codes fill three registers. Results are those of quantize_fours(). */
INLINE void quantize_six(const float *x, int64_t stride, uint8_t *tile, int32_t width, int32_t group) {
    enum { LANES = 6, SIX = (1 << LANES) - 1, TWELVE = (1 << 2 * LANES) - 1 };
    __m512 a[LANES], b[LANES], most[3];
#pragma GCC unroll 3
    for (int pair = 0; pair < 3; pair++) {
        __m512 m[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const int row = 2 * pair + i;
            a[row] = _mm512_loadu_ps(x + row * stride);
            b[row] = _mm512_loadu_ps(x + row * stride + 16);
            m[i] = larger_magnitude(a[row], b[row]);
        }
        most[pair] = _mm512_max_ps(_mm512_shuffle_f32x4(m[0], m[1], 0x44), _mm512_shuffle_f32x4(m[0], m[1], 0xee));
    }
    /* 128-bit lanes of rows 0 1 2 3 and of rows 4 5 4 5, then in every lane one of each, twice. */
    const __m512 four = _mm512_max_ps(_mm512_shuffle_f32x4(most[0], most[1], 0x88), _mm512_shuffle_f32x4(most[0], most[1], 0xdd));
    const __m512 two = _mm512_max_ps(_mm512_shuffle_f32x4(most[2], most[2], 0x88), _mm512_shuffle_f32x4(most[2], most[2], 0xdd));
    __m512 all = _mm512_max_ps(_mm512_unpacklo_ps(four, two), _mm512_unpackhi_ps(four, two));
    all = _mm512_max_ps(all, _mm512_permute_ps(all, 0x4e));
    const __m512i rows_at = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 1, 12, 8, 4, 0);
    const __m256 largest = _mm512_castps512_ps256(_mm512_permutexvar_ps(rows_at, all));
    const __m256 scale = _mm256_div_ps(largest, _mm256_set1_ps(127.0f));
    const __mmask8 normal = _mm256_cmp_ps_mask(scale, _mm256_set1_ps(FLT_MIN), _CMP_GE_OQ);
    const __m512 inverses = _mm512_castps256_ps512(_mm256_maskz_div_ps(normal, _mm256_set1_ps(1.0f), scale));
    __m512i bytes[3]; /* of two rows: in 128-bit lane k four k of the first's 16 columns, its others, the second's */
    __m512i sums = _mm512_setzero_si512();
#pragma GCC unroll 3
    for (int pair = 0; pair < 3; pair++) {
        __m512i narrow[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const int row = 2 * pair + i;
            const __m512 inverse = _mm512_permutexvar_ps(_mm512_set1_epi32(row), inverses);
            narrow[i] = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(a[row], inverse)),
                                           _mm512_cvtps_epi32(_mm512_mul_ps(b[row], inverse)));
        }
        bytes[pair] = _mm512_packs_epi16(narrow[0], narrow[1]);
        const __m512i of_fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes[pair]);
        const __m256i folded = _mm256_add_epi32(_mm512_castsi512_si256(of_fours), _mm512_extracti64x4_epi64(of_fours, 1));
        const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(folded), _mm256_extracti128_si256(folded, 1));
        sums = _mm512_mask_broadcast_i32x4(sums, (__mmask16)(0xf << 4 * pair), sum);
    }
    int32_t *q = (int32_t *)tile + (int64_t)group * (PL_GROUP / 4) * LANES;
    /* Where in bytes[0] and [1] the number lies that comes j-th: four j / 6 of row j % 6. Rows 4 and 5 lie so in bytes[2]. */
#define PLACE(j) ((j) / 6 % 4 * 4 + (j) / 24 + (j) % 2 * 2 + ((j) % 6 / 2 == 1 ? 16 : 0))
#define PLACES(j) PLACE(j), PLACE(j + 1), PLACE(j + 2), PLACE(j + 3), PLACE(j + 4), PLACE(j + 5), PLACE(j + 6), PLACE(j + 7)
    static const _Alignas(64) int32_t places[] = {PLACES(0), PLACES(8), PLACES(16), PLACES(24), PLACES(32), PLACES(40)};
#undef PLACES
#undef PLACE
    const __mmask16 last_rows[3] = {0x0c30, 0x30c3, 0xc30c};
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) {
        const __m512i at = _mm512_load_si512(places + 16 * i), v = _mm512_permutex2var_epi32(bytes[0], at, bytes[1]);
        _mm512_storeu_si512(q + 16 * i, _mm512_mask_permutexvar_epi32(v, last_rows[i], at, bytes[2]));
    }
    const __m512i halves_at = _mm512_set_epi32(0, 0, 0, 0, 11, 9, 7, 5, 3, 1, 10, 8, 6, 4, 2, 0);
    const __m512i seconds_at = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11, 9, 7, 5, 3, 1);
    const __m512i halves = _mm512_permutexvar_epi32(halves_at, sums);
    const __m256i sum = _mm256_add_epi32(_mm512_castsi512_si256(halves),
                                         _mm512_castsi512_si256(_mm512_permutexvar_epi32(seconds_at, sums)));
    const int64_t at = (int64_t)group * LANES;
    _mm256_mask_storeu_ps(pl_q8_d(tile, width, LANES) + at, SIX, scale);
    _mm256_mask_storeu_ps(pl_q8_sum32(tile, width, LANES) + at, SIX, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sum)));
    _mm256_mask_storeu_epi32(pl_q8_minus32(tile, width, LANES) + at, SIX, _mm256_sub_epi32(_mm256_setzero_si256(), sum));
    _mm512_mask_storeu_epi32(pl_q8_minus16(tile, width, LANES) + 2 * at, TWELVE, _mm512_sub_epi32(_mm512_setzero_si512(), halves));
}

static void quantize(const float *x, int64_t stride, int32_t rows, int32_t n, uint8_t *tile, int32_t width, int32_t lanes,
                     int32_t lane, int32_t group) {
    if (rows == 1) {
        quantize_fours(x, stride, n, tile, width, lanes, lane, group, false);
        return;
    }
    for (int32_t i = 0; i < n; i++) {
        if (rows == 6 && lanes == 6) {
            quantize_six(x + i * PL_GROUP, stride, tile, width, group + i);
        } else {
            quantize_fours(x + i * PL_GROUP, stride, rows, tile, width, lanes, lane, group + i, true);
        }
    }
}

INLINE __mmask16 tail(int32_t left) { return (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1); }

static void rms_norm(const float *x, const float *factor, float epsilon, int32_t n, float *y) {
    enum { SUMS = 4 }; /* side by side, so that none waits for the one before */
    __m512 squares[SUMS];
#pragma GCC unroll 4
    for (int j = 0; j < SUMS; j++) {
        squares[j] = _mm512_setzero_ps();
    }
    int32_t i = 0;
    for (; i + 16 * SUMS <= n; i += 16 * SUMS) {
#pragma GCC unroll 4
        for (int j = 0; j < SUMS; j++) {
            const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
            squares[j] = _mm512_fmadd_ps(v, v, squares[j]);
        }
    }
    for (; i < n; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(tail(n - i), x + i);
        squares[0] = _mm512_fmadd_ps(v, v, squares[0]);
    }
    const __m512 all = _mm512_add_ps(_mm512_add_ps(squares[0], squares[1]), _mm512_add_ps(squares[2], squares[3]));
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(all) / (float)n + epsilon));
    for (i = 0; i < n; i += 16) {
        const __mmask16 mask = tail(n - i);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), scale);
        _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, factor + i)));
    }
}

/* e^x: 2^n times a polynomial in the rest, |rest| <= ln(2)/2; the polynomial is Cephes' expf's (Moshier). */
INLINE __m512 exp_ps(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* 1 / x within some units of the last place: a step of Newton's method on 14 right bits. A fifth of a division's time. */
INLINE __m512 inverse(__m512 x) {
    const __m512 guess = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(2.0f)));
}

/* Both activations are gate times a logistic function: silu of gate itself; gelu's 0.5 (1 + tanh z) is logistic(2z). */
static void glu(int32_t activation, const float *gate, const float *up, int32_t n, float *y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int32_t i = 0; i < n; i += 16) {
        const __mmask16 mask = tail(n - i);
        const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        __m512 z = g;
        if (activation == PL_GELU_TANH) {
            const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(0.044715f), one);
            z = _mm512_mul_ps(_mm512_mul_ps(g, cubic), _mm512_set1_ps(2 * 0.79788456f));
        }
        const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), z));
        const __m512 v = _mm512_mul_ps(_mm512_mul_ps(g, _mm512_maskz_loadu_ps(mask, up + i)), inverse(_mm512_add_ps(one, e)));
        _mm512_mask_storeu_ps(y + i, mask, v);
    }
}

static void halve(const float *x, int32_t n, uint16_t *y) {
    for (int32_t i = 0; i < n; i += 16) {
        const __mmask16 mask = tail(n - i);
        _mm256_mask_storeu_epi16(y + i, mask, _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, x + i), _MM_FROUND_TO_NEAREST_INT));
    }
}

static int32_t read(const uint8_t *p, int64_t bytes) {
    __m512i all[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            all[j] = _mm512_xor_si512(all[j], _mm512_load_si512(p + i + 64 * j));
        }
    }
    return _mm512_reduce_add_epi32(_mm512_xor_si512(_mm512_xor_si512(all[0], all[1]), _mm512_xor_si512(all[2], all[3])));
}

static int32_t multiply_add(int64_t rounds) {
    enum { SUMS = 16, STEPS = PL_ROUND_PRODUCTS / (SUMS * 64) };
    const __m512i u = _mm512_set1_epi8(3), x = _mm512_set1_epi8(-5);
    __m512i sum[SUMS];
#pragma GCC unroll 16
    for (int t = 0; t < SUMS; t++) {
        sum[t] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < rounds * STEPS; i++) {
#pragma GCC unroll 16
        for (int t = 0; t < SUMS; t++) {
            sum[t] = _mm512_dpbusd_epi32(sum[t], u, x);
            __asm__ volatile("" : "+v"(sum[t])); /* the compiler shall not see that all sums are equal */
        }
    }
#pragma GCC unroll 16
    for (int t = 1; t < SUMS; t++) {
        sum[0] = _mm512_xor_si512(sum[0], sum[t]);
    }
    return _mm512_reduce_add_epi32(sum[0]);
}

const pl_kernels pl_kernels_avx512 = {
    PL_MAX_LANES, 2, product_for, product_float, quantize, rms_norm, glu, rotate, halve, read, multiply_add, unfolded_for,
};
#endif

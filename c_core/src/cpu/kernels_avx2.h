/*
 * kernels_avx2.h - kernels for 256-bit registers, with FMA and F16C. Included by kernels_avx2.c and kernels_avx_vnni.c, which
 * define VNNI, 0 or 1, and TABLE, the name of the kernel table.
 *
 * A register holds one 32-bit number for each of eight rows, so that a panel is two halves. Both are multiplied with each of
 * a tile's lanes, whose activations are broadcast once for the two.
 *
 * With VNNI, VPDPBUSD adds four products of unsigned codes and activations to each row's 32-bit sum. Without, VPMADDUBSW makes
 * 16-bit sums of two; how many of these may be added before they have to be widened follows from the size of the codes.
 * Eight-bit codes are too large to be taken as unsigned then: their sign is moved to the activations.
 */
#include "kernels.h"
#include "rotate.h"

#include <float.h>
#include <immintrin.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

enum { HALF_ROWS = PL_PANEL_ROWS / 2, HALF_BYTES = 32, MAX_LANES = PL_MAX_LANES };

/* With few lanes, how far ahead of the codes that are multiplied others are fetched: see kernels_avx512.c. */
enum { AHEAD = 4096 };

/* Codes of columns 4i .. 4i+3 of a group, for 8 rows. The parameters before `low` are constants after inlining. */
INLINE __m256i codes(int low_bits, int two_shift, int one_shift, const uint8_t *low, const uint8_t *two, const uint8_t *one,
                     int i) {
    __m256i u = _mm256_setzero_si256();
    if (low_bits == 8) {
        u = _mm256_load_si256((const __m256i *)(low + 64 * i));
    } else if (low_bits == 4) {
        u = _mm256_load_si256((const __m256i *)(low + 64 * (i % 4)));
        u = _mm256_and_si256(i < 4 ? u : _mm256_srli_epi16(u, 4), _mm256_set1_epi8(15));
    }
    if (two_shift >= 0) { /* bits 2(i%4).. of each byte go to bits two_shift.. */
        __m256i bits = _mm256_load_si256((const __m256i *)(two + 64 * (i / 4)));
        const int shift = 2 * (i % 4) - two_shift;
        bits = shift >= 0 ? _mm256_srli_epi16(bits, shift) : _mm256_slli_epi16(bits, -shift);
        u = _mm256_or_si256(u, _mm256_and_si256(bits, _mm256_set1_epi8((char)(3 << two_shift))));
    }
    if (one_shift >= 0) {
        __m256i bits = _mm256_load_si256((const __m256i *)one);
        const int shift = i - one_shift;
        bits = shift >= 0 ? _mm256_srli_epi16(bits, shift) : _mm256_slli_epi16(bits, -shift);
        u = _mm256_or_si256(u, _mm256_and_si256(bits, _mm256_set1_epi8((char)(1 << one_shift))));
    }
    return u;
}

INLINE __m256 halves(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE __m256 unsigned_bytes(__m128i v) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)); }
INLINE __m128i eight_bytes(const uint8_t *p) { return _mm_loadl_epi64((const __m128i *)p); }

/* d and, in the formats that have it, m (to be subtracted) of rows 8 * half .. 8 * half + 7 for sub-block `part` of the line's
 * `group`. */
INLINE void affine(int kind, const uint8_t *head, const uint8_t *line, int group, int part, int half, __m256 *d, __m256 *m) {
    *m = _mm256_setzero_ps();
    const int at = half * HALF_ROWS;
    if (kind == PL_SCALES_D) {
        *d = halves(line + group * 32 + 2 * at);
    } else if (kind == PL_SCALES_DM) {
        *d = halves(line + 2 * at);
        *m = _mm256_xor_ps(halves(line + 32 + 2 * at), _mm256_set1_ps(-0.0f));
    } else {
        const uint8_t *factors = line + 32 * group + 16 * part + at;
        const __m256 big_d = halves(head + 2 * at);
        if (kind == PL_SCALES_K32) {
            *d = _mm256_mul_ps(big_d, unsigned_bytes(eight_bytes(factors)));
            *m = _mm256_mul_ps(halves(head + 32 + 2 * at), unsigned_bytes(eight_bytes(factors + 16)));
        } else if (kind == PL_SCALES_K16M) {
            const __m128i both = eight_bytes(factors), nibble = _mm_set1_epi8(15);
            *d = _mm256_mul_ps(big_d, unsigned_bytes(_mm_and_si128(both, nibble)));
            *m = _mm256_mul_ps(halves(head + 32 + 2 * at), unsigned_bytes(_mm_and_si128(_mm_srli_epi16(both, 4), nibble)));
        } else {
            *d = _mm256_mul_ps(big_d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(factors))));
        }
    }
}

/*
 * Adds the products of piece `i` of a part, u times x, to `sum`. Without VNNI they are gathered in `narrow` and widened when
 * no more of them fit. Compilers would rather add everything up at the end, and have not enough registers for that: they are
 * made to believe that each sum is needed at once.
 */
INLINE void add_products(int low_bits, int run, int i, __m256i u, __m256i x, __m256i *narrow, __m256i *sum) {
#if VNNI
    (void)low_bits, (void)run, (void)i, (void)narrow;
    *sum = _mm256_dpbusd_avx_epi32(*sum, u, x);
#else
    const __m256i two = low_bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(u), _mm256_sign_epi8(x, u))
                                      : _mm256_maddubs_epi16(u, x);
    *narrow = i % run == 0 ? two : _mm256_add_epi16(*narrow, two);
    __asm__("" : "+x"(*narrow));
    if (i % run == run - 1) {
        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*narrow, _mm256_set1_epi16(1)));
        __asm__("" : "+x"(*sum));
    }
#endif
}

/* A panel times a tile. */
INLINE void product(int low_bits, int two_shift, int one_shift, int sub, int kind, int offset, int lanes, const pl_weight *w,
                    const uint8_t *panel, uint8_t *tile, float *out, int64_t stride, pl_next next) {
    const int32_t width = (int32_t)w->n_cols;
    const int64_t groups = width / PL_GROUP;
    const int in_line = pl_line_groups(kind), parts = PL_GROUP / sub, pieces = sub / 4;
    const uint8_t *at = panel, *head = panel, *line = panel, *q = tile;
    const float *dx = pl_q8_d(tile, width, lanes), *sums = pl_q8_sum32(tile, width, lanes);
    const int32_t *minus = sub == 32 ? pl_q8_minus32(tile, width, lanes) : pl_q8_minus16(tile, width, lanes);
    /* 254 = 2 * 127 is the most that a pair of codes 1 comes to; pieces in a run stay below 2^15 together. */
    const int bits = low_bits == 8 ? 7 : one_shift >= 0 ? one_shift + 1 : two_shift >= 0 ? two_shift + 2 : low_bits;
    const int run = PL_MIN(pieces, 32767 / (254 * ((1 << bits) - 1)));
    const uint8_t *fetched = next.at, *const end = fetched + next.bytes;
    const int64_t lines_per_group = (next.bytes / 64 + groups - 1) / groups;
    const bool signs = low_bits == 8 && !VNNI; /* there is no offset then */
    __m256 total[MAX_LANES][2];
#pragma GCC unroll 6
    for (int t = 0; t < lanes; t++) {
        total[t][0] = total[t][1] = _mm256_setzero_ps();
    }
    for (int64_t group = 0; group < groups; group++) {
        pl_pass_scales(kind, group, &at, &head, &line);
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
            __m256i narrow[MAX_LANES][2], sum[MAX_LANES][2];
#pragma GCC unroll 6
            for (int t = 0; t < lanes; t++) {
                sum[t][0] = _mm256_setzero_si256();
                if (offset && !signs) {
                    sum[t][0] = _mm256_slli_epi32(_mm256_set1_epi32(minus[t]), __builtin_ctz((unsigned)offset | 1u << 31));
                }
                sum[t][1] = sum[t][0];
            }
#pragma GCC unroll 8
            for (int i = 0; i < pieces; i++) {
                const int piece = part * pieces + i;
                __m256i u[2];
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const uint8_t *low = at + half * HALF_BYTES, *two = low + pl_two_at(low_bits);
                    u[half] = codes(low_bits, two_shift, one_shift, low, two, low + pl_one_at(low_bits, two_shift), piece);
                    u[half] = signs ? _mm256_xor_si256(u[half], _mm256_set1_epi8((char)0x80)) : u[half];
                }
#pragma GCC unroll 6
                for (int t = 0; t < lanes; t++) {
                    int32_t four;
                    memcpy(&four, q + (piece * lanes + t) * 4, 4);
                    const __m256i x = _mm256_set1_epi32(four);
                    add_products(low_bits, run, i, u[0], x, &narrow[t][0], &sum[t][0]);
                    add_products(low_bits, run, i, u[1], x, &narrow[t][1], &sum[t][1]);
                }
            }
            __m256 d[2], m[2];
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                affine(kind, head, line, (int)(group % in_line), part, half, &d[half], &m[half]);
            }
#pragma GCC unroll 6
            for (int t = 0; t < lanes; t++) {
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    __m256 *to = &total[t][half];
                    const __m256 scaled = _mm256_mul_ps(d[half], _mm256_broadcast_ss(dx + t));
                    *to = _mm256_fmadd_ps(scaled, _mm256_cvtepi32_ps(sum[t][half]), *to);
                    if (kind == PL_SCALES_DM || kind == PL_SCALES_K32) {
                        *to = _mm256_fnmadd_ps(m[half], _mm256_broadcast_ss(sums + t), *to);
                    } else if (kind == PL_SCALES_K16M) {
                        *to = _mm256_fmadd_ps(m[half], _mm256_set1_ps(dx[t] * (float)minus[t]), *to);
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
#pragma GCC unroll 6
    for (int t = 0; t < lanes; t++) {
        _mm256_storeu_ps(out + t * stride, total[t][0]);
        _mm256_storeu_ps(out + t * stride + HALF_ROWS, total[t][1]);
    }
}

/* One function for each format and each number of lanes. */
#define PRODUCT(name, lanes, ...)                                                                                           \
    static void name##_##lanes(const pl_weight *w, const uint8_t *panel, uint8_t *tile, float *out, int64_t stride,         \
                               pl_next next) {                                                                              \
        product(__VA_ARGS__, lanes, w, panel, tile, out, stride, next);                                                     \
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

/* One column of half a panel of a float matrix. */
INLINE __m256 float_column(int type, const uint8_t *panel, int64_t at) {
    if (type == PL_F32) {
        return _mm256_load_ps((const float *)panel + at);
    }
    if (type == PL_F16) {
        return halves(panel + 2 * at);
    }
    const __m128i bits = _mm_load_si128((const __m128i *)(panel + 2 * at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* So many independent accumulators a lane and half hide the latency of the multiply-add when there is one lane; with more,
 * they are the same, so that a row's sums are. */
enum { CHAINS = 2 };

INLINE void product_float_n(int type, int lanes, int64_t columns, const uint8_t *panel, const float *x,
                            int64_t stride, float *out, int64_t out_stride) {
    __m256 total[12];
#pragma GCC unroll 12
    for (int t = 0; t < 2 * lanes * CHAINS; t++) {
        total[t] = _mm256_setzero_ps();
    }
    for (int64_t c = 0; c < columns; c += CHAINS) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++) {
            if (c + chain >= columns) {
                break;
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const __m256 u = float_column(type, panel, (c + chain) * PL_PANEL_ROWS + half * HALF_ROWS);
#pragma GCC unroll 4
                for (int t = 0; t < lanes; t++) {
                    __m256 *to = &total[(chain * 2 + half) * lanes + t];
                    *to = _mm256_fmadd_ps(u, _mm256_broadcast_ss(x + t * stride + c + chain), *to);
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < 2 * lanes; i++) {
#pragma GCC unroll 4
        for (int chain = 1; chain < CHAINS; chain++) {
            total[i] = _mm256_add_ps(total[i], total[chain * 2 * lanes + i]);
        }
        _mm256_storeu_ps(out + i % lanes * out_stride + i / lanes * HALF_ROWS, total[i]);
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

INLINE float largest_of(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

INLINE float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE int32_t integer_sum_of(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}

static void quantize(const float *x, int64_t stride, int32_t rows, int32_t n, uint8_t *tile, int32_t width, int32_t lanes,
                     int32_t lane, int32_t group) {
    float *d = pl_q8_d(tile, width, lanes), *sum32 = pl_q8_sum32(tile, width, lanes);
    int32_t *minus32 = pl_q8_minus32(tile, width, lanes), *minus16 = pl_q8_minus16(tile, width, lanes);
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int32_t i = 0; i < rows * n; i++) {
        const int32_t g = group + i % n, to_lane = lane + i / n;
        const float *from = x + i / n * stride + i % n * PL_GROUP;
        __m256 v[4], largest = _mm256_setzero_ps();
        __m256i q[4];
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(from + 8 * i);
            largest = _mm256_max_ps(largest, _mm256_and_ps(v[i], magnitude));
        }
        const float scale = largest_of(largest) / 127.0f;
        const __m256 inverse = _mm256_set1_ps(scale >= FLT_MIN ? 1.0f / scale : 0.0f);
        for (int i = 0; i < 4; i++) {
            q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
        }
        const __m256i a = _mm256_packs_epi32(q[0], q[1]), b = _mm256_packs_epi32(q[2], q[3]);
        const int32_t sum_a = integer_sum_of(_mm256_madd_epi16(a, _mm256_set1_epi16(1)));
        const int32_t sum_b = integer_sum_of(_mm256_madd_epi16(b, _mm256_set1_epi16(1)));
        /* Packing works within 128-bit lanes and leaves the fours of columns in the order 0 2 4 6 1 3 5 7. */
        const __m256i packed = _mm256_packs_epi16(a, b);
        _Alignas(32) int32_t fours[8];
        _mm256_store_si256((__m256i *)fours, _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        int32_t *to = (int32_t *)tile + (int64_t)g * 8 * lanes + to_lane;
        for (int i = 0; i < 8; i++) {
            to[i * lanes] = fours[i];
        }
        d[g * lanes + to_lane] = scale;
        sum32[g * lanes + to_lane] = scale * (float)(sum_a + sum_b);
        minus32[g * lanes + to_lane] = -(sum_a + sum_b);
        minus16[2 * g * lanes + to_lane] = -sum_a;
        minus16[(2 * g + 1) * lanes + to_lane] = -sum_b;
    }
}

/* All bits of the first `left` of 8 numbers: for masked loads and stores. */
INLINE __m256i tail(int32_t left) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static void rms_norm(const float *x, const float *factor, float epsilon, int32_t n, float *y) {
    __m256 squares = _mm256_setzero_ps();
    for (int32_t i = 0; i < n; i += 8) {
        const __m256 v = _mm256_maskload_ps(x + i, tail(n - i));
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    const __m256 scale = _mm256_set1_ps(1.0f / sqrtf(sum_of(squares) / (float)n + epsilon));
    for (int32_t i = 0; i < n; i += 8) {
        const __m256i mask = tail(n - i);
        const __m256 v = _mm256_mul_ps(_mm256_maskload_ps(x + i, mask), scale);
        _mm256_maskstore_ps(y + i, mask, _mm256_mul_ps(v, _mm256_maskload_ps(factor + i, mask)));
    }
}

/* e^x: 2^n times a polynomial in the rest, |rest| <= ln(2)/2; the polynomial is Cephes' expf's (Moshier). */
INLINE __m256 exp_ps(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
    /* n is -126 .. 127: the bits of 2^n */
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

/* Both activations are gate times a logistic function: silu of gate itself; gelu's 0.5 (1 + tanh z) is logistic(2z). */
static void glu(int32_t activation, const float *gate, const float *up, int32_t n, float *y) {
    const __m256 one = _mm256_set1_ps(1.0f);
    for (int32_t i = 0; i < n; i += 8) {
        const __m256i mask = tail(n - i);
        const __m256 g = _mm256_maskload_ps(gate + i, mask);
        __m256 z = g;
        if (activation == PL_GELU_TANH) {
            const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(g, g), _mm256_set1_ps(0.044715f), one);
            z = _mm256_mul_ps(_mm256_mul_ps(g, cubic), _mm256_set1_ps(2 * 0.79788456f));
        }
        const __m256 e = exp_ps(_mm256_sub_ps(_mm256_setzero_ps(), z));
        const __m256 v = _mm256_div_ps(_mm256_mul_ps(g, _mm256_maskload_ps(up + i, mask)), _mm256_add_ps(one, e));
        _mm256_maskstore_ps(y + i, mask, v);
    }
}

static void halve(const float *x, int32_t n, uint16_t *y) {
    const int32_t whole = n / 8 * 8;
    for (int32_t i = 0; i < whole; i += 8) {
        _mm_storeu_si128((__m128i *)(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    }
    for (int32_t i = whole; i < n; i++) {
        y[i] = pl_f32_to_f16(x[i]);
    }
}

static int32_t read(const uint8_t *p, int64_t bytes) {
    __m256i all[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        all[j] = _mm256_setzero_si256();
    }
    for (int64_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            all[j] = _mm256_xor_si256(all[j], _mm256_load_si256((const __m256i *)(p + i + 32 * j)));
        }
    }
#pragma GCC unroll 8
    for (int j = 1; j < 8; j++) {
        all[0] = _mm256_xor_si256(all[0], all[j]);
    }
    return integer_sum_of(all[0]);
}

/* As in the products of four-bit codes: without VNNI eight 16-bit sums of two, then widened. */
static int32_t multiply_add(int64_t rounds) {
    enum { SUMS = 8, RUN = 8, STEPS = PL_ROUND_PRODUCTS / (SUMS * RUN * 32) };
    const __m256i x = _mm256_set1_epi8(-5);
    __m256i u = _mm256_set1_epi8(3), sum[SUMS], narrow[SUMS];
#pragma GCC unroll 8
    for (int t = 0; t < SUMS; t++) {
        sum[t] = _mm256_setzero_si256();
    }
    for (int64_t i = 0; i < rounds * STEPS; i++) {
#pragma GCC unroll 8
        for (int step = 0; step < RUN; step++) {
#pragma GCC unroll 8
            for (int t = 0; t < SUMS; t++) {
                __asm__ volatile("" : "+x"(u)); /* the compiler shall not see that all products are equal */
                add_products(4, RUN, step, u, x, &narrow[t], &sum[t]);
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 1; t < SUMS; t++) {
        sum[0] = _mm256_xor_si256(sum[0], sum[t]);
    }
    return integer_sum_of(sum[0]);
}

const pl_kernels TABLE = {
    MAX_LANES, 1, product_for, product_float, quantize, rms_norm, glu, rotate, halve, read, multiply_add, NULL,
};

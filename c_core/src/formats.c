/* formats.c - reading GGUF's blocks: see formats.h. Layouts after the GGUF documents of ggml. */
#include "formats.h"

#define ROW(...) {__VA_ARGS__},
static const pl_format formats[] = {PL_FLOAT_FORMATS(ROW) PL_QUANTIZED_FORMATS(ROW)};

const pl_format *pl_format_of(int32_t type) {
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        if (formats[i].type == type) {
            return &formats[i];
        }
    }
    return NULL;
}

/* The nibbles of 16 bytes: low ones are columns 0-15, high ones 16-31. */
static void nibbles(const uint8_t *q, uint8_t codes[PL_GROUP]) {
    for (int j = 0; j < 16; j++) {
        codes[j] = q[j] & 15;
        codes[j + 16] = q[j] >> 4;
    }
}

/* Adds bit j of the 32-bit word at `bits` to code j, as its bit 4. */
static void fifth_bits(const uint8_t *bits, uint8_t codes[PL_GROUP]) {
    for (int j = 0; j < PL_GROUP; j++) {
        codes[j] |= (uint8_t)((bits[j / 8] >> j % 8 & 1) << 4);
    }
}

void pl_format_codes(const pl_format *f, const uint8_t *block, int32_t group, uint8_t codes[PL_GROUP]) {
    const int half = group / 4, quarter = group % 4; /* K formats: 128 columns a half, 32 a quarter of it */
    const uint8_t *q;
    switch (f->type) {
    case PL_Q4_0:
        nibbles(block + 2, codes);
        break;
    case PL_Q4_1:
        nibbles(block + 4, codes);
        break;
    case PL_Q5_0:
        nibbles(block + 6, codes);
        fifth_bits(block + 2, codes);
        break;
    case PL_Q5_1:
        nibbles(block + 8, codes);
        fifth_bits(block + 4, codes);
        break;
    case PL_Q8_0: /* signed in the file: u = q + 128 */
        for (int j = 0; j < PL_GROUP; j++) {
            codes[j] = block[2 + j] ^ 0x80;
        }
        break;
    case PL_Q2_K:
        q = block + 16 + 32 * half;
        for (int j = 0; j < PL_GROUP; j++) {
            codes[j] = q[j] >> 2 * quarter & 3;
        }
        break;
    case PL_Q3_K:
        q = block + 32 + 32 * half;
        for (int j = 0; j < PL_GROUP; j++) {
            codes[j] = (uint8_t)((q[j] >> 2 * quarter & 3) | (block[j] >> group & 1) << 2);
        }
        break;
    case PL_Q4_K:
        q = block + 16 + 32 * (group / 2);
        for (int j = 0; j < PL_GROUP; j++) {
            codes[j] = q[j] >> 4 * (group % 2) & 15;
        }
        break;
    case PL_Q5_K:
        q = block + 48 + 32 * (group / 2);
        for (int j = 0; j < PL_GROUP; j++) {
            codes[j] = (uint8_t)((q[j] >> 4 * (group % 2) & 15) | (block[16 + j] >> group & 1) << 4);
        }
        break;
    case PL_Q6_K:
        q = block + 64 * half + 32 * (quarter % 2);
        for (int j = 0; j < PL_GROUP; j++) {
            codes[j] = (uint8_t)((q[j] >> 4 * (quarter / 2) & 15) | (block[128 + 32 * half + j] >> 2 * quarter & 3) << 4);
        }
        break;
    default:
        break;
    }
}

void pl_format_factors(const pl_format *f, const uint8_t *block, int32_t j, int32_t *scale, int32_t *min) {
    const uint8_t *s;
    *min = 0;
    switch (f->type) {
    case PL_Q2_K:
        *scale = block[j] & 15;
        *min = block[j] >> 4;
        break;
    case PL_Q3_K: /* 16 six-bit numbers: low nibbles in 8 bytes, high pairs in 4 */
        s = block + 96;
        *scale = ((j < 8 ? s[j] & 15 : s[j - 8] >> 4) | (s[8 + j % 4] >> 2 * (j / 4) & 3) << 4) - 32;
        break;
    case PL_Q4_K:
    case PL_Q5_K: /* 8 + 8 six-bit numbers in 12 bytes */
        s = block + 4;
        if (j < 4) {
            *scale = s[j] & 63;
            *min = s[j + 4] & 63;
        } else {
            *scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
            *min = s[j + 4] >> 4 | (s[j] >> 6) << 4;
        }
        break;
    default: /* PL_Q6_K */
        *scale = (int8_t)block[192 + j];
        break;
    }
}

void pl_format_halves(const pl_format *f, const uint8_t *block, uint16_t *d, uint16_t *m) {
    *d = f->d_at < 0 ? 0 : pl_load_u16(block + f->d_at);
    *m = f->m_at < 0 ? 0 : pl_load_u16(block + f->m_at);
}

void pl_format_affine(const pl_format *f, const uint8_t *block, int32_t group, float d[2], float m[2]) {
    uint16_t half_d, half_m;
    pl_format_halves(f, block, &half_d, &half_m);
    const float big_d = pl_f16_to_f32(half_d), big_m = pl_f16_to_f32(half_m);
    for (int i = 0; i < 2; i++) {
        if (f->scales == PL_SCALES_D || f->scales == PL_SCALES_DM) {
            d[i] = big_d;
            m[i] = f->offset ? big_d * (float)f->offset : -big_m;
        } else {
            int32_t scale, min;
            pl_format_factors(f, block, f->sub == 16 ? 2 * group + i : group, &scale, &min);
            d[i] = big_d * (float)scale;
            m[i] = f->offset ? d[i] * (float)f->offset : big_m * (float)min;
        }
    }
}

PL_API int32_t pl_type_block_elements(int32_t type) {
    const pl_format *f = pl_format_of(type);
    return f ? f->block_elements : 0;
}

PL_API int32_t pl_type_block_bytes(int32_t type) {
    const pl_format *f = pl_format_of(type);
    return f ? f->block_bytes : 0;
}

PL_API int64_t pl_type_bytes(int32_t type, int64_t n_rows, int64_t n_cols) {
    const pl_format *f = pl_format_of(type);
    const int64_t limit = (int64_t)1 << 62;
    if (!f || n_rows < 0 || n_cols < 0 || n_cols % f->block_elements != 0) {
        return -1;
    }
    const int64_t blocks = n_cols / f->block_elements;
    if (blocks > limit / f->block_bytes || (blocks && n_rows > limit / (blocks * f->block_bytes))) {
        return -1;
    }
    return n_rows * blocks * f->block_bytes;
}

PL_API int32_t pl_dequantize(int32_t type, const void *data, int64_t n_bytes, int64_t n, float *out, pl_error *err) {
    const pl_format *f = pl_format_of(type);
    if (!f) {
        return pl_fail(err, "tensor type %d is not one that pyllama reads", type);
    }
    const int64_t need = pl_type_bytes(type, 1, n);
    if (need < 0 || need != n_bytes) {
        return pl_fail(err, "%lld elements of tensor type %d do not take %lld bytes", (long long)n, type, (long long)n_bytes);
    }
    const uint8_t *p = data;
    if (type == PL_F32) {
        memcpy(out, p, (size_t)n_bytes);
        return 0;
    }
    if (pl_format_is_float(f)) {
        for (int64_t i = 0; i < n; i++) {
            const uint16_t h = pl_load_u16(p + 2 * i);
            out[i] = type == PL_F16 ? pl_f16_to_f32(h) : pl_bf16_to_f32(h);
        }
        return 0;
    }
    for (int64_t done = 0; done < n; done += f->block_elements, p += f->block_bytes) {
        for (int32_t group = 0; group < f->block_elements / PL_GROUP; group++) {
            uint8_t codes[PL_GROUP];
            float d[2], m[2];
            pl_format_codes(f, p, group, codes);
            pl_format_affine(f, p, group, d, m);
            float *y = out + done + group * PL_GROUP;
            for (int j = 0; j < PL_GROUP; j++) {
                y[j] = f->offset ? d[j / 16] * (float)(codes[j] - f->offset) : d[j / 16] * (float)codes[j] - m[j / 16];
            }
        }
    }
    return 0;
}

/* kv.c - the pool of key/value blocks: see kv.h. */
#include "cpu/kernels.h"

#include <math.h>
#include <sys/mman.h>

static bool is_quantized(int32_t type) { return type == PL_KV_Q8_0 || type == PL_KV_Q4_0; }

/* Of one block and one head, in which a row of V is `width` elements. */
static int64_t head_bytes(int32_t type, int64_t width) {
    switch (type) {
    case PL_KV_F32:
        return width * PL_BLOCK_TOKENS * 4;
    case PL_KV_F16:
        return width * PL_BLOCK_TOKENS * 2;
    default:
        return pl_kv_scales(type, (int32_t)width) + width / PL_KV_GROUP * PL_BLOCK_TOKENS * 2;
    }
}

PL_API pl_kv *pl_kv_new(int32_t n_layers, int32_t n_blocks, int32_t n_head_kv, int32_t head_dim, int32_t key_type,
                        int32_t value_type, pl_error *err) {
    enum { MOST = 1 << 20, MOST_BLOCKS = 1 << 25 };
    const int64_t limit = (int64_t)1 << 46;
    if (n_layers < 1 || n_layers > MOST || n_blocks < 1 || n_blocks > MOST_BLOCKS || n_head_kv < 1 || n_head_kv > MOST ||
        head_dim < 1 || head_dim > PL_KV_MOST_HEAD_DIM || key_type < PL_KV_F16 || key_type > PL_KV_Q4_0 ||
        value_type < PL_KV_F16 || value_type > PL_KV_Q4_0) {
        pl_fail(err, "a key/value pool of %d layers, %d blocks, %d heads of %d and types %d and %d was asked for", n_layers,
                n_blocks, n_head_kv, head_dim, key_type, value_type);
        return NULL;
    }
    if (head_dim % PL_KV_GROUP && (is_quantized(key_type) || is_quantized(value_type))) {
        pl_fail(err, "keys and values of this model cannot be quantized: a head of %d is not a multiple of %d", head_dim,
                PL_KV_GROUP);
        return NULL;
    }
    const int64_t key_bytes = head_bytes(key_type, head_dim), value_bytes = head_bytes(value_type, pl_kv_width(head_dim));
    const int64_t both = (key_bytes + value_bytes) * n_head_kv;
    if (n_blocks > limit / both || n_layers > limit / (both * n_blocks)) {
        pl_fail(err, "the key/value pool would be larger than 2^46 bytes");
        return NULL;
    }
    const pl_cpu_set *cpu = pl_cpu_wanted(err);
    pl_kv *kv = cpu ? pl_alloc(sizeof *kv, err) : NULL;
    if (!kv) {
        return NULL;
    }
    *kv = (pl_kv){n_layers, n_blocks, n_head_kv, head_dim, key_type, value_type, key_bytes, value_bytes, NULL, NULL,
                  both * n_blocks * n_layers, cpu->kernels->halve};
    /* Mapped, not allocated: blocks that are never written take no memory. */
    void *p = mmap(NULL, (size_t)kv->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        pl_fail(err, "out of memory: %lld bytes for keys and values were asked for", (long long)kv->bytes);
        pl_free(kv);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    madvise(p, (size_t)kv->bytes, MADV_HUGEPAGE); /* a hint: long contexts are read from end to end */
#endif
    kv->keys = p;
    kv->values = kv->keys + key_bytes * n_head_kv * n_blocks * n_layers;
    return kv;
}

PL_API void pl_kv_free(pl_kv *kv) {
    if (kv) {
        munmap(kv->keys, (size_t)kv->bytes);
        pl_free(kv);
    }
}

PL_API int64_t pl_kv_bytes(const pl_kv *kv) { return kv->bytes; }

/* ---- elements ------------------------------------------------------------------------------------------------------ */

/* Which code of a head an element is, counted in bytes for q8_0; for q4_0 the place is that of its byte. */
static int64_t key_code(int32_t type, int32_t d, int32_t at) {
    const int32_t fours = type == PL_KV_Q4_0 ? d / 8 : d / 4;
    return ((int64_t)fours * PL_BLOCK_TOKENS + at) * 4 + d % 4;
}

static int64_t value_code(int32_t type, int32_t head_dim, int32_t d, int32_t at) {
    const int32_t columns = type == PL_KV_Q4_0 ? head_dim / 2 : head_dim;
    const int32_t column = type == PL_KV_Q4_0 ? d / PL_KV_GROUP * 16 + d % 16 : d;
    return ((int64_t)(at / 4) * columns + column) * 4 + at % 4;
}

/* By how many bits a 4-bit code is shifted in its byte. */
static int key_shift(int32_t d) { return d / 4 % 2 * 4; }
static int value_shift(int32_t d) { return d / 16 % 2 * 4; }

/* The whole number next to x, within [low, high]; low for NaN. */
static int32_t whole(float x, int32_t low, int32_t high) {
    return x > (float)low ? (x < (float)high ? (int32_t)x : high) : low;
}

/* The codes of 32 elements, by GGUF's rules for the type, as signed numbers; returns the scale. */
static float quantize_group(int32_t type, const float *x, int32_t *codes) {
    float extreme = 0;
    for (int32_t i = 0; i < PL_KV_GROUP; i++) {
        extreme = fabsf(x[i]) > fabsf(extreme) ? x[i] : extreme;
    }
    if (type == PL_KV_Q8_0) {
        const float scale = fabsf(extreme) / 127, inverse = scale != 0 ? 1 / scale : 0;
        for (int32_t i = 0; i < PL_KV_GROUP; i++) {
            codes[i] = whole(roundf(x[i] * inverse), -127, 127);
        }
        return scale;
    }
    const float scale = extreme / -8, inverse = scale != 0 ? 1 / scale : 0;
    for (int32_t i = 0; i < PL_KV_GROUP; i++) {
        codes[i] = whole(x[i] * inverse + 8.5f, 0, 15) - 8;
    }
    return scale;
}

static void set_nibble(uint8_t *byte, int shift, int32_t code) {
    *byte = (uint8_t)((*byte & ~(15 << shift)) | code << shift);
}

void pl_kv_put_key(const pl_kv *kv, uint8_t *keys, int32_t at, const float *k) {
    const int32_t type = kv->key_type, head_dim = kv->head_dim;
    if (type == PL_KV_F32) {
        for (int32_t d = 0; d < head_dim; d++) {
            ((float *)keys)[d * PL_BLOCK_TOKENS + at] = k[d];
        }
        return;
    }
    if (type == PL_KV_F16) {
        uint16_t halves[PL_KV_MOST_HEAD_DIM];
        kv->halve(k, head_dim, halves);
        for (int32_t d = 0; d < head_dim; d++) {
            ((uint16_t *)keys)[d * PL_BLOCK_TOKENS + at] = halves[d];
        }
        return;
    }
    uint16_t *scales = (uint16_t *)(keys + pl_kv_scales(type, head_dim));
    for (int32_t d = 0; d < head_dim; d += PL_KV_GROUP) {
        int32_t codes[PL_KV_GROUP];
        scales[d / PL_KV_GROUP * PL_BLOCK_TOKENS + at] = pl_f32_to_f16(quantize_group(type, k + d, codes));
        for (int32_t i = 0; i < PL_KV_GROUP; i++) {
            uint8_t *byte = keys + key_code(type, d + i, at);
            if (type == PL_KV_Q8_0) {
                *byte = (uint8_t)(codes[i] + 128);
            } else {
                set_nibble(byte, key_shift(i), codes[i] + 8);
            }
        }
    }
}

void pl_kv_put_value(const pl_kv *kv, uint8_t *values, int32_t at, const float *v) {
    const int32_t type = kv->value_type, head_dim = kv->head_dim;
    if (type == PL_KV_F32) {
        memcpy((float *)values + at * pl_kv_width(head_dim), v, sizeof *v * (size_t)head_dim);
        return;
    }
    if (type == PL_KV_F16) {
        kv->halve(v, head_dim, (uint16_t *)values + at * pl_kv_width(head_dim));
        return;
    }
    uint16_t *scales = (uint16_t *)(values + pl_kv_scales(type, head_dim));
    for (int32_t d = 0; d < head_dim; d += PL_KV_GROUP) {
        int32_t codes[PL_KV_GROUP];
        scales[d / PL_KV_GROUP * PL_BLOCK_TOKENS + at] = pl_f32_to_f16(quantize_group(type, v + d, codes));
        for (int32_t i = 0; i < PL_KV_GROUP; i++) {
            uint8_t *byte = values + value_code(type, head_dim, d + i, at);
            if (type == PL_KV_Q8_0) {
                *byte = (uint8_t)codes[i];
            } else {
                set_nibble(byte, value_shift(i), codes[i] + 8);
            }
        }
    }
}

void pl_kv_get_key(int32_t type, int32_t head_dim, const uint8_t *keys, int32_t at, float *k) {
    const uint16_t *scales = (const uint16_t *)(keys + pl_kv_scales(type, head_dim));
    for (int32_t d = 0; d < head_dim; d++) {
        if (type == PL_KV_F32) {
            k[d] = ((const float *)keys)[d * PL_BLOCK_TOKENS + at];
        } else if (type == PL_KV_F16) {
            k[d] = pl_f16_to_f32(((const uint16_t *)keys)[d * PL_BLOCK_TOKENS + at]);
        } else {
            const int32_t byte = keys[key_code(type, d, at)];
            const int32_t code = type == PL_KV_Q8_0 ? byte - 128 : (byte >> key_shift(d) & 15) - 8;
            k[d] = (float)code * pl_f16_to_f32(scales[d / PL_KV_GROUP * PL_BLOCK_TOKENS + at]);
        }
    }
}

void pl_kv_get_value(int32_t type, int32_t head_dim, const uint8_t *values, int32_t at, float *v) {
    const int64_t width = pl_kv_width(head_dim);
    const uint16_t *scales = (const uint16_t *)(values + pl_kv_scales(type, head_dim));
    for (int32_t d = 0; d < head_dim; d++) {
        if (type == PL_KV_F32) {
            v[d] = ((const float *)values)[at * width + d];
        } else if (type == PL_KV_F16) {
            v[d] = pl_f16_to_f32(((const uint16_t *)values)[at * width + d]);
        } else {
            const uint8_t byte = values[value_code(type, head_dim, d, at)];
            const int32_t code = type == PL_KV_Q8_0 ? (int8_t)byte : (byte >> value_shift(d) & 15) - 8;
            v[d] = (float)code * pl_f16_to_f32(scales[d / PL_KV_GROUP * PL_BLOCK_TOKENS + at]);
        }
    }
}

void pl_kv_turn(int32_t key_type, int32_t head_dim, float *x) {
    if (key_type != PL_KV_Q4_0) {
        return;
    }
    const int32_t n = head_dim & -head_dim; /* the largest power of two that the head is made of */
    const float scale = 1.0f / sqrtf((float)n);
    for (float *part = x; part < x + head_dim; part += n) {
        for (int32_t apart = 1; apart < n; apart *= 2) {
            for (int32_t i = 0; i < n; i += 2 * apart) {
                for (int32_t j = i; j < i + apart; j++) {
                    const float a = part[j], b = part[j + apart];
                    part[j] = a + b;
                    part[j + apart] = a - b;
                }
            }
        }
        for (int32_t i = 0; i < n; i++) {
            part[i] *= scale;
        }
    }
}

/* ---- copies -------------------------------------------------------------------------------------------------------- */

/* Rotates a token's K by `distance` positions. */
static void rotate(float *k, int32_t distance, const float *frequencies, int32_t n_rotated, int32_t rope_kind) {
    const int32_t step = rope_kind == PL_ROPE_PAIRS ? 2 : 1, apart = rope_kind == PL_ROPE_PAIRS ? 1 : n_rotated / 2;
    for (int32_t i = 0; i < n_rotated / 2; i++) {
        const double angle = (double)distance * (double)frequencies[i];
        const float cosine = (float)cos(angle), sine = (float)sin(angle);
        float *a = k + i * step, *b = a + apart;
        const float x0 = *a, x1 = *b;
        *a = x0 * cosine - x1 * sine;
        *b = x0 * sine + x1 * cosine;
    }
}

/* Moves a token of one head as it stands: all bytes of its that `pl_kv_put_key` would write. */
static void move_key(const pl_kv *kv, const uint8_t *from, int32_t from_at, uint8_t *to, int32_t to_at) {
    const int32_t type = kv->key_type, head_dim = kv->head_dim;
    const int32_t unit = type == PL_KV_F16 ? 2 : 4;
    const int64_t rows = pl_kv_scales(type, head_dim) / (4 * PL_BLOCK_TOKENS);
    for (int64_t row = 0; row < (is_quantized(type) ? rows : head_dim); row++) {
        memcpy(to + (row * PL_BLOCK_TOKENS + to_at) * unit, from + (row * PL_BLOCK_TOKENS + from_at) * unit, (size_t)unit);
    }
    for (int64_t group = 0; is_quantized(type) && group < head_dim / PL_KV_GROUP; group++) {
        const int64_t scales = pl_kv_scales(type, head_dim) + group * PL_BLOCK_TOKENS * 2;
        memcpy(to + scales + to_at * 2, from + scales + from_at * 2, 2);
    }
}

static void move_value(const pl_kv *kv, const uint8_t *from, int32_t from_at, uint8_t *to, int32_t to_at) {
    const int32_t type = kv->value_type, head_dim = kv->head_dim;
    if (!is_quantized(type)) {
        const int64_t row_bytes = kv->value_bytes / PL_BLOCK_TOKENS;
        memcpy(to + to_at * row_bytes, from + from_at * row_bytes, (size_t)row_bytes);
        return;
    }
    const int64_t columns = type == PL_KV_Q4_0 ? head_dim / 2 : head_dim;
    for (int64_t i = 0; i < columns; i++) {
        to[(to_at / 4 * columns + i) * 4 + to_at % 4] = from[(from_at / 4 * columns + i) * 4 + from_at % 4];
    }
    for (int64_t group = 0; group < head_dim / PL_KV_GROUP; group++) {
        const int64_t scales = pl_kv_scales(type, head_dim) + group * PL_BLOCK_TOKENS * 2;
        memcpy(to + scales + to_at * 2, from + scales + from_at * 2, 2);
    }
}

void pl_kv_copy_run(pl_kv *kv, int32_t layer, const int32_t *src_blocks, int32_t src_pos, const int32_t *dst_blocks,
                    int32_t dst_pos, int32_t n, const float *frequencies, int32_t n_rotated, int32_t rope_kind) {
    float k[PL_KV_MOST_HEAD_DIM];
    for (int32_t i = 0; i < n; i++) {
        const int32_t from = src_pos + i, to = dst_pos + i;
        const int32_t from_block = src_blocks[from / PL_BLOCK_TOKENS], to_block = dst_blocks[to / PL_BLOCK_TOKENS];
        const int32_t from_at = from % PL_BLOCK_TOKENS, to_at = to % PL_BLOCK_TOKENS;
        const bool same_place = from_block == to_block && from_at == to_at; /* the lists may share blocks */
        for (int32_t head = 0; head < kv->n_head_kv; head++) {
            const uint8_t *keys = pl_kv_keys(kv, layer, from_block, head);
            uint8_t *to_keys = pl_kv_keys(kv, layer, to_block, head);
            if (frequencies && src_pos != dst_pos) {
                pl_kv_get_key(kv->key_type, kv->head_dim, keys, from_at, k);
                pl_kv_turn(kv->key_type, kv->head_dim, k);
                rotate(k, dst_pos - src_pos, frequencies, n_rotated, rope_kind);
                pl_kv_turn(kv->key_type, kv->head_dim, k);
                pl_kv_put_key(kv, to_keys, to_at, k);
            } else if (!same_place) {
                move_key(kv, keys, from_at, to_keys, to_at);
            }
            if (!same_place) {
                move_value(kv, pl_kv_values(kv, layer, from_block, head), from_at, pl_kv_values(kv, layer, to_block, head),
                           to_at);
            }
        }
    }
}

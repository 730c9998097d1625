/* kv.c - the pool of key/value blocks: see kv.h. */
#include "kv.h"

#include <math.h>
#include <sys/mman.h>

PL_API pl_kv *pl_kv_new(int32_t n_layers, int32_t n_blocks, int32_t n_head_kv, int32_t head_dim, int32_t type, pl_error *err) {
    enum { MOST = 1 << 20 };
    const int64_t limit = (int64_t)1 << 46;
    if (n_layers < 1 || n_layers > MOST || n_blocks < 1 || n_blocks > 1 << 26 || n_head_kv < 1 || n_head_kv > MOST ||
        head_dim < 1 || head_dim > MOST || (type != PL_KV_F16 && type != PL_KV_F32)) {
        pl_fail(err, "a key/value pool of %d layers, %d blocks, %d heads of %d and type %d was asked for", n_layers, n_blocks,
                n_head_kv, head_dim, type);
        return NULL;
    }
    const int32_t element_bytes = type == PL_KV_F16 ? 2 : 4;
    const int64_t head_bytes = (int64_t)head_dim * PL_BLOCK_TOKENS * element_bytes;
    if (n_blocks > limit / head_bytes / n_head_kv || 2 * n_layers > limit / (head_bytes * n_head_kv * n_blocks)) {
        pl_fail(err, "the key/value pool would be larger than 2^46 bytes");
        return NULL;
    }
    pl_kv *kv = pl_alloc(sizeof *kv, err);
    if (!kv) {
        return NULL;
    }
    *kv = (pl_kv){n_layers, n_blocks, n_head_kv, head_dim, type, element_bytes, head_bytes,
                  head_bytes * n_head_kv * n_blocks, NULL, head_bytes * n_head_kv * n_blocks * 2 * n_layers};
    /* Mapped, not allocated: blocks that are never written take no memory. */
    void *p = mmap(NULL, (size_t)kv->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        pl_fail(err, "out of memory: %lld bytes for keys and values were asked for", (long long)kv->bytes);
        pl_free(kv);
        return NULL;
    }
    kv->base = p;
    return kv;
}

PL_API void pl_kv_free(pl_kv *kv) {
    if (kv) {
        munmap(kv->base, (size_t)kv->bytes);
        pl_free(kv);
    }
}

PL_API int64_t pl_kv_bytes(const pl_kv *kv) { return kv->bytes; }

static void put(const pl_kv *kv, uint8_t *to, int64_t index, float value) {
    if (kv->type == PL_KV_F16) {
        ((uint16_t *)to)[index] = pl_f32_to_f16(value);
    } else {
        ((float *)to)[index] = value;
    }
}

static float get(const pl_kv *kv, const uint8_t *from, int64_t index) {
    return kv->type == PL_KV_F16 ? pl_f16_to_f32(((const uint16_t *)from)[index]) : ((const float *)from)[index];
}

void pl_kv_store(pl_kv *kv, int32_t layer, const pl_sequence *sequence, int32_t head, int32_t first, int32_t n, const float *k,
                 const float *v, int64_t stride) {
    for (int32_t i = 0; i < n; i++, k += stride, v += stride) {
        const int32_t position = sequence->n_past + first + i, block = sequence->blocks[position / PL_BLOCK_TOKENS];
        const int32_t at = position % PL_BLOCK_TOKENS;
        uint8_t *keys = pl_kv_keys(kv, layer, block, head), *values = pl_kv_values(kv, layer, block, head);
        for (int32_t d = 0; d < kv->head_dim; d++) {
            put(kv, keys, d * PL_BLOCK_TOKENS + at, k[d]);
            put(kv, values, (int64_t)at * kv->head_dim + d, v[d]);
        }
    }
}

/* Moves one token's K of one head, rotated by the given angle times each frequency. */
static void copy_key(const pl_kv *kv, const uint8_t *from, int32_t from_at, uint8_t *to, int32_t to_at, int32_t distance,
                     const float *frequencies, int32_t n_rotated, int32_t rope_kind) {
    const int32_t rotated = frequencies && distance ? n_rotated : 0;
    const int32_t step = rope_kind == PL_ROPE_PAIRS ? 2 : 1, apart = rope_kind == PL_ROPE_PAIRS ? 1 : rotated / 2;
    for (int32_t i = 0; i < rotated / 2; i++) {
        const double angle = (double)distance * (double)frequencies[i];
        const float cosine = (float)cos(angle), sine = (float)sin(angle);
        const int64_t a = i * step, b = a + apart;
        const float x0 = get(kv, from, a * PL_BLOCK_TOKENS + from_at), x1 = get(kv, from, b * PL_BLOCK_TOKENS + from_at);
        put(kv, to, a * PL_BLOCK_TOKENS + to_at, x0 * cosine - x1 * sine);
        put(kv, to, b * PL_BLOCK_TOKENS + to_at, x0 * sine + x1 * cosine);
    }
    for (int64_t d = rotated; d < kv->head_dim; d++) {
        memcpy(to + (d * PL_BLOCK_TOKENS + to_at) * kv->element_bytes, from + (d * PL_BLOCK_TOKENS + from_at) * kv->element_bytes,
               (size_t)kv->element_bytes);
    }
}

void pl_kv_copy_run(pl_kv *kv, int32_t layer, const int32_t *src_blocks, int32_t src_pos, const int32_t *dst_blocks,
                    int32_t dst_pos, int32_t n, const float *frequencies, int32_t n_rotated, int32_t rope_kind) {
    const int64_t row_bytes = (int64_t)kv->head_dim * kv->element_bytes;
    for (int32_t i = 0; i < n; i++) {
        const int32_t from = src_pos + i, to = dst_pos + i;
        const int32_t from_block = src_blocks[from / PL_BLOCK_TOKENS], to_block = dst_blocks[to / PL_BLOCK_TOKENS];
        const int32_t from_at = from % PL_BLOCK_TOKENS, to_at = to % PL_BLOCK_TOKENS;
        for (int32_t head = 0; head < kv->n_head_kv; head++) {
            copy_key(kv, pl_kv_keys(kv, layer, from_block, head), from_at, pl_kv_keys(kv, layer, to_block, head), to_at,
                     dst_pos - src_pos, frequencies, n_rotated, rope_kind);
            memcpy(pl_kv_values(kv, layer, to_block, head) + to_at * row_bytes,
                   pl_kv_values(kv, layer, from_block, head) + from_at * row_bytes, (size_t)row_bytes);
        }
    }
}

/*
 * activations.h - the "q8" layout of quantized activations.
 *
 * Each group of 32 columns of a row becomes int8 codes q and a float d with x = d * q. Rows are gathered in tiles of `lanes`
 * rows that a product kernel takes in one pass, one accumulator a row, and a tile is interleaved so that the kernel walks it
 * with a single pointer:
 *
 *   int8  q[width/4][lanes][4]
 *   float d[width/32][lanes]
 *   float sum32[width/32][lanes]     d times the sum of the group's q: what a format's -m is multiplied with
 *   int32 minus32[width/32][lanes]   minus the sum of the group's q: times a format's offset, where integer sums begin
 *   int32 minus16[width/16][lanes]   the same for the formats with scales per 16 columns
 *
 * The number of lanes follows from the number of rows, so that no tile has more than one idle lane: a batch of 8 tokens on a
 * 6-lane kernel becomes two tiles of 4.
 */
#ifndef PL_ACTIVATIONS_H
#define PL_ACTIVATIONS_H

#include "formats.h"

enum { PL_MAX_LANES = 6 };

typedef struct pl_q8 {
    uint8_t *base;
    int32_t width, n_rows;
    int32_t lanes, n_tiles;
    int64_t tile_bytes;
} pl_q8;

enum { PL_GROUP_BYTES = PL_GROUP + 5 * 4 }; /* of a row */

static inline int64_t pl_q8_tile_bytes(int32_t width, int32_t lanes) {
    return pl_round_up((int64_t)width / PL_GROUP * PL_GROUP_BYTES * lanes, 64);
}

/* Bytes that hold any number of rows up to `max_rows`, whatever the kernel's lanes. */
static inline int64_t pl_q8_bytes(int32_t width, int32_t max_rows) {
    return ((int64_t)width / PL_GROUP * PL_GROUP_BYTES + 64) * (2 * (int64_t)max_rows);
}

static inline pl_q8 pl_q8_view(void *base, int32_t width, int32_t n_rows, int32_t max_lanes) {
    pl_q8 q = {.base = base, .width = width, .n_rows = n_rows};
    q.n_tiles = (n_rows + max_lanes - 1) / max_lanes;
    q.lanes = q.n_tiles ? (n_rows + q.n_tiles - 1) / q.n_tiles : 1;
    q.tile_bytes = pl_q8_tile_bytes(width, q.lanes);
    return q;
}

static inline uint8_t *pl_q8_tile(const pl_q8 *q, int32_t tile) { return q->base + tile * q->tile_bytes; }

/* The planes of numbers of a tile. */
static inline float *pl_q8_d(uint8_t *tile, int32_t width, int32_t lanes) { return (float *)(tile + (int64_t)width * lanes); }
static inline float *pl_q8_sum32(uint8_t *tile, int32_t width, int32_t lanes) {
    return pl_q8_d(tile, width, lanes) + (int64_t)width / PL_GROUP * lanes;
}
static inline int32_t *pl_q8_minus32(uint8_t *tile, int32_t width, int32_t lanes) {
    return (int32_t *)(pl_q8_sum32(tile, width, lanes) + (int64_t)width / PL_GROUP * lanes);
}
static inline int32_t *pl_q8_minus16(uint8_t *tile, int32_t width, int32_t lanes) {
    return pl_q8_minus32(tile, width, lanes) + (int64_t)width / PL_GROUP * lanes;
}

#endif

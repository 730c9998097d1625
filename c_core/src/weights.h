/*
 * weights.h - matrices re-laid for products.
 *
 * A panel is 16 neighbouring rows, so that a 512-bit register holds one 32-bit number of each. Of the quantized formats a
 * panel keeps planes, one after another, each beginning at a multiple of 64 bytes (n groups of 32 columns):
 *
 *   low   8 bits: [n][8][16 rows][4]   byte j of piece i is the code of column 4i + j
 *         4 bits: [n][4][16 rows][4]   the same for pieces 0-3 in the low nibbles, 4-7 in the high ones
 *   two   2 bits: [n][2][16 rows][4]   byte j of word h holds, at bits 2i.., column 4(4h + i) + j
 *   one   1 bit:  [n][16 rows][4]      byte j holds, at bit i, column 4i + j
 *   scales, by enum pl_scales:
 *         D     half d[n][16]
 *         DM    half [n][2][16]: d, then -m
 *         K32   [n/8] of { half D[16], dmin[16]; uint8 factor of D[8][16], of dmin[8][16] }
 *         K16M  [n/8] of { half D[16], dmin[16]; uint8 both factors [16][16], D's in the low nibble }
 *         K16   [n/8] of { half D[16]; int8 factor[16][16] }
 *
 * Float formats: [column][16 rows]. Rows past the end of the matrix are zero.
 */
#ifndef PL_WEIGHTS_H
#define PL_WEIGHTS_H

#include "formats.h"

enum { PL_PANEL_ROWS = 16 };

struct pl_weight {
    const pl_format *format;
    int64_t n_rows, n_cols, n_panels;
    int64_t panel_bytes;
    int64_t two_at, one_at, scales_at; /* where the planes begin in a panel; `low` is at 0 */
    uint8_t *panels;
    bool owns_memory;
};

static inline const uint8_t *pl_weight_panel(const pl_weight *w, int64_t panel) { return w->panels + panel * w->panel_bytes; }

/* Bytes of 8 groups (256 columns) in the scale plane of a K format. */
static inline int32_t pl_scales_k_bytes(pl_scales s) { return s == PL_SCALES_K16 ? 32 + 256 : 64 + 256; }

/* One group of one row, read back from a panel: codes, and d, m as pl_format_affine gives them. */
void pl_weight_group(const pl_weight *w, int64_t row, int64_t group, uint8_t codes[PL_GROUP], float d[2], float m[2]);

/* Element of a float matrix. */
float pl_weight_float(const pl_weight *w, int64_t row, int64_t column);

#endif

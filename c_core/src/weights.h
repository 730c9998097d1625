/*
 * weights.h - matrices re-laid for products.
 *
 * A panel is 16 neighbouring rows, so that a 512-bit register holds one 32-bit number of each. A product reads a panel in
 * one stream from its beginning to its end: processors fetch ahead well along one stream, badly along several.
 *
 * In the quantized formats one or two groups of 32 columns share a line of 64 bytes with their scales, by enum pl_scales:
 *
 *   DM    half d[16], -m[16]; of one group
 *   D     half d[2 groups][16]
 *   K32   uint8 factors [2 groups]{ of D[16], of dmin[16] }
 *   K16M  uint8 both factors [2 groups][2 halves][16], D's in the low nibble
 *   K16   int8 factor[2 groups][2 halves][16]
 *
 * In the K formats a head, half D[16], dmin[16], stands before the first of four lines. A line is followed by the codes of its
 * groups, one after the other, in those planes that the format has:
 *
 *   low   8 bits: [8][16 rows][4]   byte j of piece i is the code of column 4i + j
 *         4 bits: [4][16 rows][4]   the same for pieces 0-3 in the low nibbles, 4-7 in the high ones
 *   two   2 bits: [2][16 rows][4]   byte j of word h holds, at bits 2i.., column 4(4h + i) + j
 *   one   1 bit:  [16 rows][4]      byte j holds, at bit i, column 4i + j
 *
 * Everything begins at multiples of 64 bytes; an odd last group has a line to itself. Float formats: [column][16 rows]. Rows
 * past the end of the matrix are zero.
 */
#ifndef PL_WEIGHTS_H
#define PL_WEIGHTS_H

#include "formats.h"

enum { PL_PANEL_ROWS = 16 };

struct pl_weight {
    const pl_format *format;
    int64_t n_rows, n_cols, n_panels;
    int64_t panel_bytes;
    uint8_t *panels;
    bool owns_memory;
};

static inline const uint8_t *pl_weight_panel(const pl_weight *w, int64_t panel) { return w->panels + panel * w->panel_bytes; }

enum { PL_LINE_BYTES = 64, PL_HEAD_GROUPS = 8 };

/* Groups that share a line, whether heads stand before lines, and where in a group's codes the planes begin and end. */
static inline int32_t pl_line_groups(pl_scales s) { return s == PL_SCALES_DM ? 1 : 2; }
static inline bool pl_has_heads(pl_scales s) { return s == PL_SCALES_K32 || s == PL_SCALES_K16M || s == PL_SCALES_K16; }
static inline int32_t pl_two_at(int32_t low_bits) { return 64 * low_bits; }
static inline int32_t pl_one_at(int32_t low_bits, int32_t two_shift) { return pl_two_at(low_bits) + (two_shift >= 0 ? 128 : 0); }
static inline int32_t pl_code_bytes(int32_t low_bits, int32_t two_shift, int32_t one_shift) {
    return pl_one_at(low_bits, two_shift) + (one_shift >= 0 ? 64 : 0);
}

/* For walking through a panel group by group: `at` passes the scales that stand before a group's codes, which `head` and `line`
 * point to then. */
static inline __attribute__((always_inline)) void pl_pass_scales(pl_scales s, int64_t group, const uint8_t **at,
                                                                 const uint8_t **head, const uint8_t **line) {
    if (pl_has_heads(s) && group % PL_HEAD_GROUPS == 0) {
        *head = *at;
        *at += PL_LINE_BYTES;
    }
    if (group % pl_line_groups(s) == 0) {
        *line = *at;
        *at += PL_LINE_BYTES;
    }
}

/* Where the parts that belong to a group begin in a panel. */
typedef struct pl_place {
    int64_t head, line, codes;
} pl_place;

static inline pl_place pl_place_of(const pl_format *f, int64_t group) {
    /* One or two groups to a line: shifts, since divisions would take longer than a group. */
    const int shift = pl_line_groups(f->scales) - 1;
    const int64_t code_bytes = pl_code_bytes(f->low_bits, f->two_shift, f->one_shift);
    const int64_t line_bytes = PL_LINE_BYTES + (code_bytes << shift);
    const int64_t heads = pl_has_heads(f->scales) ? (int64_t)((uint64_t)group / PL_HEAD_GROUPS) + 1 : 0;
    const int64_t line = (group >> shift) * line_bytes + heads * PL_LINE_BYTES;
    const int64_t lines_since_head = (int64_t)((uint64_t)group % PL_HEAD_GROUPS) >> shift;
    return (pl_place){line - lines_since_head * line_bytes - PL_LINE_BYTES, line,
                      line + PL_LINE_BYTES + (group & shift) * code_bytes};
}

/* Re-lays up to 16 rows, which lie one behind the other at `data` as in the file, into a panel, whose other rows stay as they
 * are. Plain C; whole panels are done by the kernels of cpu/relay.h. */
void pl_relay_rows(const pl_weight *w, const uint8_t *data, int64_t n_rows, uint8_t *panel);

/* One group of one row, read back from a panel: codes, and d, m as pl_format_affine gives them. */
void pl_weight_group(const pl_weight *w, int64_t row, int64_t group, uint8_t codes[PL_GROUP], float d[2], float m[2]);

/* Element of a float matrix. */
float pl_weight_float(const pl_weight *w, int64_t row, int64_t column);

#endif

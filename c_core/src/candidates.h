/*
 * candidates.h - picking tokens out of a whole vocabulary by their logits.
 *
 * A candidate is one 64-bit number: the logit's bits, turned so that larger means better, above the inverted token
 * number. Comparing candidates is then comparing integers, and of two equal logits the lower token number is the better
 * one. NaN and -infinity are never candidates; +infinity counts as the largest finite number.
 */
#ifndef PL_CANDIDATES_H
#define PL_CANDIDATES_H

#include "common.h"

/* Up to so many, sorting is done by insertion and needs no scratch memory. */
#define PL_FEW 256

/* Sorts descending by the bits from `lowest_bit` up; stable, so that bits already in order need no pass. `scratch[n]`
 * is needed when n > PL_FEW. */
void pl_sort_descending(uint64_t *c, uint64_t *scratch, int64_t n, int lowest_bit);

/* A number as 32 bits that compare as integers like the numbers (not NaN). */
uint32_t pl_ordered_bits(float f);

/* The best logit, +infinity counting as the largest finite number; -infinity when there is none to take. */
float pl_best_logit(const float *logits, int32_t n);

/* These write tokens and logits, the best first, and return how many; -1 on failure. */
/* All that are at least `floor`; tokens[n], values[n]. */
int32_t pl_above(const float *logits, int32_t n, float floor, int32_t *tokens, double *values, pl_error *err);
/* The fewest, and at least one, whose probabilities sum to p or more; tokens[n], values[n]. */
int32_t pl_nucleus(const float *logits, int32_t n, double p, int32_t *tokens, double *values, pl_error *err);

#endif

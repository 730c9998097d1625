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

/* The logits of a vocabulary. */
typedef struct pl_logits {
    const float *x;
    int32_t n;
    const float *peaks; /* the largest of each PL_PEAK_LOGITS logits: where that is small, none need be looked at; or NULL */
} pl_logits;

/* The best logit, +infinity counting as the largest finite number; -infinity when there is none to take. */
float pl_best_logit(const pl_logits *logits);

/* log(sum of e^(logit * scale)), scale > 0; -infinity when there is nothing to sum. */
double pl_log_sum(const pl_logits *logits, double scale);

/* These write tokens and logits, the best first, and return how many; -1 on failure. */
/* The k >= 1 best; tokens[k], values[k]. */
int32_t pl_best(const pl_logits *logits, int32_t k, int32_t *tokens, double *values, pl_error *err);
/* All that are at least `floor`; tokens[n], values[n]. */
int32_t pl_above(const pl_logits *logits, float floor, int32_t *tokens, double *values, pl_error *err);
/* The fewest, and at least one, whose probabilities sum to p or more, and of these the ones that are at least `least`;
 * tokens[n], values[n]. */
int32_t pl_nucleus(const pl_logits *logits, double p, float least, int32_t *tokens, double *values, pl_error *err);

#endif

/* candidates.c - picking tokens out of a whole vocabulary: see candidates.h. */
#include "candidates.h"

#include "cpu/kernels.h"

#include <float.h>
#include <math.h>

enum {
    CHUNK = 64, /* logits looked at together */
    RADIX_BITS = 11,
    RADIX = 1 << RADIX_BITS,
    MOST_PARTS = 6 * PL_FEW,
};

static inline float finite_logit(float logit) { return logit > FLT_MAX ? FLT_MAX : logit; }

uint32_t pl_ordered_bits(float f) {
    uint32_t bits;
    f += 0.0f; /* minus zero becomes zero */
    memcpy(&bits, &f, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline uint64_t pack(float logit, int32_t token) {
    return (uint64_t)pl_ordered_bits(finite_logit(logit)) << 32 | (uint32_t)~token;
}

static inline float packed_logit(uint64_t candidate) {
    uint32_t bits = (uint32_t)(candidate >> 32);
    float f;
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline int32_t packed_token(uint64_t candidate) { return (int32_t)~(uint32_t)candidate; }

static inline void swap(uint64_t *a, uint64_t *b) {
    const uint64_t t = *a;
    *a = *b;
    *b = t;
}

static uint64_t smallest(const uint64_t *c, int64_t n) {
    uint64_t least = c[0];
    for (int64_t i = 1; i < n; i++) {
        least = PL_MIN(least, c[i]);
    }
    return least;
}

/* Moves the `k` largest of c[n] to its front, in no order, the k-th largest to c[k - 1] (quickselect, 1 <= k <= n). */
static void select_largest(uint64_t *c, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (c[middle] > c[low]) {
            swap(&c[middle], &c[low]);
        }
        if (c[high] > c[low]) {
            swap(&c[high], &c[low]);
        }
        if (c[high] > c[middle]) {
            swap(&c[high], &c[middle]);
        }
        const uint64_t pivot = c[middle]; /* the median of three: both scans below stop inside [low, high] */
        int64_t i = low, j = high;
        while (i <= j) {
            while (c[i] > pivot) {
                i++;
            }
            while (c[j] < pivot) {
                j--;
            }
            if (i <= j) {
                swap(&c[i++], &c[j--]);
            }
        }
        if (k - 1 <= j) {
            high = j;
        } else if (k - 1 >= i) {
            low = i;
        } else {
            return;
        }
    }
}

void pl_sort_descending(uint64_t *c, uint64_t *scratch, int64_t n, int lowest_bit) {
    if (n <= PL_FEW) {
        for (int64_t i = 1; i < n; i++) {
            const uint64_t candidate = c[i];
            int64_t j = i;
            for (; j > 0 && c[j - 1] < candidate; j--) {
                c[j] = c[j - 1];
            }
            c[j] = candidate;
        }
        return;
    }
    uint64_t *from = c, *to = scratch;
    for (int bit = lowest_bit; bit < 64; bit += RADIX_BITS) {
        int64_t start[RADIX] = {0}, sum = 0;
        for (int64_t i = 0; i < n; i++) {
            start[from[i] >> bit & (RADIX - 1)]++;
        }
        if (start[from[0] >> bit & (RADIX - 1)] == n) {
            continue; /* these bits are the same in all */
        }
        for (int digit = RADIX - 1; digit >= 0; digit--) {
            const int64_t count = start[digit];
            start[digit] = sum;
            sum += count;
        }
        for (int64_t i = 0; i < n; i++) {
            to[start[from[i] >> bit & (RADIX - 1)]++] = from[i];
        }
        uint64_t *t = from;
        from = to;
        to = t;
    }
    if (from != c) {
        memcpy(c, from, (size_t)n * sizeof *c);
    }
}

static void unpack(const uint64_t *c, int64_t n, int32_t *tokens, double *values) {
    for (int64_t i = 0; i < n; i++) {
        tokens[i] = packed_token(c[i]);
        values[i] = packed_logit(c[i]);
    }
}

static int32_t check_size(int32_t n, pl_error *err) {
    return n < 0 ? pl_fail(err, "a negative number of logits: %d", n) : 0;
}

/* Is one of CHUNK logits above the floor? Without a branch per element, so that compilers make vectors of it. */
static inline bool any_above(const float *logits, float floor) {
    int hit = 0;
    for (int j = 0; j < CHUNK; j++) {
        hit |= logits[j] > floor;
    }
    return hit != 0;
}

/* The largest of x[CHUNK * n]. */
static float maximum(const float *x, int32_t n) {
    float best[CHUNK];
    for (int lane = 0; lane < CHUNK; lane++) {
        best[lane] = -INFINITY;
    }
    for (int32_t i = 0; i < n; i++) {
        for (int lane = 0; lane < CHUNK; lane++) {
            best[lane] = x[CHUNK * i + lane] > best[lane] ? x[CHUNK * i + lane] : best[lane];
        }
    }
    for (int half = CHUNK / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++) {
            best[lane] = best[lane + half] > best[lane] ? best[lane + half] : best[lane];
        }
    }
    return best[0];
}

/* Adds those of x[n] that are above *floor to the candidates kept[count]; x[0] belongs to token `first`. Whenever more
 * than `limit` are kept, all but the best k go, and the floor rises to the k-th of these. Returns the new count. */
static int64_t keep_above(const float *x, int32_t n, int32_t first, float *floor, uint64_t *kept, int64_t count,
                          int64_t limit, int32_t k) {
    for (int32_t i = 0; i < n; i += CHUNK) {
        if (n - i >= CHUNK && !any_above(x + i, *floor)) {
            continue;
        }
        for (int32_t j = i; j < n && j < i + CHUNK; j++) {
            if (x[j] > *floor) {
                kept[count++] = pack(x[j], first + j);
            }
        }
        if (count > limit) {
            select_largest(kept, count, k);
            count = k;
            *floor = packed_logit(kept[k - 1]);
        }
    }
    return count;
}

/*
 * A number below which none of the best k of x[n] are, found with `parts` > k disjoint parts: k numbers reach the k-th largest
 * of the parts' maxima, and with several times k parts few others do. Part i is x[i], x[i + parts], x[i + 2 * parts] ...
 */
static float floor_by_columns(const float *x, int32_t n, int32_t k, int32_t parts) {
    float maxima[MOST_PARTS];
    uint64_t ordered[MOST_PARTS];
    memcpy(maxima, x, (size_t)parts * sizeof *maxima);
    for (int32_t row = 1; row < n / parts; row++) {
        for (int32_t i = 0; i < parts; i++) {
            maxima[i] = x[row * parts + i] > maxima[i] ? x[row * parts + i] : maxima[i];
        }
    }
    for (int32_t i = 0; i < parts; i++) {
        ordered[i] = pack(maxima[i] > -INFINITY ? maxima[i] : -INFINITY, i);
    }
    select_largest(ordered, parts, k);
    return nextafterf(packed_logit(ordered[k - 1]), -INFINITY);
}

/* The best k of x[n] in no order and maybe some others, for which there is room for 2k + CHUNK. Returns how many. */
static int64_t keep_best(const float *x, int32_t n, int32_t k, uint64_t *kept) {
    const int64_t limit = 2 * (int64_t)k;
    const int32_t parts = PL_MIN(6 * (int64_t)k, MOST_PARTS), chunks = n / CHUNK / parts, size = CHUNK * chunks;
    const int32_t n_blocks = chunks > 0 && k <= PL_FEW ? parts : 0;
    float floor = -INFINITY;
    int64_t count = 0;
    if (n_blocks > 0) { /* the parts are blocks, so that most need not be looked at again */
        float maxima[MOST_PARTS];
        uint64_t ordered[MOST_PARTS];
        for (int32_t i = 0; i < n_blocks; i++) {
            maxima[i] = maximum(x + i * size, chunks);
            ordered[i] = pack(maxima[i], i);
        }
        select_largest(ordered, n_blocks, k);
        floor = nextafterf(packed_logit(ordered[k - 1]), -INFINITY);
        for (int32_t i = 0; i < n_blocks; i++) {
            if (maxima[i] > floor) {
                count = keep_above(x + i * size, size, i * size, &floor, kept, count, limit, k);
            }
        }
    } else if (n > parts && k <= PL_FEW) {
        floor = floor_by_columns(x, n, k, parts);
    }
    const int32_t rest = n_blocks * size;
    return keep_above(x + rest, n - rest, rest, &floor, kept, count, limit, k);
}

static inline int32_t n_peaks(const pl_logits *l) { return (l->n + PL_PEAK_LOGITS - 1) / PL_PEAK_LOGITS; }
static inline int32_t peak_size(const pl_logits *l, int32_t peak) { return PL_MIN(PL_PEAK_LOGITS, l->n - peak * PL_PEAK_LOGITS); }

/* The same by way of the peaks, of which there are more than k: the k best logits are below the k best peaks, k <= PL_FEW. */
static int64_t keep_best_of_peaks(const pl_logits *l, int32_t k, uint64_t *kept) {
    const int64_t limit = 2 * (int64_t)k;
    int64_t n = keep_best(l->peaks, n_peaks(l), k, kept), count = 0;
    if (n > k) {
        select_largest(kept, n, k);
        n = k;
    }
    /* In the order of tokens, as keep_above wants them. */
    uint64_t peaks[PL_FEW];
    for (int64_t i = 0; i < n; i++) {
        peaks[i] = (uint32_t)~packed_token(kept[i]);
    }
    pl_sort_descending(peaks, NULL, n, 0);
    float floor = n == k ? nextafterf(packed_logit(smallest(kept, n)), -INFINITY) : -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        const int32_t peak = (int32_t)~(uint32_t)peaks[i], first = peak * PL_PEAK_LOGITS;
        count = keep_above(l->x + first, peak_size(l, peak), first, &floor, kept, count, limit, k);
    }
    return count;
}

int32_t pl_best(const pl_logits *l, int32_t k, int32_t *tokens, double *values, pl_error *err) {
    if (check_size(l->n, err) != 0) {
        return -1;
    }
    if (k < 1) {
        return pl_fail(err, "top-k needs k >= 1, not %d", k);
    }
    if (l->n == 0) {
        return 0;
    }
    k = PL_MIN(k, l->n);
    const int64_t room = 2 * (int64_t)k + CHUNK;
    uint64_t small[2 * PL_FEW + CHUNK], *kept = small, *large = NULL;
    if (k > PL_FEW) {
        large = pl_alloc(2 * (size_t)room * sizeof *large, err);
        if (!large) {
            return -1;
        }
        kept = large;
    }
    const bool by_peaks = l->peaks && k <= PL_FEW && k < n_peaks(l);
    int64_t count = by_peaks ? keep_best_of_peaks(l, k, kept) : keep_best(l->x, l->n, k, kept);
    if (count > k) {
        select_largest(kept, count, k);
        count = k;
    }
    pl_sort_descending(kept, large ? large + room : NULL, count, 0);
    unpack(kept, count, tokens, values);
    pl_free(large);
    return (int32_t)count;
}

PL_API int32_t pl_top_k(const float *logits, int32_t n, int32_t k, int32_t *tokens, double *values, pl_error *err) {
    const pl_logits l = {logits, n, NULL};
    return pl_best(&l, k, tokens, values, err);
}

/* Is there nothing to take below this peak? */
static inline bool is_below(const pl_logits *l, int32_t peak, float floor) { return l->peaks && !(l->peaks[peak] >= floor); }

int32_t pl_above(const pl_logits *l, float floor, int32_t *tokens, double *values, pl_error *err) {
    if (check_size(l->n, err) != 0) {
        return -1;
    }
    floor = floor > -FLT_MAX ? floor : -FLT_MAX; /* -infinity itself is never taken */
    int64_t count = 0;
    for (int32_t peak = 0; peak < n_peaks(l); peak++) {
        const float *x = l->x + peak * PL_PEAK_LOGITS;
        for (int32_t i = 0; !is_below(l, peak, floor) && i < peak_size(l, peak); i++) {
            count += x[i] >= floor;
        }
    }
    uint64_t *kept = pl_alloc(2 * (size_t)count * sizeof *kept, err);
    if (!kept) {
        return -1;
    }
    int64_t at = 0;
    for (int32_t peak = 0; peak < n_peaks(l) && at < count; peak++) {
        const int32_t first = peak * PL_PEAK_LOGITS;
        for (int32_t i = 0; !is_below(l, peak, floor) && i < peak_size(l, peak); i++) {
            if (l->x[first + i] >= floor) {
                kept[at++] = pack(l->x[first + i], first + i);
            }
        }
    }
    pl_sort_descending(kept, kept + count, count, 32); /* ascending token numbers are in order already */
    unpack(kept, count, tokens, values);
    pl_free(kept);
    return (int32_t)count;
}

float pl_best_logit(const pl_logits *l) {
    const float *x = l->peaks ? l->peaks : l->x;
    const int32_t n = l->peaks ? n_peaks(l) : l->n;
    float best = maximum(x, n / CHUNK);
    for (int32_t i = n - n % CHUNK; i < n; i++) {
        best = x[i] > best ? x[i] : best;
    }
    return finite_logit(best);
}

double pl_log_sum(const pl_logits *l, double scale) {
    const float best = pl_best_logit(l);
    return best > -INFINITY ? best * scale + log(pl_cpu()->exp_sum(l->x, l->n, best, (float)scale, -INFINITY)) : -INFINITY;
}

PL_API double pl_log_sum_exp(const float *logits, int32_t n, double scale) {
    const pl_logits l = {logits, n, NULL};
    return pl_log_sum(&l, scale);
}

/* Sum of e^(logit - best) over the logits that are at least `floor`. */
static double mass_above(const pl_logits *l, float best, float floor) {
    const pl_exp_sum exp_sum = pl_cpu()->exp_sum;
    if (!l->peaks) {
        return exp_sum(l->x, l->n, best, 1.0f, floor);
    }
    double mass = 0;
    for (int32_t peak = 0; peak < n_peaks(l); peak++) {
        if (!is_below(l, peak, floor)) {
            mass += exp_sum(l->x + peak * PL_PEAK_LOGITS, peak_size(l, peak), best, 1.0f, floor);
        }
    }
    return mass;
}

int32_t pl_nucleus(const pl_logits *l, double p, float least, int32_t *tokens, double *values, pl_error *err) {
    if (check_size(l->n, err) != 0) {
        return -1;
    }
    /* Only the candidates near the best one need sorting: how near is found by their mass. */
    const float best = pl_best_logit(l);
    const double wanted = p * pl_cpu()->exp_sum(l->x, l->n, best, 1.0f, -INFINITY);
    const double surely = wanted * (1 + 1e-5); /* whatever has been rounded */
    float margin = 4.0f;
    while (margin < 100.0f && best - margin > least && mass_above(l, best, best - margin) < surely) {
        margin *= 2.0f;
    }
    const float floor = margin < 100.0f ? best - margin : -INFINITY;
    const int32_t count = pl_above(l, PL_MAX(floor, least), tokens, values, err);
    double sum = 0;
    int32_t kept = 0;
    while (kept < count && (kept == 0 || sum < wanted)) {
        sum += exp(values[kept++] - best);
    }
    return count < 0 ? -1 : kept;
}

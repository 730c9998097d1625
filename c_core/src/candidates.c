/* candidates.c - picking tokens out of a whole vocabulary: see candidates.h. */
#include "candidates.h"

#include <float.h>
#include <math.h>

enum {
    CHUNK = 64, /* logits looked at together */
    RADIX_BITS = 11,
    RADIX = 1 << RADIX_BITS,
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

PL_API int32_t pl_top_k(const float *logits, int32_t n, int32_t k, int32_t *tokens, double *values, pl_error *err) {
    if (check_size(n, err) != 0) {
        return -1;
    }
    if (k < 1) {
        return pl_fail(err, "top-k needs k >= 1, not %d", k);
    }
    if (n == 0) {
        return 0;
    }
    k = PL_MIN(k, n);
    const int64_t limit = 2 * (int64_t)k, room = limit + CHUNK;
    uint64_t small[2 * PL_FEW + CHUNK], *kept = small, *large = NULL;
    if (k > PL_FEW) {
        large = pl_alloc(2 * (size_t)room * sizeof *large, err);
        if (!large) {
            return -1;
        }
        kept = large;
    }
    /* k logits reach the k-th largest of the maxima of blocks. With several times k blocks few others do. */
    enum { BLOCKS = 6 * PL_FEW };
    const int32_t wanted = PL_MIN(6 * (int64_t)k, BLOCKS), chunks = n / CHUNK / wanted, size = CHUNK * chunks;
    const int32_t n_blocks = chunks > 0 && k <= PL_FEW ? wanted : 0;
    float maxima[BLOCKS], floor = -INFINITY;
    uint64_t ordered[BLOCKS];
    for (int32_t i = 0; i < n_blocks; i++) {
        maxima[i] = maximum(logits + i * size, chunks);
        ordered[i] = pack(maxima[i], i);
    }
    if (n_blocks > 0) {
        select_largest(ordered, n_blocks, k);
        floor = nextafterf(packed_logit(ordered[k - 1]), -INFINITY);
    }
    int64_t count = 0;
    for (int32_t i = 0; i < n_blocks; i++) {
        if (maxima[i] > floor) {
            count = keep_above(logits + i * size, size, i * size, &floor, kept, count, limit, k);
        }
    }
    const int32_t rest = n_blocks * size;
    count = keep_above(logits + rest, n - rest, rest, &floor, kept, count, limit, k);
    if (count > k) {
        select_largest(kept, count, k);
        count = k;
    }
    pl_sort_descending(kept, large ? large + room : NULL, count, 0);
    unpack(kept, count, tokens, values);
    pl_free(large);
    return (int32_t)count;
}

int32_t pl_above(const float *logits, int32_t n, float floor, int32_t *tokens, double *values, pl_error *err) {
    if (check_size(n, err) != 0) {
        return -1;
    }
    floor = floor > -FLT_MAX ? floor : -FLT_MAX; /* -infinity itself is never taken */
    int64_t count = 0;
    for (int32_t i = 0; i < n; i++) {
        count += logits[i] >= floor;
    }
    uint64_t *kept = pl_alloc(2 * (size_t)count * sizeof *kept, err);
    if (!kept) {
        return -1;
    }
    int64_t at = 0;
    for (int32_t i = 0; i < n && at < count; i++) {
        if (logits[i] >= floor) {
            kept[at++] = pack(logits[i], i);
        }
    }
    pl_sort_descending(kept, kept + count, count, 32); /* ascending token numbers are in order already */
    unpack(kept, count, tokens, values);
    pl_free(kept);
    return (int32_t)count;
}

/* e^x for -87 <= x <= 0 within 2 units in the last place (Cody and Waite's reduction, minimax polynomial). Without
 * branches, so that compilers make vectors of a loop around it. */
static inline float exp_of_negative(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds, the integer in the low bits */
    int32_t exponent;
    memcpy(&exponent, &shifted, sizeof exponent);
    const float whole = shifted - 12582912.0f;
    const float r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const uint32_t bits = ((uint32_t)exponent - 0x4b400000u + 127u) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* Sum of e^((logit - best) * scale) over the logits that are at least `floor`. */
static double mass_above(const float *logits, int32_t n, float best, float scale, float floor) {
    double total = 0;
    for (int32_t i = 0; i < n; i += CHUNK) {
        float part[CHUNK], sum = 0;
        for (int j = 0; j < CHUNK; j++) {
            part[j] = -INFINITY;
        }
        memcpy(part, logits + i, sizeof *part * (size_t)PL_MIN(CHUNK, n - i));
        for (int j = 0; j < CHUNK; j++) { /* what is far below, or NaN, becomes e^-87: nothing beside the best one's 1 */
            float logit = part[j] < FLT_MAX ? part[j] : FLT_MAX;
            logit = part[j] >= floor ? logit : -INFINITY;
            const float x = (logit - best) * scale;
            part[j] = x > -87.0f ? x : -87.0f;
        }
        for (int j = 0; j < CHUNK; j++) {
            part[j] = exp_of_negative(part[j]);
        }
        for (int lane = 0; lane < 4; lane++) {
            for (int j = 4; j < CHUNK; j += 4) {
                part[lane] += part[lane + j];
            }
        }
        for (int lane = 0; lane < 4; lane++) {
            sum += part[lane];
        }
        total += sum;
    }
    return total;
}

float pl_best_logit(const float *logits, int32_t n) {
    float best = maximum(logits, n / CHUNK);
    for (int32_t i = n - n % CHUNK; i < n; i++) {
        best = logits[i] > best ? logits[i] : best;
    }
    return finite_logit(best);
}

PL_API double pl_log_sum_exp(const float *logits, int32_t n, double scale) {
    const float best = pl_best_logit(logits, n);
    return best > -INFINITY ? best * scale + log(mass_above(logits, n, best, (float)scale, -INFINITY)) : -INFINITY;
}

int32_t pl_nucleus(const float *logits, int32_t n, double p, int32_t *tokens, double *values, pl_error *err) {
    if (check_size(n, err) != 0) {
        return -1;
    }
    /* Only the candidates near the best one need sorting: how near is found by their mass. */
    const float best = pl_best_logit(logits, n);
    const double wanted = p * mass_above(logits, n, best, 1.0f, -INFINITY);
    float margin = 4.0f;
    while (margin < 100.0f && mass_above(logits, n, best, 1.0f, best - margin) < wanted) {
        margin *= 2.0f;
    }
    const int32_t count = pl_above(logits, n, margin < 100.0f ? best - margin : -INFINITY, tokens, values, err);
    double sum = 0;
    int32_t kept = 0;
    while (kept < count && (kept == 0 || sum < wanted)) {
        sum += exp(values[kept++] - best);
    }
    return count < 0 ? -1 : kept;
}

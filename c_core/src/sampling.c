/*
 * sampling.c - from logits to a token: bias and penalties, then a chain of steps that choose candidates and thin them
 * out, then a draw. Candidates are sorted, the best first; each step takes probabilities to be those of the candidates
 * left.
 */
#include <float.h>
#include <math.h>

#include "candidates.h"

/* ---- bias and penalties ------------------------------------------------------------------------------------------- */

static void penalize(const pl_sampling *s, float *logit, int64_t count) {
    *logit = *logit > 0 ? *logit / s->repeat : *logit * s->repeat;
    *logit -= (float)count * s->frequency + s->presence;
}

/* Applies the penalties to every token among the recent ones, as often as it occurs there. */
static int32_t penalize_recent(const pl_sampling *s, float *logits, pl_error *err) {
    uint64_t few[PL_FEW], *sorted = few, *many = NULL;
    if (s->n_recent > PL_FEW) {
        many = sorted = pl_alloc(2 * (size_t)s->n_recent * sizeof *many, err);
        if (!many) {
            return -1;
        }
    }
    for (int32_t i = 0; i < s->n_recent; i++) {
        sorted[i] = (uint32_t)s->recent[i];
    }
    pl_sort_descending(sorted, sorted + s->n_recent, s->n_recent, 0);
    for (int64_t i = 0, end; i < s->n_recent; i = end) { /* runs of the same token */
        for (end = i + 1; end < s->n_recent && sorted[end] == sorted[i];) {
            end++;
        }
        const int64_t token = (int64_t)sorted[i];
        if (token < s->n_vocab && token != s->exempt) {
            penalize(s, &logits[token], end - i);
        }
    }
    pl_free(many);
    return 0;
}

/* Finds the peak anew under which a token is. */
static void renew_peak(const pl_sampling *s, const float *logits, float *peaks, int32_t token) {
    const int32_t peak = token / PL_PEAK_LOGITS, first = peak * PL_PEAK_LOGITS;
    float best = -INFINITY;
    for (int32_t i = first; i < PL_MIN(first + PL_PEAK_LOGITS, s->n_vocab); i++) {
        best = logits[i] > best ? logits[i] : best;
    }
    peaks[peak] = best;
}

static void renew_peaks(const pl_sampling *s, const float *logits, float *peaks) {
    for (int32_t i = 0; i < s->n_biased; i++) {
        renew_peak(s, logits, peaks, s->biased[i]);
    }
    for (int32_t i = 0; i < s->n_recent; i++) {
        if (s->recent[i] >= 0 && s->recent[i] < s->n_vocab) {
            renew_peak(s, logits, peaks, s->recent[i]);
        }
    }
    renew_peak(s, logits, peaks, s->n_vocab - 1); /* a model may have more logits than there are tokens */
}

static int32_t adjust(const pl_sampling *s, float *logits, float *peaks, pl_error *err) {
    for (int32_t i = 0; i < s->n_biased; i++) {
        if (s->biased[i] < 0 || s->biased[i] >= s->n_vocab) {
            return pl_fail(err, "token %d is not in the vocabulary of %d", s->biased[i], s->n_vocab);
        }
        logits[s->biased[i]] += s->bias[i];
    }
    if (s->n_recent > 0 && penalize_recent(s, logits, err) != 0) {
        return -1;
    }
    if (peaks) {
        renew_peaks(s, logits, peaks);
    }
    return 0;
}

/* ---- selections from the whole vocabulary --------------------------------------------------------------------------- */

static int32_t select_min_p(pl_sampling *s, const pl_logits *logits, double p, pl_error *err) {
    const float best = pl_best_logit(logits);
    return pl_above(logits, p > 0 ? (float)(best + log(p)) : -INFINITY, s->tokens, s->logits, err);
}

/* What min-p is going to drop next need not be selected. */
static int32_t select_top_p(pl_sampling *s, const pl_logits *logits, double p, pl_error *err) {
    const bool min_p_follows = s->n_steps > 1 && s->steps[1].kind == PL_KEEP_MIN_P;
    const double least = min_p_follows ? pl_best_logit(logits) + log(s->steps[1].value) : -INFINITY;
    return pl_nucleus(logits, p, nextafterf((float)least, -INFINITY), s->tokens, s->logits, err);
}

/* Mirostat (Basu et al. 2020, https://arxiv.org/abs/2007.14966) bounds the surprise of a token, in bits, by mu. Version
 * 1 takes the distribution for Zipf's, estimates its exponent from the 100 most likely tokens, and from that the number
 * k of tokens that keep to the bound: k = ((e 2^mu) / (1 - N^-e))^(1/s), e = s - 1, here in logarithms. */
static int32_t mirostat_k(const pl_sampling *s, int32_t n, double mu) {
    double products = 0, squares = 0;
    for (int32_t i = 0; i + 1 < n; i++) {
        const double t = log((i + 2.0) / (i + 1.0)), b = (s->logits[i] - s->logits[i + 1]) / s->temperature;
        products += t * b;
        squares += t * t;
    }
    if (n < 2) {
        return 1;
    }
    const double exponent = products / squares, e = exponent - 1, log_n = log(s->n_vocab);
    const double ratio = fabs(e) > 1e-9 ? -e / expm1(-e * log_n) : 1 / log_n; /* e / (1 - N^-e) */
    const double exponent_log_k = log(ratio) + mu * log(2.0);
    if (exponent_log_k <= 0) {
        return 1;
    }
    return exponent_log_k < exponent * log_n ? PL_MAX(1, (int32_t)exp(exponent_log_k / exponent)) : s->n_vocab;
}

static int32_t select_mirostat_1(pl_sampling *s, const pl_logits *logits, double mu, pl_error *err) {
    const int32_t n = pl_best(logits, 100, s->tokens, s->logits, err);
    return n > 0 ? pl_best(logits, mirostat_k(s, n, mu), s->tokens, s->logits, err) : n;
}

/* Version 2 leaves out every token that would surprise by more than mu. */
static int32_t select_mirostat_2(pl_sampling *s, const pl_logits *logits, double mu, pl_error *err) {
    const double log_total = pl_log_sum(logits, 1 / s->temperature);
    const double floor = s->temperature * (log_total - mu * log(2.0));
    const float best = pl_best_logit(logits);
    return pl_above(logits, floor < best ? (float)PL_MAX(floor, -FLT_MAX) : best, s->tokens, s->logits, err);
}

static int32_t select_candidates(pl_sampling *s, const pl_logits *logits, const pl_sampling_step *step, pl_error *err) {
    const bool top_k = step->kind == PL_SELECT_TOP_K;
    if (s->room < (top_k && step->value < s->n_vocab ? step->value : s->n_vocab)) {
        return pl_fail(err, "room for %d candidates is not enough", s->room);
    }
    switch (step->kind) {
    case PL_SELECT_TOP_K:
        return pl_best(logits, (int32_t)PL_MIN(step->value, s->n_vocab), s->tokens, s->logits, err);
    case PL_SELECT_TOP_P:
        return select_top_p(s, logits, step->value, err);
    case PL_SELECT_MIN_P:
        return select_min_p(s, logits, step->value, err);
    case PL_SELECT_MIROSTAT_1:
        return select_mirostat_1(s, logits, step->value, err);
    case PL_SELECT_MIROSTAT_2:
        return select_mirostat_2(s, logits, step->value, err);
    default:
        return pl_fail(err, "a sampling chain cannot begin with a step of kind %d", step->kind);
    }
}

/* ---- steps that thin out ------------------------------------------------------------------------------------------- */

/* Probabilities up to a common factor, the first being 1, into s->work; returns their sum. */
static double weigh(pl_sampling *s) {
    double sum = 0;
    for (int32_t i = 0; i < s->n_candidates; i++) {
        s->work[i] = exp(s->logits[i] - s->logits[0]);
        sum += s->work[i];
    }
    return sum;
}

/* Tail-free sampling (https://www.trentonbricken.com/Tail-Free-Sampling): cuts where the curve of the sorted
 * probabilities has flattened out, i.e. where its second differences up to there make up the share z of all. */
static void keep_tail_free(pl_sampling *s, double z) {
    const int32_t n = s->n_candidates - 2;
    const double sum = weigh(s);
    double total = 0, running = 0;
    for (int32_t i = 0; i < n; i++) {
        s->work[i] = fabs(s->work[i] - 2 * s->work[i + 1] + s->work[i + 2]) / sum;
        total += s->work[i];
    }
    for (int32_t i = 0; i < n; i++) {
        running += total > 1e-6 ? s->work[i] / total : 1.0 / n;
        if (running > z && i >= 1) {
            s->n_candidates = i;
            return;
        }
    }
}

/* Locally typical sampling (Meister et al. 2022, https://arxiv.org/abs/2202.00666): keeps the tokens whose surprise is
 * nearest to the expected one, until their probabilities sum to more than p. */
static int32_t keep_typical(pl_sampling *s, double p, pl_error *err) {
    const int32_t n = s->n_candidates;
    const double sum = weigh(s);
    double expected = 0, running = 0;
    for (int32_t i = 0; i < n; i++) {
        expected += s->work[i] > 0 ? s->work[i] / sum * (log(sum) - log(s->work[i])) : 0;
    }
    uint64_t *order = pl_alloc(2 * (size_t)n * sizeof *order, err); /* the most typical first */
    if (!order) {
        return -1;
    }
    for (int32_t i = 0; i < n; i++) {
        const double surprise = log(sum) - (s->logits[i] - s->logits[0]);
        order[i] = (uint64_t)~pl_ordered_bits((float)fabs(surprise - expected)) << 32 | (uint32_t)i;
    }
    pl_sort_descending(order, order + n, n, 32);
    for (int32_t i = 0; i < n; i++) {
        const int32_t candidate = (int32_t)(uint32_t)order[i];
        const bool kept = i == 0 || running <= p;
        running += s->work[candidate] / sum;
        s->work[candidate] = kept;
    }
    s->n_candidates = 0;
    for (int32_t i = 0; i < n; i++) {
        if (s->work[i] != 0) {
            s->tokens[s->n_candidates] = s->tokens[i];
            s->logits[s->n_candidates++] = s->logits[i];
        }
    }
    pl_free(order);
    return 0;
}

/* Nucleus sampling (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751): the most likely tokens whose probabilities
 * sum to p. */
static void keep_top_p(pl_sampling *s, double p) {
    const double wanted = p * weigh(s);
    double running = s->work[0];
    int32_t n = 1;
    while (n < s->n_candidates && running < wanted) {
        running += s->work[n++];
    }
    s->n_candidates = n;
}

/* The tokens at least p times as likely as the most likely one. */
static void keep_min_p(pl_sampling *s, double p) {
    const double floor = s->logits[0] + log(p);
    int32_t n = 1;
    while (n < s->n_candidates && s->logits[n] >= floor) {
        n++;
    }
    s->n_candidates = n;
}

/* Divides the logits, counted from the best one down: so no difference gets lost in large numbers. */
static void divide_by_temperature(pl_sampling *s) {
    const double best = s->logits[0];
    for (int32_t i = 0; i < s->n_candidates; i++) {
        s->logits[i] = (s->logits[i] - best) / s->temperature;
    }
}

static int32_t run_step(pl_sampling *s, const pl_sampling_step *step, pl_error *err) {
    switch (step->kind) {
    case PL_KEEP_TAIL_FREE:
        keep_tail_free(s, step->value);
        return 0;
    case PL_KEEP_TYPICAL:
        return keep_typical(s, step->value, err);
    case PL_KEEP_TOP_P:
        keep_top_p(s, step->value);
        return 0;
    case PL_KEEP_MIN_P:
        keep_min_p(s, step->value);
        return 0;
    case PL_TEMPERATURE:
        divide_by_temperature(s);
        return 0;
    default:
        return pl_fail(err, "a sampling chain cannot go on with a step of kind %d", step->kind);
    }
}

/* ---- the draw ------------------------------------------------------------------------------------------------------- */

static void draw(pl_sampling *s, double random) {
    const double total = weigh(s), wanted = random * total;
    double running = s->work[0];
    int32_t i = 0;
    while (i + 1 < s->n_candidates && running <= wanted) {
        running += s->work[++i];
    }
    s->chosen = i;
    s->log_total = s->logits[0] + log(total);
}

static int32_t choose(pl_sampling *s, const float *logits, const float *peaks, double random, pl_error *err) {
    if (s->n_vocab < 1 || s->n_steps < 1 || !(s->temperature > 0)) {
        return pl_fail(err, "sampling wants a vocabulary, steps and a temperature above 0");
    }
    const pl_logits l = {logits, s->n_vocab, peaks};
    s->n_candidates = select_candidates(s, &l, &s->steps[0], err);
    if (s->n_candidates <= 0) {
        return s->n_candidates;
    }
    for (int32_t i = 1; i < s->n_steps; i++) {
        if (run_step(s, &s->steps[i], err) != 0) {
            return -1;
        }
    }
    draw(s, random);
    return s->n_candidates;
}

PL_API int32_t pl_choose(pl_sampling *s, const float *logits, double random, pl_error *err) {
    return choose(s, logits, NULL, random, err);
}

PL_API int32_t pl_sample(pl_sampling *s, float *logits, float *peaks, double random, pl_error *err) {
    return adjust(s, logits, peaks, err) == 0 ? choose(s, logits, peaks, random, err) : -1;
}

PL_API void pl_accept(pl_sampling *s, int32_t token) {
    if (s->n_window > 0) {
        s->recent[s->oldest] = token;
        s->oldest = (s->oldest + 1) % s->n_window;
        s->n_recent = PL_MIN(s->n_recent + 1, s->n_window);
    }
    if (s->eta != 0) {
        const double surprise = (s->log_total - s->logits[s->chosen]) / log(2.0);
        s->steps[0].value -= s->eta * (surprise - s->tau);
    }
}

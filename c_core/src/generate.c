/* generate.c - several steps of generation in one call: runs of a program, and what sampling makes of their logits. */
#include "program.h"

static int32_t check_generation(const pl_program *p, const pl_batch *b, const pl_generation *g, pl_error *err) {
    if (g->n_steps < 1 || !b->logits || b->n_sequences < 1 || b->n_tokens != b->n_sequences || b->n_outputs != b->n_sequences) {
        return pl_fail(err, "a generation takes one or more steps, and sequences of one new token that want its logits");
    }
    for (int32_t i = 0; i < b->n_sequences; i++) {
        if (g->samplings[i]->n_vocab > p->n_vocab) {
            return pl_fail(err, "sampling wants a vocabulary of %d; the model has %d", g->samplings[i]->n_vocab, p->n_vocab);
        }
    }
    return 0;
}

static bool is_end(const pl_generation *g, int32_t token) {
    for (int32_t i = 0; i < g->n_ends; i++) {
        if (g->ends[i] == token) {
            return true;
        }
    }
    return token < 0;
}

/* Chooses each sequence's next token. 1: all go on, 0: not all, -1: failure. */
static int32_t choose_tokens(const pl_program *p, const pl_batch *b, const pl_generation *g, int32_t step, pl_error *err) {
    const int64_t n_peaks = (p->n_vocab + PL_PEAK_LOGITS - 1) / PL_PEAK_LOGITS;
    bool all_go_on = true;
    for (int32_t i = 0; i < b->n_sequences; i++) {
        pl_sampling *s = g->samplings[i];
        const int64_t at = (int64_t)step * b->n_sequences + i;
        float *peaks = b->peaks ? b->peaks + i * n_peaks : NULL;
        const int32_t n = pl_sample(s, b->logits + (int64_t)i * p->n_vocab, peaks, g->randoms[at], err);
        if (n < 0) {
            return -1;
        }
        g->tokens[at] = n == 0 ? -1 : s->tokens[s->chosen];
        if (n > 0) {
            pl_accept(s, g->tokens[at]);
        }
        all_go_on = all_go_on && !is_end(g, g->tokens[at]);
    }
    return all_go_on;
}

PL_API int32_t pl_generate(pl_program *p, int32_t n_threads, const pl_batch *batch, const pl_generation *g, pl_error *err) {
    if (check_generation(p, batch, g, err) < 0) {
        return -1;
    }
    pl_batch b = *batch;
    b.sequences = g->sequences;
    for (int32_t step = 0;; step++) {
        if (pl_run(p, n_threads, &b, err) < 0) {
            return -1;
        }
        const int32_t all_go_on = choose_tokens(p, &b, g, step, err);
        if (all_go_on < 0) {
            return -1;
        }
        if (!all_go_on || step + 1 == g->n_steps) {
            return step + 1;
        }
        b.tokens = g->tokens + (int64_t)step * b.n_sequences;
        for (int32_t i = 0; i < b.n_sequences; i++) {
            g->sequences[i].n_past++;
        }
    }
}

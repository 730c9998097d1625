/*
 * pool.h - a persistent team of threads that run one function together.
 *
 * The caller is member 0. Members meet at barriers. Who waits, there or for the next run, spins for a while (steps follow each
 * other within microseconds), then sleeps.
 */
#ifndef PL_POOL_H
#define PL_POOL_H

#include "common.h"

#include <stdatomic.h>

/* Up to two stretches of memory that a member reads soon: while it waits, it asks for them. */
typedef struct pl_ahead {
    const uint8_t *at[2], *end[2];
} pl_ahead;

/* One member's view of a running team. */
typedef struct pl_member {
    int32_t index; /* 0 .. count - 1 */
    int32_t count;
    pl_pool *pool;
    pl_ahead *ahead; /* or NULL */
} pl_member;

typedef void (*pl_team_function)(void *context, const pl_member *member);

/* Threads of a pool; 1 for NULL. */
int32_t pl_pool_size(const pl_pool *pool);

/* Runs `function` on `n_threads` members (0: all) and returns when every one has returned. `pool` may be NULL: one member. */
void pl_pool_run(pl_pool *pool, int32_t n_threads, pl_team_function function, void *context);

/* Waits until every member of the running team is here; memory written before is visible after. */
void pl_barrier(const pl_member *member);

/* Asks for some more of what a member reads soon; whether there was any left. */
static inline bool pl_fetch_ahead(const pl_member *member, int32_t lines) {
    enum { LINE = 64 };
    pl_ahead *a = member->ahead;
    bool any = false;
    for (int i = 0; a && i < 2; i++) {
        for (int32_t n = 0; n < lines && a->at[i] < a->end[i]; n++, a->at[i] += LINE) {
            __builtin_prefetch(a->at[i]);
            any = true;
        }
    }
    return any;
}

/* The next unclaimed number from a shared counter: dynamic work sharing. */
static inline int32_t pl_claim(atomic_int *counter) { return atomic_fetch_add_explicit(counter, 1, memory_order_relaxed); }

#endif

/*
 * pool.h - a persistent team of threads that run one function together.
 *
 * The caller is member 0. Members meet at barriers; a short spin comes first (steps follow each other within
 * microseconds), then the waiter yields, and between runs it sleeps.
 */
#ifndef PL_POOL_H
#define PL_POOL_H

#include "common.h"

#include <stdatomic.h>

/* One member's view of a running team. */
typedef struct pl_member {
    int32_t index; /* 0 .. count - 1 */
    int32_t count;
    pl_pool *pool;
} pl_member;

typedef void (*pl_team_function)(void *context, const pl_member *member);

/* Threads of a pool; 1 for NULL. */
int32_t pl_pool_size(const pl_pool *pool);

/* Runs `function` on `n_threads` members (0: all) and returns when every one has returned. `pool` may be NULL: one member. */
void pl_pool_run(pl_pool *pool, int32_t n_threads, pl_team_function function, void *context);

/* Waits until every member of the running team is here; memory written before is visible after. */
void pl_barrier(const pl_member *member);

/* The next unclaimed number from a shared counter: dynamic work sharing. */
static inline int32_t pl_claim(atomic_int *counter) { return atomic_fetch_add_explicit(counter, 1, memory_order_relaxed); }

#endif

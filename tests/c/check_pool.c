/* check_pool.c - the thread pool: every member takes part in every run it is in, and barriers hold, asleep or not. */
#include "pool.h"

#include "compare.h"

#include <time.h>

enum { MOST = 7, BARRIERS = 5 };

typedef struct run {
    int32_t number, count;
    int32_t written[MOST]; /* plain memory: a barrier has to make it visible */
    atomic_int wrong, members;
} run;

static void nap(int64_t us) {
    nanosleep(&(struct timespec){.tv_nsec = us * 1000}, NULL);
}

static void meet(void *context, const pl_member *member) {
    run *r = context;
    atomic_fetch_add(&r->members, 1);
    atomic_fetch_add(&r->wrong, member->count != r->count);
    for (int32_t i = 0; i < BARRIERS; i++) {
        r->written[member->index] = r->number + i;
        if (r->number % 20 == 0 && member->index == r->number / 20 % r->count) {
            nap(200); /* the others fall asleep */
        }
        pl_barrier(member);
        for (int32_t m = 0; m < member->count; m++) {
            atomic_fetch_add(&r->wrong, r->written[m] != r->number + i);
        }
        pl_barrier(member);
    }
}

void check_pool(void) {
    for (int32_t size = 1; size <= MOST; size += 3) {
        pl_error err;
        pl_pool *pool = pl_pool_new(size, &err);
        for (int32_t i = 0; i < 200; i++) {
            run r = {.number = i, .count = 1 + (int32_t)(random_bits() % (uint32_t)size)};
            pl_pool_run(pool, r.count, meet, &r);
            if (atomic_load(&r.wrong) || atomic_load(&r.members) != r.count) {
                differ("pool", "run", size, r.count);
            }
            if (i % 50 == 0) {
                nap(1000); /* all workers fall asleep */
            }
        }
        pl_pool_free(pool);
    }
}

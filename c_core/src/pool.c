/* pool.c - the thread pool: see pool.h. */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define pl_relax() _mm_pause()
#elif defined(__aarch64__)
#define pl_relax() __asm__ volatile("yield")
#else
#define pl_relax() ((void)0)
#endif

enum {
    SPINS_BEFORE_YIELD = 4000, /* at a barrier: some tens of microseconds, then give the core to whoever needs it */
    SPINS_BEFORE_SLEEP = 2000, /* between runs */
    LINES_AT_ONCE = 4,         /* that are asked for between two looks at a barrier */
};

struct pl_pool {
    int32_t n_threads;
    pthread_t *threads; /* n_threads - 1 of them */
    pthread_mutex_t mutex;
    pthread_cond_t wake;

    /* The run in progress; written by the caller before it publishes a new `generation`. */
    pl_team_function function;
    void *context;
    int32_t count;
    bool stop;
    _Alignas(64) atomic_uint generation;
    _Alignas(64) atomic_int sleepers;
    _Alignas(64) atomic_int finished; /* workers that have returned from the run */
    _Alignas(64) atomic_int arrived;  /* at the current barrier */
    _Alignas(64) atomic_uint barrier_turn;
};

typedef struct worker_start {
    pl_pool *pool;
    int32_t index;
} worker_start;

static void pause_or_yield(int spins) {
    if (spins < SPINS_BEFORE_YIELD) {
        pl_relax();
    } else {
        sched_yield();
    }
}

void pl_barrier(const pl_member *member) {
    if (member->count == 1) {
        return;
    }
    pl_pool *pool = member->pool;
    unsigned turn = atomic_load_explicit(&pool->barrier_turn, memory_order_acquire);
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) == member->count - 1) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->barrier_turn, turn + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&pool->barrier_turn, memory_order_acquire) == turn; spins++) {
        if (!pl_fetch_ahead(member, LINES_AT_ONCE)) {
            pause_or_yield(spins);
        }
    }
}

/* Waits for a generation other than `seen`. */
static unsigned wait_for_work(pl_pool *pool, unsigned seen) {
    unsigned now;
    for (int spins = 0; spins < SPINS_BEFORE_SLEEP; spins++) {
        now = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (now != seen) {
            return now;
        }
        pl_relax();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while ((now = atomic_load(&pool->generation)) == seen) {
        pthread_cond_wait(&pool->wake, &pool->mutex);
    }
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
    return now;
}

static void *worker(void *argument) {
    worker_start start = *(worker_start *)argument;
    free(argument);
    pl_pool *pool = start.pool;
    unsigned seen = 0;
    for (;;) {
        seen = wait_for_work(pool, seen);
        if (pool->stop) {
            return NULL;
        }
        pl_member member = {start.index, pool->count, pool, NULL};
        if (member.index < member.count) {
            pool->function(pool->context, &member);
        }
        /* Every worker, also one with nothing to do, reports: the next run may not change the fields under its eyes. */
        atomic_fetch_add_explicit(&pool->finished, 1, memory_order_release);
    }
}

static void publish(pl_pool *pool) {
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

int32_t pl_pool_size(const pl_pool *pool) { return pool ? pool->n_threads : 1; }

void pl_pool_run(pl_pool *pool, int32_t n_threads, pl_team_function function, void *context) {
    if (!pool || pool->n_threads == 1) {
        pl_member alone = {0, 1, pool, NULL};
        function(context, &alone);
        return;
    }
    pool->function = function;
    pool->context = context;
    pool->count = n_threads <= 0 ? pool->n_threads : PL_MIN(n_threads, pool->n_threads);
    publish(pool);
    pl_member member = {0, pool->count, pool, NULL};
    function(context, &member);
    for (int spins = 0; atomic_load_explicit(&pool->finished, memory_order_acquire) < pool->n_threads - 1; spins++) {
        pause_or_yield(spins);
    }
    atomic_store_explicit(&pool->finished, 0, memory_order_relaxed);
}

PL_API pl_pool *pl_pool_new(int32_t n_threads, pl_error *err) {
    if (n_threads < 1 || n_threads > 1024) {
        pl_fail(err, "a thread pool of %d threads was asked for; 1 to 1024 are possible", n_threads);
        return NULL;
    }
    pl_pool *pool = pl_alloc(sizeof *pool, err);
    if (!pool) {
        return NULL;
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = pl_alloc(sizeof(pthread_t) * (size_t)n_threads, err);
    if (!pool->threads) {
        pl_pool_free(pool);
        return NULL;
    }
    pool->n_threads = 1;
    for (int32_t i = 1; i < n_threads; i++) {
        worker_start *start = malloc(sizeof *start);
        if (start) {
            *start = (worker_start){pool, i};
        }
        if (!start || pthread_create(&pool->threads[i - 1], NULL, worker, start) != 0) {
            free(start);
            pl_fail(err, "thread %d of %d could not be started", i + 1, n_threads);
            pl_pool_free(pool);
            return NULL;
        }
        pool->n_threads = i + 1;
    }
    return pool;
}

PL_API void pl_pool_free(pl_pool *pool) {
    if (!pool) {
        return;
    }
    pool->stop = true;
    publish(pool);
    for (int32_t i = 0; i < pool->n_threads - 1; i++) {
        pthread_join(pool->threads[i], NULL);
    }
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    pl_free(pool->threads);
    pl_free(pool);
}

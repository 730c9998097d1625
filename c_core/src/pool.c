/* pool.c - the thread pool: see pool.h. */
#define _GNU_SOURCE /* sched_getcpu */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define pl_relax() _mm_pause()
#elif defined(__aarch64__)
#define pl_relax() __asm__ volatile("yield")
#else
#define pl_relax() ((void)0)
#endif

/*
 * A thread that waits spins before it sleeps, since to be woken takes some twenty microseconds. Between runs it spins for as
 * long as lies between two steps of a model; at barriers so long only as the others may be late while they have a core.
 */
enum {
    SPIN_US_AT_BARRIERS = 50,
    SPIN_US_BETWEEN_RUNS = 300,
    MOST_THREADS = 1024,
    RUN = 2 * MOST_THREADS, /* what each run adds to `work` */
    LINES_AT_ONCE = 4,      /* that are asked for between two looks at what is waited for */
};

/* Where a thread waits. */
typedef struct seat {
    _Alignas(64) atomic_bool taken; /* by a sleeper */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    _Alignas(64) atomic_int cpu; /* where the thread was when it last waited */
} seat;

struct pl_pool {
    int32_t n_threads;
    pthread_t *threads; /* n_threads - 1 of them */
    seat *seats;        /* of all threads */
    int32_t n_seats;

    /* The run in progress; written by the caller before it publishes new `work`. */
    pl_team_function function;
    void *context;
    bool stop;
    _Alignas(64) atomic_ullong work;  /* number of the run * RUN + how many take part */
    _Alignas(64) atomic_int sleepers; /* seats that are taken */
    _Alignas(64) atomic_int arrived;  /* at the current barrier */
    _Alignas(64) atomic_ullong barrier_turn;
    _Alignas(64) atomic_int finished; /* workers that have returned from the run */
    _Alignas(64) atomic_ullong finished_runs;
};

typedef struct worker_start {
    pl_pool *pool;
    int32_t index;
} worker_start;

/* ---- waiting ------------------------------------------------------------------------------------------------------- */

static int64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int32_t current_cpu(void) {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

static void note_cpu(seat *s) {
    const int32_t cpu = current_cpu();
    if (atomic_load_explicit(&s->cpu, memory_order_relaxed) != cpu) {
        atomic_store_explicit(&s->cpu, cpu, memory_order_relaxed);
    }
}

/* Whether another thread of the pool is likely to wait for this one's core. */
static bool shares_cpu(const pl_member *member) {
    const int32_t cpu = current_cpu();
    bool shares = false;
    for (int32_t i = 0; cpu >= 0 && i < member->count && !shares; i++) {
        shares = i != member->index && atomic_load_explicit(&member->pool->seats[i].cpu, memory_order_relaxed) == cpu;
    }
    return shares;
}

/* Whether `word` changed from `seen` within some microseconds. */
static bool spin(const atomic_ullong *word, unsigned long long seen, const pl_member *member, int64_t us) {
    enum { LOOKS = 64 };
    int64_t end = 0;
    do {
        for (int i = 0; i < LOOKS; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != seen) {
                return true;
            }
            if (!pl_fetch_ahead(member, LINES_AT_ONCE)) {
                pl_relax();
            }
        }
        if (shares_cpu(member)) {
            sched_yield(); /* not sleep: of two that can run, a core with nothing to do will take one */
        }
        end = end ? end : now_us() + us;
    } while (now_us() < end);
    return false;
}

/* Either the sleeper sees the new word or the one who changed it sees the seat taken: all four accesses are in one order. */
static void sleep_while(pl_pool *pool, const atomic_ullong *word, unsigned long long seen, seat *s) {
    pthread_mutex_lock(&s->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    atomic_store(&s->taken, true);
    while (atomic_load(word) == seen) {
        pthread_cond_wait(&s->wake, &s->mutex);
    }
    atomic_store(&s->taken, false);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&s->mutex);
}

static void wait_while(const atomic_ullong *word, unsigned long long seen, const pl_member *member, int64_t spin_us) {
    if (!spin(word, seen, member, spin_us)) {
        sleep_while(member->pool, word, seen, &member->pool->seats[member->index]);
    }
}

/* Sets a word that members first .. count - 1 may wait for. */
static void announce(pl_pool *pool, atomic_ullong *word, unsigned long long value, int32_t first, int32_t count) {
    atomic_store(word, value);
    if (atomic_load(&pool->sleepers) == 0) {
        return;
    }
    for (int32_t i = first; i < count; i++) {
        seat *s = &pool->seats[i];
        if (atomic_load(&s->taken)) {
            pthread_mutex_lock(&s->mutex);
            pthread_cond_signal(&s->wake);
            pthread_mutex_unlock(&s->mutex);
        }
    }
}

void pl_barrier(const pl_member *member) {
    if (member->count == 1) {
        return;
    }
    pl_pool *pool = member->pool;
    const unsigned long long turn = atomic_load_explicit(&pool->barrier_turn, memory_order_acquire);
    note_cpu(&pool->seats[member->index]);
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) == member->count - 1) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
        announce(pool, &pool->barrier_turn, turn + 1, 0, member->count);
    } else {
        wait_while(&pool->barrier_turn, turn, member, SPIN_US_AT_BARRIERS);
    }
}

/* ---- runs ---------------------------------------------------------------------------------------------------------- */

/* How many members the run has in which this worker takes part, once there is one. */
static int32_t wait_for_work(pl_pool *pool, int32_t index, unsigned long long *seen) {
    const pl_member waiting = {.index = index, .count = pool->n_seats, .pool = pool};
    seat *s = &pool->seats[index];
    note_cpu(s);
    wait_while(&pool->work, *seen, &waiting, SPIN_US_BETWEEN_RUNS);
    for (;;) {
        *seen = atomic_load_explicit(&pool->work, memory_order_acquire);
        if (index < (int32_t)(*seen % RUN)) {
            return (int32_t)(*seen % RUN);
        }
        sleep_while(pool, &pool->work, *seen, s); /* this run was for fewer */
    }
}

static void *worker(void *argument) {
    worker_start start = *(worker_start *)argument;
    free(argument);
    pl_pool *pool = start.pool;
    unsigned long long seen = 0;
    for (;;) {
        const pl_member member = {.index = start.index, .count = wait_for_work(pool, start.index, &seen), .pool = pool};
        if (pool->stop) {
            return NULL;
        }
        pool->function(pool->context, &member);
        if (atomic_fetch_add_explicit(&pool->finished, 1, memory_order_acq_rel) == member.count - 2) {
            atomic_store_explicit(&pool->finished, 0, memory_order_relaxed);
            announce(pool, &pool->finished_runs, atomic_load(&pool->finished_runs) + 1, 0, 1);
        }
    }
}

static void publish(pl_pool *pool, int32_t count) {
    const unsigned long long runs = atomic_load_explicit(&pool->work, memory_order_relaxed) / RUN + 1;
    announce(pool, &pool->work, runs * RUN + (unsigned long long)count, 1, count);
}

int32_t pl_pool_size(const pl_pool *pool) { return pool ? pool->n_threads : 1; }

void pl_pool_run(pl_pool *pool, int32_t n_threads, pl_team_function function, void *context) {
    const int32_t size = pl_pool_size(pool);
    const pl_member member = {.count = n_threads <= 0 ? size : PL_MIN(n_threads, size), .pool = pool};
    if (member.count == 1) {
        function(context, &member);
        return;
    }
    const unsigned long long finished = atomic_load_explicit(&pool->finished_runs, memory_order_relaxed);
    pool->function = function;
    pool->context = context;
    publish(pool, member.count);
    function(context, &member);
    note_cpu(&pool->seats[0]);
    wait_while(&pool->finished_runs, finished, &member, SPIN_US_AT_BARRIERS);
}

/* ---- life ---------------------------------------------------------------------------------------------------------- */

static bool make_seats(pl_pool *pool, int32_t n, pl_error *err) {
    pool->seats = pl_alloc(sizeof *pool->seats * (size_t)n, err);
    for (; pool->seats && pool->n_seats < n; pool->n_seats++) {
        pthread_mutex_init(&pool->seats[pool->n_seats].mutex, NULL);
        pthread_cond_init(&pool->seats[pool->n_seats].wake, NULL);
        atomic_store(&pool->seats[pool->n_seats].cpu, -1);
    }
    return pool->seats;
}

PL_API pl_pool *pl_pool_new(int32_t n_threads, pl_error *err) {
    if (n_threads < 1 || n_threads > MOST_THREADS) {
        pl_fail(err, "a thread pool of %d threads was asked for; 1 to %d are possible", n_threads, MOST_THREADS);
        return NULL;
    }
    pl_pool *pool = pl_alloc(sizeof *pool, err);
    if (!pool) {
        return NULL;
    }
    pool->n_threads = 1;
    pool->threads = pl_alloc(sizeof(pthread_t) * (size_t)n_threads, err);
    if (!pool->threads || !make_seats(pool, n_threads, err)) {
        pl_pool_free(pool);
        return NULL;
    }
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
    publish(pool, pool->n_threads);
    for (int32_t i = 0; i < pool->n_threads - 1; i++) {
        pthread_join(pool->threads[i], NULL);
    }
    for (int32_t i = 0; i < pool->n_seats; i++) {
        pthread_cond_destroy(&pool->seats[i].wake);
        pthread_mutex_destroy(&pool->seats[i].mutex);
    }
    pl_free(pool->seats);
    pl_free(pool->threads);
    pl_free(pool);
}

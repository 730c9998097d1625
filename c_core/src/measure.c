/*
 * measure.c - the machine's own limits, measured with the threads and the instructions that products use: how fast memory is
 * read, which bounds generation, and how fast int8 numbers are multiplied and added, which bounds prompts.
 */
#include "cpu/kernels.h"
#include "pool.h"

#include <sys/mman.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct pass {
    const pl_kernels *kernels;
    uint8_t *data;    /* what is read */
    int64_t n_pieces; /* pieces of PIECE bytes of it */
    int64_t rounds;   /* of products, for each member */
    atomic_int next;  /* piece */
    atomic_int sink;
} pass;

enum { PIECE = 1 << 20 };

static void fill(void *context, const pl_member *member) {
    pass *p = context;
    for (int64_t i = member->index; i < p->n_pieces; i += member->count) {
        memset(p->data + i * PIECE, (int)(i & 0x7f) + 1, PIECE);
    }
}

static void read_pieces(void *context, const pl_member *member) {
    (void)member;
    pass *p = context;
    int32_t all = 0;
    for (int64_t i; (i = pl_claim(&p->next)) < p->n_pieces;) {
        all ^= p->kernels->read(p->data + i * PIECE, PIECE);
    }
    atomic_fetch_add_explicit(&p->sink, all, memory_order_relaxed);
}

static void multiply_add(void *context, const pl_member *member) {
    (void)member;
    pass *p = context;
    atomic_fetch_add_explicit(&p->sink, p->kernels->multiply_add(p->rounds), memory_order_relaxed);
}

/* Seconds that one pass of a function takes. */
static double timed(pl_pool *pool, int32_t n_threads, pl_team_function function, pass *p) {
    atomic_store(&p->next, 0);
    const double begin = now();
    pl_pool_run(pool, n_threads, function, p);
    return now() - begin;
}

static double shortest(pl_pool *pool, int32_t n_threads, pl_team_function function, pass *p, double seconds) {
    const double end = now() + seconds;
    double best = timed(pool, n_threads, function, p);
    while (now() < end) {
        const double t = timed(pool, n_threads, function, p);
        best = PL_MIN(best, t);
    }
    return best;
}

static int32_t check_seconds(double seconds, pl_error *err) {
    return seconds >= 0 && seconds <= 3600 ? 0 : pl_fail(err, "a measurement of %g seconds was asked for", seconds);
}

PL_API int32_t pl_measure_read_bandwidth(pl_pool *pool, int32_t n_threads, int64_t bytes, double seconds, double *rate,
                                         pl_error *err) {
    if (check_seconds(seconds, err) < 0) {
        return -1;
    }
    if (bytes < PIECE || bytes / PIECE > 1 << 20) {
        return pl_fail(err, "%lld bytes are not a size to measure with", (long long)bytes);
    }
    const pl_cpu_set *cpu = pl_cpu_wanted(err);
    if (!cpu) {
        return -1;
    }
    pass p = {.kernels = cpu->kernels, .n_pieces = bytes / PIECE};
    const size_t size = (size_t)p.n_pieces * PIECE;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return pl_fail(err, "out of memory: %zu bytes to be read were asked for", size);
    }
    p.data = memory;
#ifdef MADV_HUGEPAGE
    madvise(memory, size, MADV_HUGEPAGE); /* as the weights have it */
#endif
    pl_pool_run(pool, n_threads, fill, &p);
    *rate = 1e-9 * (double)size / shortest(pool, n_threads, read_pieces, &p, seconds);
    munmap(memory, size);
    return 0;
}

PL_API int32_t pl_measure_int8_rate(pl_pool *pool, int32_t n_threads, double seconds, double *rate, pl_error *err) {
    if (check_seconds(seconds, err) < 0) {
        return -1;
    }
    enum { LONG_ENOUGH_MS = 5 };
    const pl_cpu_set *cpu = pl_cpu_wanted(err);
    if (!cpu) {
        return -1;
    }
    pass p = {.kernels = cpu->kernels, .rounds = 1};
    while (timed(pool, n_threads, multiply_add, &p) < 1e-3 * LONG_ENOUGH_MS) {
        p.rounds *= 2;
    }
    const int32_t members = n_threads <= 0 ? pl_pool_size(pool) : PL_MIN(n_threads, pl_pool_size(pool));
    const double operations = 2.0 * PL_ROUND_PRODUCTS * (double)p.rounds * members;
    *rate = 1e-9 * operations / shortest(pool, n_threads, multiply_add, &p, seconds);
    return 0;
}

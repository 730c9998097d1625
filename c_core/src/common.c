/* common.c - error messages and aligned memory. */
#include "common.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

int32_t pl_fail(pl_error *err, const char *format, ...) {
    if (err) {
        va_list args;
        va_start(args, format);
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return -1;
}

void *pl_alloc(size_t bytes, pl_error *err) {
    enum { HUGE_PAGE = 2 << 20 };
    void *p = NULL;
    const size_t rounded = (bytes + 63) & ~(size_t)63;
    if (rounded < bytes || posix_memalign(&p, rounded < HUGE_PAGE ? 64 : HUGE_PAGE, rounded ? rounded : 64) != 0) {
        pl_fail(err, "out of memory: %zu bytes were asked for", bytes);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (rounded >= HUGE_PAGE) {
        madvise(p, rounded, MADV_HUGEPAGE); /* a hint: fewer page walks, and prefetchers stop at the end of a page */
    }
#endif
    memset(p, 0, rounded);
    return p;
}

void pl_free(void *p) { free(p); }

/* common.c - error messages and aligned memory. */
#include "common.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

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
    void *p = NULL;
    size_t rounded = (bytes + 63) & ~(size_t)63;
    if (rounded < bytes || posix_memalign(&p, 64, rounded ? rounded : 64) != 0) {
        pl_fail(err, "out of memory: %zu bytes were asked for", bytes);
        return NULL;
    }
    memset(p, 0, rounded);
    return p;
}

void pl_free(void *p) { free(p); }

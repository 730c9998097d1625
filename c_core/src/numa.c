/* numa.c - where memory goes on machines with several nodes, each of which has memory of its own. */
#include "common.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#if defined(SYS_set_mempolicy)

enum {
    INTERLEAVE = 3, /* the kernel's MPOL_INTERLEAVE */
    MOST_NODES = 1024,
    WORD_BITS = 8 * sizeof(unsigned long),
};

PL_API int32_t pl_interleave_memory(const int32_t *nodes, int32_t n_nodes, pl_error *err) {
    unsigned long mask[MOST_NODES / WORD_BITS] = {0};
    for (int32_t i = 0; i < n_nodes; i++) {
        if (nodes[i] < 0 || nodes[i] >= MOST_NODES) {
            return pl_fail(err, "memory node %d is out of range", nodes[i]);
        }
        mask[nodes[i] / WORD_BITS] |= 1ul << nodes[i] % WORD_BITS;
    }
    /* The kernel takes the number of bits plus one. */
    if (syscall(SYS_set_mempolicy, INTERLEAVE, mask, (unsigned long)MOST_NODES + 1) != 0) {
        return pl_fail(err, "memory cannot be spread over the nodes: %s", strerror(errno));
    }
    return 0;
}

#else

PL_API int32_t pl_interleave_memory(const int32_t *nodes, int32_t n_nodes, pl_error *err) {
    (void)nodes, (void)n_nodes;
    return pl_fail(err, "memory cannot be spread over the nodes of this kind of system");
}

#endif

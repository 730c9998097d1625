/* kernels_neon_i8mm.c - the same with products of small matrices. */
#if defined(__aarch64__)
#define I8MM 1
#define TABLE pl_kernels_neon_i8mm
#include "kernels_neon.h"
#endif

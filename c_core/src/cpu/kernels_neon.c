/* kernels_neon.c - Advanced SIMD with dot products. */
#if defined(__aarch64__)
#define I8MM 0
#define TABLE pl_kernels_neon
#include "kernels_neon.h"
#endif

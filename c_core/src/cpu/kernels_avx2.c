/* kernels_avx2.c - AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#define VNNI 0
#define TABLE pl_kernels_avx2
#include "kernels_avx2.h"
#endif

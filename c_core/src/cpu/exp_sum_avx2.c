/* exp_sum_avx2.c - the sum of a softmax with 256-bit registers. */
#if defined(__x86_64__)
#define EXP_SUM pl_exp_sum_avx2
#define LANES 8
#include "exp_sum.h"
#endif

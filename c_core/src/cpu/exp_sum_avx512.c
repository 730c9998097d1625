/* exp_sum_avx512.c - the sum of a softmax with 512-bit registers. */
#if defined(__x86_64__)
#define EXP_SUM pl_exp_sum_avx512
#define LANES 16
#include "exp_sum.h"
#endif

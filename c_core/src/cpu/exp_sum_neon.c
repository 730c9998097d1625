/* exp_sum_neon.c - the sum of a softmax with Arm's vectors. */
#if defined(__aarch64__)
#define EXP_SUM pl_exp_sum_neon
#define LANES 4
#include "exp_sum.h"
#endif

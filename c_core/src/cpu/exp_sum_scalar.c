/* exp_sum_scalar.c - the sum of a softmax on any processor. */
#define EXP_SUM pl_exp_sum_scalar
#define LANES 4
#include "exp_sum.h"

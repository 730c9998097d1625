/* compare.h - what the comparisons share. */
#ifndef COMPARE_H
#define COMPARE_H

#include "cpu/kernels.h"

/* Prints a difference and counts it. */
void differ(const char *set, const char *what, int32_t a, int32_t b);
uint32_t random_bits(void);
float random_float(void); /* in [-1, 1) */
bool close_to(const float *a, const float *b, int32_t n, float tolerance);

void compare_attention(const pl_cpu_set *set);
void check_kv(void);
void check_pool(void);
void check_program(void);

#endif

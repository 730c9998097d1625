/* dispatch.c - which kernels this processor gets. */
#include "kernels.h"

#include <stdlib.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

static bool runs_anywhere(void) { return true; }

#if defined(__x86_64__)
static bool runs_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#ifdef PL_AVX_VNNI
static bool runs_avx_vnni(void) { /* compilers have a name for it from later versions on than flags */
    unsigned a, b, c, d;
    return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4) != 0;
}
#endif
static bool runs_avx512(void) {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
static bool runs_avx512_bf16(void) { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
static bool runs_neon(void) { return (getauxval(AT_HWCAP) & (1 << 20)) != 0; /* HWCAP_ASIMDDP: dot products */ }
static bool runs_neon_i8mm(void) { return runs_neon() && (getauxval(AT_HWCAP2) & (1 << 13)) != 0; /* HWCAP2_I8MM */ }
#elif defined(__aarch64__)
#include <sys/sysctl.h>
static bool runs_neon(void) { return true; /* every Apple processor of this architecture has them */ }
static bool runs_neon_i8mm(void) {
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, NULL, 0) == 0 && has;
}
#endif

typedef struct candidate {
    bool (*runs)(void);
    pl_cpu_set set;
} candidate;

/* Best first. */
static const candidate candidates[] = {
#if defined(__x86_64__)
    {runs_avx512_bf16, {"avx512_bf16", &pl_kernels_avx512, &pl_attention_avx512_bf16, pl_exp_sum_avx512}},
    {runs_avx512, {"avx512", &pl_kernels_avx512, &pl_attention_avx512, pl_exp_sum_avx512}},
#ifdef PL_AVX_VNNI
    {runs_avx_vnni, {"avx_vnni", &pl_kernels_avx_vnni, &pl_attention_avx_vnni, pl_exp_sum_avx2}},
#endif
    {runs_avx2, {"avx2", &pl_kernels_avx2, &pl_attention_avx2, pl_exp_sum_avx2}},
#elif defined(__aarch64__)
    {runs_neon_i8mm, {"neon_i8mm", &pl_kernels_neon_i8mm, &pl_attention_neon_i8mm, pl_exp_sum_neon}},
    {runs_neon, {"neon", &pl_kernels_neon, &pl_attention_neon, pl_exp_sum_neon}},
#endif
    {runs_anywhere, {"scalar", &pl_kernels_scalar, &pl_attention_scalar, pl_exp_sum_scalar}},
};

const pl_cpu_set *pl_cpu(void) {
    const char *wanted = getenv("PYLLAMA_CPU");
    const pl_cpu_set *best = NULL;
    for (size_t i = 0; i < sizeof candidates / sizeof *candidates; i++) {
        if (!candidates[i].runs()) {
            continue;
        }
        if (wanted && strcmp(wanted, candidates[i].set.name) == 0) {
            return &candidates[i].set;
        }
        if (!best) {
            best = &candidates[i].set;
        }
    }
    return best;
}

PL_API const char *pl_cpu_name(void) { return pl_cpu()->name; }

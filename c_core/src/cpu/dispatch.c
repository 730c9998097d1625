/* dispatch.c - which kernels this processor gets. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#if defined(PL_AVX_VNNI) && !defined(PL_AVX_VNNI_HAS_NAME)
#include <cpuid.h>
#endif

static bool runs_anywhere(void) { return true; }

#if defined(__x86_64__)
static bool runs_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#ifdef PL_AVX_VNNI
static bool runs_avx_vnni(void) {
#ifdef PL_AVX_VNNI_HAS_NAME /* noted at the start of the process: in a virtual machine CPUID takes 8 us or more */
    return runs_avx2() && __builtin_cpu_supports("avxvnni");
#else
    unsigned a, b, c, d;
    return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 4) != 0;
#endif
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
    {runs_avx512_bf16, {"avx512_bf16", &pl_kernels_avx512, &pl_attention_avx512_bf16, pl_exp_sum_avx512, pl_relay_avx512}},
    {runs_avx512, {"avx512", &pl_kernels_avx512, &pl_attention_avx512, pl_exp_sum_avx512, pl_relay_avx512}},
#ifdef PL_AVX_VNNI
    {runs_avx_vnni, {"avx_vnni", &pl_kernels_avx_vnni, &pl_attention_avx_vnni, pl_exp_sum_avx2, pl_relay_avx2}},
#endif
    {runs_avx2, {"avx2", &pl_kernels_avx2, &pl_attention_avx2, pl_exp_sum_avx2, pl_relay_avx2}},
#elif defined(__aarch64__)
    {runs_neon_i8mm, {"neon_i8mm", &pl_kernels_neon_i8mm, &pl_attention_neon_i8mm, pl_exp_sum_neon, pl_relay_scalar}},
    {runs_neon, {"neon", &pl_kernels_neon, &pl_attention_neon, pl_exp_sum_neon, pl_relay_scalar}},
#endif
    {runs_anywhere, {"scalar", &pl_kernels_scalar, &pl_attention_scalar, pl_exp_sum_scalar, pl_relay_scalar}},
};

enum { N_CANDIDATES = sizeof candidates / sizeof *candidates };

/* All there are, of whatever processor. */
static const char *const names[] = {"scalar", "avx2", "avx_vnni", "avx512", "avx512_bf16", "neon", "neon_i8mm"};

enum { N_NAMES = sizeof names / sizeof *names };

/* The set of this name, or the best one (NULL); NULL if the processor does not run it. */
static const pl_cpu_set *set_of(const char *name) {
    for (int32_t i = 0; i < N_CANDIDATES; i++) {
        if ((!name || strcmp(name, candidates[i].set.name) == 0) && candidates[i].runs()) {
            return &candidates[i].set;
        }
    }
    return NULL;
}

/* NULL: any. */
static const char *wanted_name(void) {
    const char *name = getenv("PYLLAMA_CPU");
    return name && *name ? name : NULL;
}

static void append_name(char *list, size_t size, const char *name) {
    const size_t n = strlen(list);
    snprintf(list + n, size - n, "%s%s", n ? ", " : "", name);
}

static void refuse(const char *wanted, pl_error *err) {
    char running[96] = "", others[96] = "";
    bool exists = false;
    for (int32_t i = 0; i < N_NAMES; i++) {
        append_name(set_of(names[i]) ? running : others, sizeof running, names[i]);
        exists |= strcmp(wanted, names[i]) == 0;
    }
    pl_fail(err, "PYLLAMA_CPU is '%.40s', but %s: this processor runs %s, and not %s", wanted,
            exists ? "these kernels do not run here" : "there are no such kernels", running, others);
}

const pl_cpu_set *pl_cpu_wanted(pl_error *err) {
    const char *wanted = wanted_name();
    const pl_cpu_set *set = set_of(wanted);
    if (!set) {
        refuse(wanted, err);
    }
    return set;
}

const pl_cpu_set *pl_cpu(void) {
    const pl_cpu_set *set = set_of(wanted_name());
    return set ? set : set_of(NULL);
}

PL_API const char *pl_cpu_name(pl_error *err) {
    const pl_cpu_set *set = pl_cpu_wanted(err);
    return set ? set->name : NULL;
}

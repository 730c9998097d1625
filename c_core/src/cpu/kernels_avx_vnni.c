/* kernels_avx_vnni.c - the same with VNNI, as processors without AVX-512 have it. */
#if defined(PL_AVX_VNNI)
#define VNNI 1
#define TABLE pl_kernels_avx_vnni
#include "kernels_avx2.h"
#endif

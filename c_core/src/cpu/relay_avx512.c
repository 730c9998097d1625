/* relay_avx512.c - panels re-laid with 512-bit registers. */
#if defined(__x86_64__)
#define RELAY pl_relay_avx512
#define LANES 16
#include "relay.h"
#endif

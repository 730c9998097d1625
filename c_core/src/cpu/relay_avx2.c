/* relay_avx2.c - panels re-laid with 256-bit registers. */
#if defined(__x86_64__)
#define RELAY pl_relay_avx2
#define LANES 8
#include "relay.h"
#endif

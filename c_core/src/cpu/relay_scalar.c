/* relay_scalar.c - panels re-laid on any processor: with SSE2 or NEON where they are sure to be there. */
#define RELAY pl_relay_scalar
#define LANES 4
#include "relay.h"

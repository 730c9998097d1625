/* attention_neon.h - what attention_vectors.h needs of 128-bit registers. */
#include <arm_neon.h>

#define VECTOR_BYTES 16
#define WIDEN(p) ((floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))))
#define LARGEST(v) vmaxvq_f32((float32x4_t)(v))
#define ALL(x) ((floats)vdupq_n_f32(x))
#define ROWS 3
#define SIZES(DO, x) DO(1, x) DO(2, x) DO(3, x)
#define COLUMNS(n) ((n) == 1 ? 8 : 4)

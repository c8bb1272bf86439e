/* Vectors as they lie in memory, line of cache by line, and sums over them in float. */
#ifndef MOESAIC_LINES_H
#define MOESAIC_LINES_H

#include <string.h>

#include "activations.h"
#include "job.h"

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(2), may_alias));
/* Of 32 vectors that AVX512 has, so many may hold sums. */
enum { LANES = 16, LINE_BYTES = 64, REGISTERS = 16 };

static inline int64_t whole_lines(int64_t num_floats) { return (num_floats + LANES - 1) / LANES * LANES; }

static inline floats load_f32(const float *at) { return *(const floats *)at; }
static inline void widen_f32(const float *line, floats *parts) { parts[0] = load_f32(line); }
static inline void widen_bf16(const bf16 *line, floats *parts) {
    const words both = *(const words *)line;
    parts[0] = (floats)(both << 16);
    parts[1] = (floats)(both & 0xffff0000u);
}
static inline float one_f32(float value) { return value; }
static inline float one_bf16(bf16 value) { return from_bits((uint32_t)value << 16); }

#define ELEMENT float
#define NAME(name) name##_f32
#include "lines.inc"
#undef ELEMENT
#undef NAME
#define ELEMENT bf16
#define NAME(name) name##_bf16
#include "lines.inc"
#undef ELEMENT
#undef NAME

#endif

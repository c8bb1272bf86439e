/* The grouped feed-forward for generation: every chosen weight is read once, in the order in which it lies in memory.
 *
 * A row of x times a matrix whose rows lie side by side is a weighted sum of those rows; where its columns do, it is a
 * product of vectors for each. Both read one stream ahead of what they compute. */
#include <stdlib.h>
#include <string.h>

#include "activations.h"
#include "job.h"

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));
enum { LANES = 16 };

/* So far ahead of what is multiplied weights are asked for, and for no longer than until they are: whatever else the
 * caches hold stays. On Zen 4 one stream per core comes to nine tenths of what memory gives, two or four rows of a
 * matrix at a time to six tenths at most. */
enum { AHEAD_BYTES = 2048 };

static inline floats load_f32(const float *at) { return *(const floats *)at; }
static inline floats load_bf16(const bf16 *at) {
    return (floats)(__builtin_convertvector(*(const halves *)at, words) << 16);
}
static inline float one_f32(float value) { return value; }
static inline float one_bf16(bf16 value) { return from_bits((uint32_t)value << 16); }
static inline float round_f32(float value) { return value; }
static inline bf16 round_bf16(float value) {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)(bits >> 16 | 64); /* NaN */
    return (bf16)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#define ELEMENT float
#define NAME(name) name##_f32
#include "few_rows.inc"
#undef ELEMENT
#undef NAME
#define ELEMENT bf16
#define NAME(name) name##_bf16
#include "few_rows.inc"
#undef ELEMENT
#undef NAME

/* Up to so many rows for each expert that has any, reading weights takes longer than multiplying by them. */
enum { FEW_ROWS = 4 };

/* 0: done. 1: not done, since rows are not few. 2: not done, for want of memory. */
int moesaic_few_rows(const struct job *job) {
    int64_t num_active = 0, start = 0;
    for (int64_t e = 0; e < job->num_experts; e++) {
        num_active += job->end[e] > start;
        start = job->end[e];
    }
    if (start > FEW_ROWS * num_active) return 1;
    return job->is_bf16 ? run_bf16(job, start, num_active) : run_f32(job, start, num_active);
}

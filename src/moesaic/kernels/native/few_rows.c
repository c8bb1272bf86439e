/* The grouped feed-forward for generation: every chosen weight is read once, in the order in which it lies in memory.
 *
 * A row of x times a matrix whose rows lie side by side is a weighted sum of those rows; where its columns do, it is a
 * product of vectors for each. Both go through memory line by line, which processors foresee: on Zen 4 that comes to
 * nine tenths of what memory gives. Several rows of a matrix at a time, which take fewer instructions, come to four to
 * nine tenths, and asking for what lies ahead costs up to two fifths once memory is fast. Sums begin where a line of
 * cache does: kept across two lines each, they take 1.6 times as long. */
#include <stdlib.h>

#include "job.h"
#include "lines.h"

/* The rows of one expert. */
struct task {
    int64_t expert, first, num_rows;
};

/* Matrices are read in parts, which threads share out. Each is large enough that starting to read it costs little, and
 * there are few enough that adding up what they give does; of many rows, fewer, so that their sums take little memory.
 * How many there are depends on nothing else: sums are the same on any number of threads. */
enum { PART_BYTES = 256 * 1024, MOST_PARTS = 16, MOST_SUMS = 256, COLUMNS = 64 };
static int64_t num_parts(int64_t num_bytes, int64_t num_rows) {
    int64_t parts = num_bytes / PART_BYTES;
    if (parts > MOST_PARTS) parts = MOST_PARTS;
    if (parts * num_rows > MOST_SUMS) parts = MOST_SUMS / num_rows;
    return parts < 1 ? 1 : parts;
}

/* Rows of a matrix that stay in the first cache from one row of x to the next. */
enum { AT_ONCE = 32 };

/* Where a part of n columns starts, at a whole line of cache. */
static int64_t piece(int64_t n, int64_t part, int64_t parts) {
    return part == parts ? n : n * part / parts / LANES * LANES;
}

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

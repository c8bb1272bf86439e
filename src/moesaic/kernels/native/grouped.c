/* The grouped feed-forward and its backward, gather, activation and weighting within the products.
 *
 * Experts are worked on by teams: all threads together where an expert is too large to be shared out evenly, each by
 * itself otherwise. Within a team, panels of weights and blocks of rows are dealt out by rank; between stages that read
 * what others wrote, a team of several waits. What is summed, and in which order, depends on neither. */
#include "job.h"

#ifdef __AVX512F__
#include "activations.h"
#include "product.h"

/* Rows of a left factor that are packed at once: with a panel of the right one they stay in the second cache. */
enum { BLOCK = 8 * ROWS };
/* Weight gradients of an expert with more rows than this are summed up in float32, this many rows at a time. */
enum { CHUNK = 4096 };

struct team {
    int64_t rank, size;
};

static inline void wait(const struct team *team) {
    if (team->size > 1) {
#pragma omp barrier
    }
}

/* This rank's share of `count` things, in whole units. */
static inline void share(const struct team *team, int64_t count, int64_t unit, int64_t *from, int64_t *to) {
    const int64_t units = ceil_div(count, unit);
    *from = units * team->rank / team->size * unit;
    *to = units * (team->rank + 1) / team->size * unit;
    if (*to > count) *to = count;
}

/* Scratch memory, handed out in whole cache lines. With a start of 0 it only counts. */
static inline void *take(uintptr_t *at, int64_t size_bytes) {
    const uintptr_t here = *at;
    *at += (uintptr_t)ceil_div(size_bytes, 64) * 64;
    return (void *)here;
}

/* The first or a later of the chunks of rows that an expert's gradients are summed over; the last is written out. */
struct chunk {
    int64_t first, count;
    int is_first, is_last;
};

static int64_t most_rows(const struct job *job) {
    int64_t most = 0;
    for (int64_t e = 0, start = 0; e < job->num_experts; start = job->end[e++])
        if (job->end[e] - start > most) most = job->end[e] - start;
    return most;
}

static int64_t num_rows_of(const struct job *job) { return job->num_experts ? job->end[job->num_experts - 1] : 0; }

#define ELEMENT float
#define NAME(name) name##_f32
#define PER_WORD 1
static inline __m512i load_words_f32(const float *row, int64_t left) {
    return _mm512_maskz_loadu_epi32(first_lanes(left), row);
}
static inline __m512i step_words_f32(const float *row, const float *next, __mmask16 lanes) {
    (void)next;
    return _mm512_maskz_loadu_epi32(lanes, row);
}
static inline __m512 multiply_f32(__m512 sum, __m512i left, __m512i right) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
}
static inline __m512 widen_f32(const float *at, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, at); }
static inline void narrow_f32(float *at, __mmask16 lanes, __m512 values) { _mm512_mask_storeu_ps(at, lanes, values); }
#include "product.inc"
#include "forward.inc"
#include "backward.inc"
#include "grouped.inc"
#undef ELEMENT
#undef NAME
#undef PER_WORD

/* With AMX, oneDNN multiplies bfloat16 several times as fast as these instructions can. */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define HAS_BF16 1
#define ELEMENT bf16
#define NAME(name) name##_bf16
#define PER_WORD 2
static inline __m512i load_words_bf16(const bf16 *row, int64_t left) {
    return _mm512_maskz_loadu_epi16(first_halves(left), row);
}
static inline __m512i step_words_bf16(const bf16 *row, const bf16 *next, __mmask16 lanes) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row));
    if (!next) return low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, next));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
static inline __m512 multiply_bf16(__m512 sum, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}
static inline __m512 widen_bf16(const bf16 *at, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, at)), 16));
}
static inline void narrow_bf16(bf16 *at, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(at, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}
#include "product.inc"
#include "forward.inc"
#include "backward.inc"
#include "grouped.inc"
#else
#define HAS_BF16 0
#endif

int moesaic_has_products(int is_bf16) { return !is_bf16 || HAS_BF16; }

int64_t moesaic_scratch_bytes(const struct job *job, int is_forward) {
    int64_t team_bytes, thread_bytes;
#if HAS_BF16
    if (job->is_bf16) return scratch_bytes_bf16(job, is_forward, &team_bytes, &thread_bytes);
#endif
    return scratch_bytes_f32(job, is_forward, &team_bytes, &thread_bytes);
}

void moesaic_grouped(const struct job *job, int is_forward) {
#if HAS_BF16
    if (job->is_bf16) {
        grouped_bf16(job, is_forward);
        return;
    }
#endif
    grouped_f32(job, is_forward);
}
#else
int moesaic_has_products(int is_bf16) {
    (void)is_bf16;
    return 0;
}
#endif

int64_t moesaic_job_bytes(void) { return sizeof(struct job); }

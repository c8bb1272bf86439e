/* Products by AVX512, added up in float32: of floats, or of bfloat16 numbers two at a time by AVX512_BF16.
 *
 * Both factors are first packed, in the order in which they are read: panels of ROWS rows of the left and of COLUMNS
 * columns of the right one after the other, a word of 32 bits for each row or column and each step along K. A word is
 * one float, or two bfloat16 numbers that are neighbours along K. Packing is where rows are gathered by token and
 * matrices transposed, so neither costs a pass of its own. Odd ends are filled with zeros. */
#ifndef MOESAIC_PRODUCT_H
#define MOESAIC_PRODUCT_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "job.h"

enum { ROWS = 12, COLUMNS = 32 };
/* So many rows of a matrix are packed, in all their columns, before the next ones: memory is read fastest in order. */
enum { READ_ROWS = 16 };

/* A tile of sums. */
typedef float tile[ROWS][COLUMNS];

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* Words of a packed left factor of M rows, and of a packed right one of N columns, with so many words along K. */
static inline int64_t left_words(int64_t M, int64_t words) { return ceil_div(M, ROWS) * ROWS * words; }
static inline int64_t right_words(int64_t N, int64_t words) { return ceil_div(N, COLUMNS) * COLUMNS * words; }

static inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
static inline __mmask32 first_halves(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

/* Transposes 16 rows of 16 words. */
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

#endif

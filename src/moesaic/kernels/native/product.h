/* Products of bfloat16 matrices, added up in float32, by AVX512_BF16: each instruction multiplies 16 pairs of pairs.
 *
 * Both factors are first packed, in the order in which they are read: pairs of neighbours along K side by side in 32
 * bits, panels of ROWS rows of the left and of COLUMNS columns of the right one after the other. Packing is where rows
 * are gathered by token and matrices transposed, so neither costs a pass of its own. Odd ends are filled with zeros. */
#ifndef MOESAIC_PRODUCT_H
#define MOESAIC_PRODUCT_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "job.h"

enum { ROWS = 12, COLUMNS = 32 };

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* 32-bit words of a packed left factor of M rows, and of a packed right one of N columns, for K of either. */
static inline int64_t left_words(int64_t M, int64_t K) { return ceil_div(M, ROWS) * ROWS * ceil_div(K, 2); }
static inline int64_t right_words(int64_t N, int64_t K) { return ceil_div(N, COLUMNS) * COLUMNS * ceil_div(K, 2); }

/* Rows of bfloat16 that lie side by side, `row` apart, or at the places that `index` names. */
struct rows {
    const bf16 *data;
    int64_t row;
    const int64_t *index;
};

static inline const bf16 *row_at(const struct rows *rows, int64_t i) {
    return rows->data + (rows->index ? rows->index[i] : i) * rows->row;
}

static inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
static inline __mmask32 first_halves(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

/* Two rows' values at the same 16 places, side by side. */
static inline __m512i pairs(const bf16 *even, const bf16 *odd, __mmask16 lanes) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even));
    if (!odd) return low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

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

/* Up to 16 rows, K values of each, into words whose column c of pair k stands at to[k * stride + c], `width` of them.
 * Of as many rows after them as are `ahead`, it asks for what will be packed next. */
static inline void pack_rows(const struct rows *rows, int64_t first, int64_t count, int64_t ahead, int64_t K,
                             uint32_t *to, int64_t stride, int64_t width) {
    const __mmask16 stored = first_lanes(width);
    for (int64_t k = 0; k < K; k += 32) {
        __m512i block[16];
        for (int64_t i = 0; i < ahead; i++) __builtin_prefetch(row_at(rows, first + count + i) + k, 0, 2);
        for (int64_t i = 0; i < 16; i++)
            block[i] = i < count ? _mm512_maskz_loadu_epi16(first_halves(K - k), row_at(rows, first + i) + k)
                                 : _mm512_setzero_si512();
        transpose(block);
        const int64_t num_pairs = ceil_div(K - k < 32 ? K - k : 32, 2);
        for (int64_t i = 0; i < num_pairs; i++) _mm512_mask_storeu_epi32(to + (k / 2 + i) * stride, stored, block[i]);
    }
}

/* A left factor of M rows that lie side by side along K. A panel's rows follow each other at `panel_words`. */
static inline void pack_left(const struct rows *rows, int64_t first, int64_t M, int64_t K, uint32_t *to,
                             int64_t panel_words) {
    for (int64_t m = 0; m < M; m += ROWS, to += panel_words) {
        const int64_t count = M - m < ROWS ? M - m : ROWS, left = M - m - count;
        pack_rows(rows, first + m, count, left < ROWS ? left : ROWS, K, to, ROWS, ROWS);
    }
}

/* A left factor that lies side by side along its M rows: the K rows of its transpose, from their place `start` on. */
static inline void pack_left_transposed(const struct rows *rows, int64_t first, int64_t K, int64_t start, int64_t M,
                                        uint32_t *to) {
    for (int64_t m = 0; m < M; m += ROWS) {
        const int64_t count = M - m < ROWS ? M - m : ROWS;
        for (int64_t k = 0; k < K; k += 2, to += ROWS) {
            const bf16 *odd = k + 1 < K ? row_at(rows, first + k + 1) + start + m : NULL;
            const __m512i both = pairs(row_at(rows, first + k) + start + m, odd, first_lanes(count));
            _mm512_mask_storeu_epi32(to, first_lanes(ROWS), both);
        }
    }
}

/* `count` of 16 columns of a right factor whose K rows lie side by side, into a half panel. */
static inline void pack_right_half(const struct rows *rows, int64_t first, int64_t K, int64_t start, int64_t count,
                                   uint32_t *to) {
    const __mmask16 lanes = first_lanes(count);
    for (int64_t k = 0; k < K; k += 2, to += COLUMNS) {
        const bf16 *odd = k + 1 < K ? row_at(rows, first + k + 1) + start : NULL;
        _mm512_storeu_si512(to, pairs(row_at(rows, first + k) + start, odd, lanes));
    }
}

/* 16 columns of matrix `expert` of a stack (K, N) from `start` on, those up to N, into a half panel. Of a matrix that
 * lies row by row, only the rows from k on, READ_ROWS at most: all columns of these first, since memory is read
 * fastest from end to end. */
enum { READ_ROWS = 16 };
static inline void pack_stack_half(const struct stack *stack, int64_t expert, int64_t K, int64_t k, int64_t start,
                                   int64_t N, uint32_t *to) {
    const bf16 *matrix = (const bf16 *)stack->data + expert * stack->matrix;
    const int64_t count = N - start < 16 ? N - start : 16;
    if (stack->column == 1) {
        const struct rows rows = {matrix, stack->row, NULL};
        const int64_t num_rows = K - k < READ_ROWS ? K - k : READ_ROWS;
        for (int64_t i = k + READ_ROWS; i < k + 2 * READ_ROWS && i < K && count > 0; i++)
            __builtin_prefetch(row_at(&rows, i) + start, 0, 2);
        pack_right_half(&rows, k, num_rows, start, count, to + k / 2 * COLUMNS);
    } else if (k == 0) {
        const struct rows columns = {matrix, stack->column, NULL};
        const int64_t left = N - start - count;
        pack_rows(&columns, start, count, left < 0 ? 0 : left < 16 ? left : 16, K, to, COLUMNS, 16);
    }
}

/* A tile of sums: ROWS by COLUMNS. */
typedef float tile[ROWS][COLUMNS];

#define PRODUCT_OF(R)                                                                                                 \
    static void product_##R(int64_t num_pairs, const uint32_t *left, const uint32_t *right, tile out) {               \
        __m512 sum[R][2];                                                                                             \
        for (int m = 0; m < R; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();                                      \
        for (int64_t k = 0; k < num_pairs; k++, left += ROWS, right += COLUMNS) {                                     \
            const __m512bh right_0 = (__m512bh)_mm512_loadu_si512(right);                                             \
            const __m512bh right_1 = (__m512bh)_mm512_loadu_si512(right + 16);                                        \
            _Pragma("GCC unroll 12") for (int m = 0; m < R; m++) {                                                    \
                const __m512bh left_m = (__m512bh)_mm512_set1_epi32((int)left[m]);                                    \
                sum[m][0] = _mm512_dpbf16_ps(sum[m][0], left_m, right_0);                                             \
                sum[m][1] = _mm512_dpbf16_ps(sum[m][1], left_m, right_1);                                             \
            }                                                                                                         \
        }                                                                                                             \
        _Pragma("GCC unroll 12") for (int m = 0; m < R; m++) {                                                        \
            _mm512_storeu_ps(out[m], sum[m][0]);                                                                      \
            _mm512_storeu_ps(out[m] + 16, sum[m][1]);                                                                 \
        }                                                                                                             \
    }
PRODUCT_OF(4)
PRODUCT_OF(8)
PRODUCT_OF(12)

/* num_rows rows of a left panel times a right panel. */
static inline void product(int64_t num_rows, int64_t num_pairs, const uint32_t *left, const uint32_t *right, tile out) {
    if (num_rows > 8)
        product_12(num_pairs, left, right, out);
    else if (num_rows > 4)
        product_8(num_pairs, left, right, out);
    else
        product_4(num_pairs, left, right, out);
}

static inline __m512 widen(const bf16 *at, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, at)), 16));
}

static inline void narrow(bf16 *at, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(at, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

#endif

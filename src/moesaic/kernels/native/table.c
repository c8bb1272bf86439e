/* What routers and dispatch do with the table of rows: choose the best experts of each token, sort rows by expert. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* So many scores are chosen from by one thread. */
enum { OF_ONE_THREAD = 32768 };

/* A whole number that orders as scores do: NaN comes before all numbers, as in torch.sort, and -0.0 equals 0.0. None is
 * INT32_MIN. */
static inline int32_t key_of(float score) {
    int32_t bits;
    score += 0.0f;
    memcpy(&bits, &score, sizeof bits);
    bits ^= bits >> 31 & 0x7fffffff;
    return score != score ? INT32_MAX : bits;
}

/* The best of E keys, best first and of equal ones the first. Most keys are worse than the last of the best so far, and
 * BLOCK of them are seen to be at once. */
static void best_of(const int32_t *key, int64_t E, int64_t top_k, int32_t *best, int64_t *experts) {
    enum { BLOCK = 16 };
    for (int64_t k = 0; k < top_k; k++) best[k] = INT32_MIN;
    for (int64_t from = 0; from < E; from += BLOCK) {
        const int64_t to = from + BLOCK < E ? from + BLOCK : E;
        if (to - from == BLOCK) {
            int32_t found = 0;
            for (int64_t e = from; e < from + BLOCK; e++) found |= key[e] > best[top_k - 1];
            if (!found) continue;
        }
        for (int64_t e = from; e < to; e++) {
            if (key[e] <= best[top_k - 1]) continue;
            int64_t k = top_k - 1;
            for (; k > 0 && best[k - 1] < key[e]; k--) {
                best[k] = best[k - 1];
                experts[k] = experts[k - 1];
            }
            best[k] = key[e];
            experts[k] = e;
        }
    }
}

/* The top_k best of E scores of each of T tokens, row apart, best first, into (T, top_k).
 * 0: done. 2: not done, for want of memory. */
int moesaic_top_k(const float *scores, int64_t row, int64_t T, int64_t E, int64_t top_k, int64_t *experts,
                  int32_t num_threads) {
    if (T * E <= OF_ONE_THREAD) num_threads = 1;
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        int32_t *key = malloc((size_t)(E + top_k) * sizeof *key + 1);
        if (!key) {
#pragma omp atomic write
            failed = 2;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t++) {
            if (!key) continue;
            const float *of_token = scores + t * row;
            for (int64_t e = 0; e < E; e++) key[e] = key_of(of_token[e]);
            best_of(key, E, top_k, key + E, experts + t * top_k);
        }
        free(key);
    }
    return failed;
}

/* Rows sorted by expert in the order of the table, those that are not kept last: row and token of each place, and the
 * load of each expert and where its rows end. 0: done. 1: not done, since a kept row's expert is none of 0 to E - 1. */
int moesaic_sort_rows(int64_t N, int64_t E, const int64_t *expert, const int64_t *token, const uint8_t *kept,
                      int64_t *row_of, int64_t *token_of, int64_t *load, int64_t *end) {
    memset(load, 0, (size_t)E * sizeof *load);
    for (int64_t n = 0; n < N; n++) {
        if (!kept[n]) continue;
        if (expert[n] < 0 || expert[n] >= E) return 1;
        load[expert[n]]++;
    }
    /* While rows are placed, end says where an expert's next one goes; after its last, that is its end. */
    int64_t num_kept = 0;
    for (int64_t e = 0; e < E; e++) {
        end[e] = num_kept;
        num_kept += load[e];
    }
    for (int64_t n = 0; n < N; n++) {
        const int64_t place = kept[n] ? end[expert[n]]++ : num_kept++;
        row_of[place] = n;
        token_of[place] = token[n];
    }
    return 0;
}

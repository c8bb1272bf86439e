/* A whole layer in one call, for the few tokens of generation: router, table and experts, as
 * moesaic/routers/top_k.py, core/routing.py and dispatch/sort.py have them. */
#include <math.h>
#include <stdlib.h>

#include "job.h"
#include "lines.h"

int moesaic_top_k(const float *scores, int64_t row, int64_t T, int64_t E, int64_t top_k, int64_t *experts,
                  int32_t num_threads);
int moesaic_sort_rows(int64_t N, int64_t E, const int64_t *expert, const int64_t *token, const uint8_t *kept,
                      int64_t *row_of, int64_t *token_of, int64_t *load, int64_t *end);
int moesaic_few_rows(const struct job *job);

enum score { SOFTMAX, SIGMOID };
enum weights { SCORES, CHOSEN_SCORES, CHOSEN_LOGITS };

/* How a router chooses the top_k best, and where what it finds goes. Mirrored field by field in build.py. */
struct chooser {
    const void *weight; /* (E, D), rows weight_row apart */
    int64_t weight_row, top_k;
    const float *logit_bias, *selection_bias; /* (E,), or NULL */
    float scale;
    int32_t is_bf16, score, weights;
    const uint8_t *valid;              /* (T,) */
    float *logits, *scores;            /* (T, E) */
    float *weight_of;                  /* of each row, (N,), as all below */
    int64_t *expert, *token, *choice;
    uint8_t *kept;
};

/* So many products of a logit are worth a second thread. */
enum { OF_ONE_THREAD = 16384 };

static void softmax(const float *logit, int64_t n, float *into) {
    float most = logit[0], sum = 0;
    for (int64_t i = 1; i < n; i++) most = logit[i] > most ? logit[i] : most;
    for (int64_t i = 0; i < n; i++) sum += into[i] = expf(logit[i] - most);
    for (int64_t i = 0; i < n; i++) into[i] /= sum;
}

static float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

static float log_sigmoid(float logit) { return (logit < 0 ? logit : 0.0f) - log1pf(expf(-fabsf(logit))); }

static void score(enum score how, const float *logit, int64_t n, float *into) {
    if (how == SOFTMAX) {
        softmax(logit, n, into);
        return;
    }
    for (int64_t i = 0; i < n; i++) into[i] = sigmoid(logit[i]);
}

/* The logits of all tokens. lines has room for D floats of each. */
static void fill_logits(const struct job *job, const struct chooser *how, float *lines) {
    const int64_t T = job->num_tokens, E = job->num_experts, D = job->width, D_row = whole_lines(D);
    for (int64_t t = 0; t < T; t++) {
        const char *x = (const char *)job->x;
        float *to = lines + t * D_row;
        if (job->is_bf16 && how->is_bf16)
            by_lines_bf16((const bf16 *)x + t * job->x_row, D, to);
        else if (job->is_bf16)
            for (int64_t d = 0; d < D; d++) to[d] = one_bf16(((const bf16 *)x)[t * job->x_row + d]);
        else if (how->is_bf16)
            floats_by_lines_bf16((const float *)x + t * job->x_row, D, to);
        else
            memcpy(to, (const float *)x + t * job->x_row, (size_t)D * sizeof *to);
    }
#pragma omp parallel for schedule(static) num_threads(job->num_threads) if (T * E * D > OF_ONE_THREAD)
    for (int64_t e = 0; e < E; e++)
        for (int64_t t = 0; t < T; t++) {
            const int64_t at = e * how->weight_row;
            const float logit = how->is_bf16
                                    ? dot_bf16(lines + t * D_row, (const bf16 *)how->weight + at, D)
                                    : dot_f32(lines + t * D_row, (const float *)how->weight + at, D);
            how->logits[t * E + e] = how->logit_bias ? logit + how->logit_bias[e] : logit;
        }
}

/* The rows of all tokens. by has room for E floats. 0: done. 2: not done, for want of memory. */
static int fill_rows(const struct job *job, const struct chooser *how, float *by) {
    const int64_t E = job->num_experts, K = how->top_k;
    for (int64_t t = 0; t < job->num_tokens; t++) {
        const float *logits = how->logits + t * E;
        float *scores = how->scores + t * E, *weight_of = how->weight_of + t * K;
        int64_t *expert = how->expert + t * K;
        score(how->score, logits, E, scores);
        if (how->selection_bias)
            for (int64_t e = 0; e < E; e++) by[e] = scores[e] + how->selection_bias[e];
        if (moesaic_top_k(how->selection_bias ? by : logits, E, 1, E, K, expert, 1)) return 2;
        for (int64_t k = 0; k < K; k++) {
            const float *chosen = how->weights == SCORES ? scores : logits;
            weight_of[k] = chosen[expert[k]];
            if (how->weights == CHOSEN_SCORES) weight_of[k] = log_sigmoid(weight_of[k]);
            how->token[t * K + k] = t;
            how->choice[t * K + k] = k;
            how->kept[t * K + k] = how->valid[t];
        }
        if (how->weights == CHOSEN_SCORES)
            softmax(weight_of, K, weight_of);
        else if (how->weights == CHOSEN_LOGITS)
            score(how->score, weight_of, K, weight_of);
        for (int64_t k = 0; k < K; k++) weight_of[k] *= how->scale;
    }
    return 0;
}

/* 0: done. 1: not done, since rows are not few. 2: not done, for want of memory. */
int moesaic_whole_layer(struct job *job, const struct chooser *how) {
    const int64_t T = job->num_tokens, E = job->num_experts, N = T * how->top_k;
    float *floats_of = malloc((size_t)(T * whole_lines(job->width) + E + N + 1) * sizeof *floats_of);
    int64_t *wholes_of = malloc((size_t)(2 * N + 2 * E + 1) * sizeof *wholes_of);
    int answer = 2;
    if (floats_of && wholes_of) {
        float *lines = floats_of, *by = lines + T * whole_lines(job->width), *weight = by + E;
        int64_t *row_of = wholes_of, *token_of = row_of + N, *load = token_of + N, *end = load + E;
        fill_logits(job, how, lines);
        answer = fill_rows(job, how, by);
        if (answer == 0) answer = moesaic_sort_rows(N, E, how->expert, how->token, how->kept, row_of, token_of, load, end);
        if (answer == 0) {
            for (int64_t n = 0; n < N; n++) weight[n] = how->weight_of[row_of[n]];
            job->token = token_of;
            job->end = end;
            job->weight = weight;
            answer = moesaic_few_rows(job);
        }
    }
    free(floats_of);
    free(wholes_of);
    return answer;
}

int64_t moesaic_chooser_bytes(void) { return sizeof(struct chooser); }

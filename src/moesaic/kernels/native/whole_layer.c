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

/* What Python hands over: a layer, its tokens, and where what it finds goes. All tensors but x lie side by side.
 * Mirrored field by field in build.py. */
struct layer {
    int64_t num_experts, num_tokens, width, hidden, top_k, x_row;
    int32_t activation, is_gated, num_threads, is_bf16; /* of tokens and experts */
    int32_t router_is_bf16, score, weights;
    float scale;
    const void *x;                            /* (T, D), rows x_row apart */
    void *gate, *up, *down;                   /* (E, D, F), (E, D, F), (E, F, D) */
    const void *router;                       /* (E, D) */
    const float *logit_bias, *selection_bias; /* (E,), or NULL */
    const uint8_t *valid;                     /* (T,) */
    void *y;                                  /* (T, D) */
    float *logits, *scores;                   /* (T, E) */
    float *weight_of;                         /* of each row, (N,), as all below */
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
static void fill_logits(const struct layer *layer, float *lines) {
    const int64_t T = layer->num_tokens, E = layer->num_experts, D = layer->width, D_row = whole_lines(D);
    for (int64_t t = 0; t < T; t++) {
        const float *x = (const float *)layer->x + t * layer->x_row;
        const bf16 *half = (const bf16 *)layer->x + t * layer->x_row;
        float *to = lines + t * D_row;
        if (layer->is_bf16 && layer->router_is_bf16)
            by_lines_bf16(half, D, to);
        else if (layer->is_bf16)
            for (int64_t d = 0; d < D; d++) to[d] = one_bf16(half[d]);
        else if (layer->router_is_bf16)
            floats_by_lines_bf16(x, D, to);
        else
            memcpy(to, x, (size_t)D * sizeof *to);
    }
#pragma omp parallel for schedule(static) num_threads(layer->num_threads) if (T * E * D > OF_ONE_THREAD)
    for (int64_t e = 0; e < E; e++)
        for (int64_t t = 0; t < T; t++) {
            const float logit = layer->router_is_bf16
                                    ? dot_bf16(lines + t * D_row, (const bf16 *)layer->router + e * D, D)
                                    : dot_f32(lines + t * D_row, (const float *)layer->router + e * D, D);
            layer->logits[t * E + e] = layer->logit_bias ? logit + layer->logit_bias[e] : logit;
        }
}

/* The rows of all tokens. by has room for E floats. 0: done. 2: not done, for want of memory. */
static int fill_rows(const struct layer *layer, float *by) {
    const int64_t E = layer->num_experts, K = layer->top_k;
    for (int64_t t = 0; t < layer->num_tokens; t++) {
        const float *logits = layer->logits + t * E;
        float *scores = layer->scores + t * E, *weight_of = layer->weight_of + t * K;
        int64_t *expert = layer->expert + t * K;
        score(layer->score, logits, E, scores);
        if (layer->selection_bias)
            for (int64_t e = 0; e < E; e++) by[e] = scores[e] + layer->selection_bias[e];
        if (moesaic_top_k(layer->selection_bias ? by : logits, E, 1, E, K, expert, 1)) return 2;
        for (int64_t k = 0; k < K; k++) {
            weight_of[k] = layer->weights == SCORES ? scores[expert[k]] : logits[expert[k]];
            layer->token[t * K + k] = t;
            layer->choice[t * K + k] = k;
            layer->kept[t * K + k] = layer->valid[t];
        }
        /* Chosen scores by their sum: of softmax, the softmax of the chosen logits; of sigmoids, that of their logs. */
        if (layer->weights == CHOSEN_SCORES && layer->score == SIGMOID)
            for (int64_t k = 0; k < K; k++) weight_of[k] = log_sigmoid(weight_of[k]);
        if (layer->weights == CHOSEN_SCORES) softmax(weight_of, K, weight_of);
        if (layer->weights == CHOSEN_LOGITS) score(layer->score, weight_of, K, weight_of);
        for (int64_t k = 0; k < K; k++) weight_of[k] *= layer->scale;
    }
    return 0;
}

static struct stack stack_of(void *data, int64_t rows, int64_t columns) {
    return (struct stack){data, rows * columns, columns, 1};
}

/* The experts' outputs. wholes has room for 2 N + 2 E numbers, weight for N. As moesaic_few_rows answers. */
static int run_experts(const struct layer *layer, int64_t *wholes, float *weight) {
    const int64_t E = layer->num_experts, D = layer->width, F = layer->hidden, N = layer->num_tokens * layer->top_k;
    int64_t *row_of = wholes, *token_of = row_of + N, *load = token_of + N, *end = load + E;
    if (moesaic_sort_rows(N, E, layer->expert, layer->token, layer->kept, row_of, token_of, load, end)) return 1;
    for (int64_t n = 0; n < N; n++) weight[n] = layer->weight_of[row_of[n]];
    const struct job job = {
        .num_experts = E,
        .num_tokens = layer->num_tokens,
        .width = D,
        .hidden = F,
        .activation = layer->activation,
        .is_gated = layer->is_gated,
        .num_threads = layer->num_threads,
        .is_bf16 = layer->is_bf16,
        .x = layer->x,
        .x_row = layer->x_row,
        .token = token_of,
        .end = end,
        .weight = weight,
        .gate = stack_of(layer->gate, D, F),
        .up = stack_of(layer->up, D, F),
        .down = stack_of(layer->down, F, D),
        .y = layer->y,
    };
    return moesaic_few_rows(&job);
}

/* 0: done. 1: not done, since rows are not few. 2: not done, for want of memory. */
int moesaic_whole_layer(const struct layer *layer) {
    const int64_t T = layer->num_tokens, E = layer->num_experts, N = T * layer->top_k;
    const int64_t D_row = whole_lines(layer->width);
    float *floats_of = malloc((size_t)(T * D_row + E + N + 1) * sizeof *floats_of);
    int64_t *wholes = malloc((size_t)(2 * N + 2 * E + 1) * sizeof *wholes);
    int answer = 2;
    if (floats_of && wholes) {
        float *lines = floats_of, *by = lines + T * D_row, *weight = by + E;
        fill_logits(layer, lines);
        answer = fill_rows(layer, by);
        if (answer == 0) answer = run_experts(layer, wholes, weight);
    }
    free(floats_of);
    free(wholes);
    return answer;
}

int64_t moesaic_layer_bytes(void) { return sizeof(struct layer); }

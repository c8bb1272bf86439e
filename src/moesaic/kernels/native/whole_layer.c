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
    const void *logit_bias;                   /* (E,), as the router's weight, or NULL */
    const float *selection_bias;              /* (E,), or NULL */
    const uint8_t *valid;                     /* (T,), or NULL: all are */
    void *y;                                  /* (T, D) */
    void *table;                              /* see below */
};

/* The table in one piece of memory: of each row (N,) its expert, token and choice; of each token the logits and scores
 * (T, E); of each row its weight and whether it is kept. Mirrored in whole_layer.py. */
struct table {
    int64_t *expert, *token, *choice;
    float *logits, *scores, *weight;
    uint8_t *kept;
};

static struct table table_of(const struct layer *layer) {
    const int64_t N = layer->num_tokens * layer->top_k, num_scores = layer->num_tokens * layer->num_experts;
    int64_t *wholes = layer->table;
    float *floats_of = (float *)(wholes + 3 * N);
    return (struct table){
        .expert = wholes,
        .token = wholes + N,
        .choice = wholes + 2 * N,
        .logits = floats_of,
        .scores = floats_of + num_scores,
        .weight = floats_of + 2 * num_scores,
        .kept = (uint8_t *)(floats_of + 2 * num_scores + N),
    };
}

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
static void fill_logits(const struct layer *layer, const struct table *table, float *lines) {
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
    for (int64_t e = 0; e < E; e++) {
        const float *row = (const float *)layer->router + e * D, *biases = layer->logit_bias;
        const bf16 *half_row = (const bf16 *)layer->router + e * D, *half_biases = layer->logit_bias;
        float bias = 0;
        if (layer->logit_bias) bias = layer->router_is_bf16 ? one_bf16(half_biases[e]) : biases[e];
        for (int64_t t = 0; t < T; t++) {
            const float *x = lines + t * D_row;
            table->logits[t * E + e] = bias + (layer->router_is_bf16 ? dot_bf16(x, half_row, D) : dot_f32(x, row, D));
        }
    }
}

/* The rows of all tokens. by has room for E floats. 0: done. 2: not done, for want of memory. */
static int fill_rows(const struct layer *layer, const struct table *table, float *by) {
    const int64_t E = layer->num_experts, K = layer->top_k;
    for (int64_t t = 0; t < layer->num_tokens; t++) {
        const float *logits = table->logits + t * E;
        float *scores = table->scores + t * E, *weight = table->weight + t * K;
        int64_t *expert = table->expert + t * K;
        score(layer->score, logits, E, scores);
        if (layer->selection_bias)
            for (int64_t e = 0; e < E; e++) by[e] = scores[e] + layer->selection_bias[e];
        if (moesaic_top_k(layer->selection_bias ? by : logits, E, 1, E, K, expert, 1)) return 2;
        for (int64_t k = 0; k < K; k++) {
            weight[k] = layer->weights == SCORES ? scores[expert[k]] : logits[expert[k]];
            table->token[t * K + k] = t;
            table->choice[t * K + k] = k;
            table->kept[t * K + k] = !layer->valid || layer->valid[t];
        }
        /* Chosen scores by their sum: of softmax, the softmax of the chosen logits; of sigmoids, that of their logs. */
        if (layer->weights == CHOSEN_SCORES && layer->score == SIGMOID)
            for (int64_t k = 0; k < K; k++) weight[k] = log_sigmoid(weight[k]);
        if (layer->weights == CHOSEN_SCORES) softmax(weight, K, weight);
        if (layer->weights == CHOSEN_LOGITS) score(layer->score, weight, K, weight);
        for (int64_t k = 0; k < K; k++) weight[k] *= layer->scale;
    }
    return 0;
}

static struct stack stack_of(void *data, int64_t rows, int64_t columns) {
    return (struct stack){data, rows * columns, columns, 1};
}

/* The experts' outputs. wholes has room for 2 N + 2 E numbers, weight for N. As moesaic_few_rows answers. */
static int run_experts(const struct layer *layer, const struct table *table, int64_t *wholes, float *weight) {
    const int64_t E = layer->num_experts, D = layer->width, F = layer->hidden, N = layer->num_tokens * layer->top_k;
    int64_t *row_of = wholes, *token_of = row_of + N, *load = token_of + N, *end = load + E;
    if (moesaic_sort_rows(N, E, table->expert, table->token, table->kept, row_of, token_of, load, end)) return 1;
    for (int64_t n = 0; n < N; n++) weight[n] = table->weight[row_of[n]];
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
        const struct table table = table_of(layer);
        fill_logits(layer, &table, lines);
        answer = fill_rows(layer, &table, by);
        if (answer == 0) answer = run_experts(layer, &table, wholes, weight);
    }
    free(floats_of);
    free(wholes);
    return answer;
}

int64_t moesaic_layer_bytes(void) { return sizeof(struct layer); }

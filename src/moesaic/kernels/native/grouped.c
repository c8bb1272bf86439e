/* The grouped feed-forward and its backward in bfloat16, gather, activation and weighting within the products.
 *
 * Experts are worked on by teams: all threads together where an expert is too large to be shared out evenly, each by
 * itself otherwise. Within a team, panels of weights and blocks of rows are dealt out by rank; between stages that read
 * what others wrote, a team of several waits. What is summed, and in which order, depends on neither. */
/* With AMX, oneDNN multiplies several times as fast as these instructions can. */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "activations.h"
#include "job.h"
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

/* Scratch memory, handed out in whole cache lines. With a start of NULL it only counts. */
static inline void *take(char **at, int64_t size_bytes) {
    char *here = *at;
    *at += ceil_div(size_bytes, 64) * 64;
    return here;
}

/* What the forward of an expert keeps between its stages. Packed weights belong to the team, blocks to each thread. */
struct forward_memory {
    uint32_t *in, *down;       /* gate and up, 16 columns of each in turn; down */
    uint32_t *left;            /* a block of x, or of hidden states, packed */
    bf16 *hidden;              /* a block */
};

static struct forward_memory forward_memory(const struct job *job, char *team_at, char *thread_at) {
    const int64_t D = job->width, F = job->hidden, most = D > F ? D : F;
    struct forward_memory m;
    m.in = take(&team_at, 4 * right_words((job->is_gated ? 2 : 1) * ceil_div(F, 16) * 16, D));
    m.down = take(&team_at, 4 * right_words(D, F));
    m.left = take(&thread_at, 4 * left_words(BLOCK, most));
    m.hidden = take(&thread_at, 2 * BLOCK * F);
    return m;
}

/* 16 (gated) or up to 32 columns of hidden states from a tile of pre-activations. */
static void hide(const struct job *job, int64_t num_rows, const tile pre, int64_t row, int64_t f, bf16 *hidden) {
    const int64_t F = job->hidden, step = job->is_gated ? 16 : COLUMNS;
    float before[ROWS * COLUMNS], after[ROWS * COLUMNS];
    for (int64_t m = 0; m < num_rows; m++) memcpy(before + m * step, pre[m], (size_t)step * sizeof(float));
    activate(job->activation, num_rows * step, before, after, NULL);
    for (int64_t m = 0; m < num_rows; m++)
        for (int64_t c = 0; c < step && f + c < F; c += 16) {
            const __mmask16 lanes = first_lanes(F - f - c);
            const int64_t kept = (row + m) * F + f + c;
            const __m512 act = _mm512_loadu_ps(after + m * step + c), first = _mm512_loadu_ps(pre[m] + c);
            const __m512 up = job->is_gated ? _mm512_loadu_ps(pre[m] + 16) : first;
            narrow(hidden + m * F + f + c, lanes, job->is_gated ? _mm512_mul_ps(act, up) : act);
            if (job->gate_pre) narrow(job->gate_pre + kept, lanes, first);
            if (job->up_pre) narrow(job->up_pre + kept, lanes, up);
        }
}

static void store_rows(int64_t num_rows, const tile sums, bf16 *to, int64_t row, int64_t width) {
    for (int64_t m = 0; m < num_rows; m++)
        for (int64_t c = 0; c < COLUMNS && c < width; c += 16)
            narrow(to + m * row + c, first_lanes(width - c), _mm512_loadu_ps(sums[m] + c));
}

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* Gate and up side by side, 16 columns of each to a panel, so that one tile holds both pre-activations of a unit. */
static void pack_in(const struct job *job, const struct team *team, int64_t e, uint32_t *to) {
    const int64_t D = job->width, F = job->hidden, panel = COLUMNS * ceil_div(D, 2), step = job->is_gated ? 16 : 32;
    for (int64_t k = 0; k < D; k += READ_ROWS)
        for (int64_t j = team->rank; j < ceil_div(F, step); j += team->size) {
            const int64_t second = job->is_gated ? j * 16 : j * 32 + 16;
            pack_stack_half(job->is_gated ? &job->gate : &job->up, e, D, k, j * step, F, to + j * panel);
            pack_stack_half(&job->up, e, D, k, second, F, to + j * panel + 16);
        }
}

/* All N columns of a matrix (K, N) of a stack. */
static void pack_stack(const struct team *team, const struct stack *stack, int64_t e, int64_t K, int64_t N, uint32_t *to,
                       int64_t panel) {
    for (int64_t k = 0; k < K; k += READ_ROWS)
        for (int64_t j = team->rank; j < ceil_div(N, COLUMNS); j += team->size)
            for (int64_t half = 0; half < COLUMNS; half += 16)
                pack_stack_half(stack, e, K, k, j * COLUMNS + half, N, to + j * panel + half);
}

static void forward_expert(const struct job *job, const struct team *team, int64_t e, char *team_at, char *thread_at) {
    const int64_t D = job->width, F = job->hidden, start = e ? job->end[e - 1] : 0, count = job->end[e] - start;
    const int64_t pairs_D = ceil_div(D, 2), pairs_F = ceil_div(F, 2), step = job->is_gated ? 16 : COLUMNS;
    const struct forward_memory memory = forward_memory(job, team_at, thread_at);
    pack_in(job, team, e, memory.in);
    pack_stack(team, &job->down, e, F, D, memory.down, COLUMNS * pairs_F);
    wait(team);
    const struct rows x = {job->x, job->x_row, job->token + start}, hidden = {memory.hidden, F, NULL};
    int64_t from, to;
    share(team, count, ROWS, &from, &to);
    for (int64_t block = from; block < to; block += BLOCK) {
        const int64_t size = at_most(BLOCK, to - block);
        tile sums;
        pack_left(&x, block, size, D, memory.left, ROWS * pairs_D);
        for (int64_t f = 0; f < F; f += step)
            for (int64_t m = 0; m < size; m += ROWS) {
                const int64_t num_rows = at_most(ROWS, size - m);
                product(num_rows, pairs_D, memory.left + m * pairs_D, memory.in + f / step * COLUMNS * pairs_D, sums);
                hide(job, num_rows, sums, start + block + m, f, memory.hidden + m * F);
            }
        pack_left(&hidden, 0, size, F, memory.left, ROWS * pairs_F);
        for (int64_t d = 0; d < D; d += COLUMNS)
            for (int64_t m = 0; m < size; m += ROWS) {
                const int64_t num_rows = at_most(ROWS, size - m);
                product(num_rows, pairs_F, memory.left + m * pairs_F, memory.down + d * pairs_F, sums);
                store_rows(num_rows, sums, job->rows + (start + block + m) * D + d, D, D - d);
            }
    }
    wait(team); /* the next expert is packed where this one's weights are */
}

/* What the backward of an expert keeps. All but `left` belongs to the team. */
struct backward_memory {
    uint32_t *down, *in;        /* down^T; gate^T and up^T, one above the other */
    bf16 *hidden;               /* times their weights */
    bf16 *grad_gate, *grad_up;  /* of pre-activations, of up to CHUNK rows */
    uint32_t *right;            /* right factors of the weights' gradients: first down's, then those of gate and up */
    float *sums;                /* (D, F), (D, F), (F, D): gradients of an expert's weights so far */
    uint32_t *left;             /* of each thread */
};

static struct backward_memory backward_memory(const struct job *job, int64_t most, char *team_at, char *thread_at,
                                              int64_t *team_bytes, int64_t *thread_bytes) {
    const int64_t D = job->width, F = job->hidden, chunk = at_most(most, CHUNK), num_in = job->is_gated ? 2 : 1;
    const int64_t wide = D > F ? D : F;
    char *team_start = team_at, *thread_start = thread_at;
    struct backward_memory m;
    m.down = take(&team_at, 4 * right_words(F, D));
    m.in = take(&team_at, 4 * num_in * right_words(D, F));
    m.hidden = take(&team_at, 2 * chunk * F);
    m.grad_gate = take(&team_at, job->is_gated ? 2 * chunk * F : 0);
    m.grad_up = take(&team_at, 2 * chunk * F);
    m.right = take(&team_at, 4 * (num_in * right_words(F, chunk) + right_words(D, chunk)));
    m.sums = take(&team_at, most > CHUNK ? 4 * (num_in + 1) * D * F : 0);
    const int64_t of_rows = left_words(BLOCK, num_in * 2 * ceil_div(wide, 2)), of_gradients = left_words(BLOCK, chunk);
    m.left = take(&thread_at, 4 * (of_rows > of_gradients ? of_rows : of_gradients));
    *team_bytes = team_at - team_start;
    *thread_bytes = thread_at - thread_start;
    return m;
}

/* Where the gradients of a tile of hidden states come from and go to, at its first row and column. */
struct hidden_tile {
    const bf16 *gate_pre, *up_pre;
    const float *weight;
    bf16 *hidden, *grad_gate, *grad_up;
    float *grad_weight;
};

/* From gradients of hidden states without the rows' weights: hidden states times weights, gradients of pre-activations,
 * and this tile's part of the weights' own gradients. */
static void hide_backward(const struct job *job, int64_t num_rows, const tile grad_hidden, int64_t width,
                          const struct hidden_tile *at) {
    const int64_t F = job->hidden;
    const bf16 *acted_on = job->is_gated ? at->gate_pre : at->up_pre;
    tile pre, value, slope;
    for (int64_t m = 0; m < num_rows; m++)
        for (int64_t c = 0; c < COLUMNS; c += 16)
            _mm512_storeu_ps(pre[m] + c, widen(acted_on + m * F + c, first_lanes(width - c)));
    activate(job->activation, num_rows * COLUMNS, pre[0], value[0], slope[0]);
    for (int64_t m = 0; m < num_rows; m++)
        for (int64_t c = 0; c < COLUMNS && c < width; c += 16) {
            const __mmask16 lanes = first_lanes(width - c);
            const int64_t here = m * F + c;
            const __m512 act = _mm512_loadu_ps(value[m] + c), act_slope = _mm512_loadu_ps(slope[m] + c);
            const __m512 grad = _mm512_loadu_ps(grad_hidden[m] + c), weight = _mm512_set1_ps(at->weight[m]);
            const __m512 weighed = _mm512_mul_ps(grad, weight);
            __m512 hidden = act;
            if (job->is_gated) {
                const __m512 up = widen(at->up_pre + here, lanes);
                hidden = _mm512_mul_ps(act, up);
                narrow(at->grad_gate + here, lanes, _mm512_mul_ps(weighed, _mm512_mul_ps(up, act_slope)));
                narrow(at->grad_up + here, lanes, _mm512_mul_ps(weighed, act));
            } else {
                narrow(at->grad_up + here, lanes, _mm512_mul_ps(weighed, act_slope));
            }
            at->grad_weight[m] += _mm512_mask_reduce_add_ps(lanes, _mm512_mul_ps(grad, hidden));
            narrow(at->hidden + here, lanes, _mm512_mul_ps(hidden, weight));
        }
}

/* Gradients of hidden states and of inputs, of the rows of a chunk that are this rank's. */
static void backward_rows(const struct job *job, const struct team *team, int64_t first, int64_t count,
                          const struct backward_memory *memory) {
    const int64_t D = job->width, F = job->hidden, pairs_D = ceil_div(D, 2), pairs_F = ceil_div(F, 2);
    const int64_t pairs_in = (job->is_gated ? 2 : 1) * pairs_F;
    const struct rows grad_y = {job->grad_y, job->grad_y_row, job->token + first};
    const struct rows grad_gate = {memory->grad_gate, F, NULL}, grad_up = {memory->grad_up, F, NULL};
    int64_t from, to;
    share(team, count, ROWS, &from, &to);
    for (int64_t block = from; block < to; block += BLOCK) {
        const int64_t size = at_most(BLOCK, to - block);
        tile sums;
        pack_left(&grad_y, block, size, D, memory->left, ROWS * pairs_D);
        memset(job->grad_weight + first + block, 0, (size_t)size * sizeof(float));
        for (int64_t f = 0; f < F; f += COLUMNS)
            for (int64_t m = 0; m < size; m += ROWS) {
                const int64_t num_rows = at_most(ROWS, size - m), row = block + m, pre = (first + row) * F + f;
                product(num_rows, pairs_D, memory->left + m * pairs_D, memory->down + f * pairs_D, sums);
                const struct hidden_tile at = {
                    .gate_pre = job->is_gated ? job->gate_pre + pre : NULL,
                    .up_pre = job->up_pre + pre,
                    .weight = job->weight + first + row,
                    .hidden = memory->hidden + row * F + f,
                    .grad_gate = memory->grad_gate + row * F + f,
                    .grad_up = memory->grad_up + row * F + f,
                    .grad_weight = job->grad_weight + first + row,
                };
                hide_backward(job, num_rows, sums, F - f, &at);
            }
        if (!job->wants_x) continue;
        /* Gate's and up's follow each other along K: one product adds up what comes back through both. */
        const int64_t up_at = job->is_gated ? ROWS * pairs_F : 0;
        if (job->is_gated) pack_left(&grad_gate, block, size, F, memory->left, ROWS * pairs_in);
        pack_left(&grad_up, block, size, F, memory->left + up_at, ROWS * pairs_in);
        for (int64_t d = 0; d < D; d += COLUMNS)
            for (int64_t m = 0; m < size; m += ROWS) {
                const int64_t num_rows = at_most(ROWS, size - m);
                product(num_rows, pairs_in, memory->left + m * pairs_in, memory->in + d * pairs_in, sums);
                store_rows(num_rows, sums, job->rows + (first + block + m) * D + d, D, D - d);
            }
    }
}

/* The first or a later of the chunks of rows that an expert's gradients are summed over; the last is written out. */
struct chunk {
    int64_t first, count;
    int is_first, is_last;
};

/* The gradient left^T right of one matrix: M of its rows from `start` on, all N columns, over the rows of a chunk. */
static void weight_gradient(const struct chunk *chunk, const uint32_t *left, int64_t start, int64_t M,
                            const uint32_t *right, int64_t N, bf16 *out, int64_t out_row, float *sums_so_far) {
    const int64_t num_pairs = ceil_div(chunk->count, 2);
    tile sums;
    for (int64_t n = 0; n < N; n += COLUMNS)
        for (int64_t m = 0; m < M; m += ROWS) {
            const int64_t num_rows = at_most(ROWS, M - m), width = at_most(COLUMNS, N - n);
            product(num_rows, num_pairs, left + m * num_pairs, right + n * num_pairs, sums);
            for (int64_t i = 0; i < num_rows && !(chunk->is_first && chunk->is_last); i++) {
                float *before = sums_so_far + (start + m + i) * N + n;
                for (int64_t c = 0; c < width; c++) {
                    if (!chunk->is_first) sums[i][c] += before[c];
                    before[c] = sums[i][c];
                }
            }
            if (chunk->is_last) store_rows(num_rows, sums, out + (start + m) * out_row + n, out_row, width);
        }
}

/* A product that gives gradients of weights: the transposed left rows times one or two sets of right ones. */
struct outer {
    struct rows left;
    int64_t M;
    int64_t num_right, N;
    const uint32_t *right[2];
    bf16 *out[2];
    int64_t out_row[2];
    float *sums[2];
};

static void outer_product(const struct team *team, const struct chunk *chunk, const struct outer *outer, uint32_t *left) {
    int64_t from, to;
    share(team, outer->M, ROWS, &from, &to);
    /* As many rows at once as stay in the second cache beside a panel. */
    int64_t block = at_most(BLOCK, 65536 / ceil_div(chunk->count, 2) / ROWS * ROWS);
    if (block < ROWS) block = ROWS;
    for (int64_t m = from; m < to; m += block) {
        const int64_t size = at_most(block, to - m);
        pack_left_transposed(&outer->left, 0, chunk->count, m, size, left);
        for (int64_t i = 0; i < outer->num_right; i++)
            if (outer->out[i])
                weight_gradient(chunk, left, m, size, outer->right[i], outer->N, outer->out[i], outer->out_row[i],
                                outer->sums[i]);
    }
}

static void pack_right(const struct team *team, const struct rows *rows, int64_t K, int64_t N, uint32_t *to) {
    for (int64_t n = 16 * team->rank; n < ceil_div(N, COLUMNS) * COLUMNS; n += 16 * team->size)
        pack_right_half(rows, 0, K, n, N - n < 16 ? N - n : 16, to + n / COLUMNS * COLUMNS * ceil_div(K, 2) + n % COLUMNS);
}

static inline bf16 *matrix_of(const struct stack *stack, int64_t e) {
    return stack->data ? (bf16 *)stack->data + e * stack->matrix : NULL;
}

/* Gradients of one expert's weights, written as they lie: where a matrix lies transposed, so does its product. */
static void backward_weights(const struct job *job, const struct team *team, int64_t e, const struct chunk *chunk,
                             const struct backward_memory *memory) {
    const int64_t D = job->width, F = job->hidden, K = chunk->count;
    const struct rows x = {job->x, job->x_row, job->token + chunk->first};
    const struct rows grad_y = {job->grad_y, job->grad_y_row, job->token + chunk->first};
    const struct rows hidden = {memory->hidden, F, NULL};
    const struct rows grad_gate = {memory->grad_gate, F, NULL}, grad_up = {memory->grad_up, F, NULL};
    const int in_lies_straight = job->up.column == 1, down_lies_straight = job->down.column == 1;
    uint32_t *const right = memory->right, *const right_up = right + (job->is_gated ? right_words(F, K) : 0);
    bf16 *gate_out = job->is_gated ? matrix_of(&job->grad_gate, e) : NULL, *up_out = matrix_of(&job->grad_up, e);
    bf16 *down_out = matrix_of(&job->grad_down, e);
    float *up_sums = memory->sums, *down_sums = up_sums + D * F, *gate_sums = down_sums + D * F;
    wait(team);
    if (down_out) {
        pack_right(team, down_lies_straight ? &grad_y : &hidden, K, down_lies_straight ? D : F, right);
        wait(team);
        const struct outer outer = {
            .left = down_lies_straight ? hidden : grad_y,
            .M = down_lies_straight ? F : D,
            .num_right = 1,
            .N = down_lies_straight ? D : F,
            .right = {right},
            .out = {down_out},
            .out_row = {down_lies_straight ? job->grad_down.row : job->grad_down.column},
            .sums = {down_sums},
        };
        outer_product(team, chunk, &outer, memory->left);
        wait(team);
    }
    if (!gate_out && !up_out) return;
    if (in_lies_straight) {
        if (gate_out) pack_right(team, &grad_gate, K, F, right);
        if (up_out) pack_right(team, &grad_up, K, F, right_up);
        wait(team);
        const struct outer outer = {
            .left = x,
            .M = D,
            .num_right = 2,
            .N = F,
            .right = {right, right_up},
            .out = {gate_out, up_out},
            .out_row = {job->grad_gate.row, job->grad_up.row},
            .sums = {gate_sums, up_sums},
        };
        outer_product(team, chunk, &outer, memory->left);
    } else {
        pack_right(team, &x, K, D, right);
        wait(team);
        for (int is_up = 0; is_up < 2; is_up++) {
            if (!(is_up ? up_out : gate_out)) continue;
            const struct outer outer = {
                .left = is_up ? grad_up : grad_gate,
                .M = F,
                .num_right = 1,
                .N = D,
                .right = {right},
                .out = {is_up ? up_out : gate_out},
                .out_row = {is_up ? job->grad_up.column : job->grad_gate.column},
                .sums = {is_up ? up_sums : gate_sums},
            };
            outer_product(team, chunk, &outer, memory->left);
        }
    }
    wait(team);
}

static int64_t most_rows(const struct job *job) {
    int64_t most = 0;
    for (int64_t e = 0, start = 0; e < job->num_experts; start = job->end[e++])
        if (job->end[e] - start > most) most = job->end[e] - start;
    return most;
}

static void backward_expert(const struct job *job, const struct team *team, int64_t e, char *team_at, char *thread_at) {
    const int64_t D = job->width, F = job->hidden, start = e ? job->end[e - 1] : 0, end = job->end[e];
    const int64_t pairs_F = ceil_div(F, 2), pairs_in = (job->is_gated ? 2 : 1) * pairs_F;
    int64_t team_bytes, thread_bytes;
    const struct backward_memory memory =
        backward_memory(job, most_rows(job), team_at, thread_at, &team_bytes, &thread_bytes);
    /* Transposed: what is up's row in memory is its column here. */
    const struct stack down = {job->down.data, job->down.matrix, job->down.column, job->down.row};
    const struct stack gate = {job->gate.data, job->gate.matrix, job->gate.column, job->gate.row};
    const struct stack up = {job->up.data, job->up.matrix, job->up.column, job->up.row};
    pack_stack(team, &down, e, D, F, memory.down, COLUMNS * ceil_div(D, 2));
    if (job->wants_x) {
        const int64_t up_at = job->is_gated ? COLUMNS * pairs_F : 0;
        if (job->is_gated) pack_stack(team, &gate, e, F, D, memory.in, COLUMNS * pairs_in);
        pack_stack(team, &up, e, F, D, memory.in + up_at, COLUMNS * pairs_in);
    }
    wait(team);
    for (int64_t first = start; first < end; first += CHUNK) {
        const struct chunk chunk = {first, at_most(CHUNK, end - first), first == start, first + CHUNK >= end};
        backward_rows(job, team, chunk.first, chunk.count, &memory);
        backward_weights(job, team, e, &chunk, &memory);
    }
    wait(team);
}

static void forget(const struct stack *gradient, int64_t e, int64_t num_rows, int64_t num_columns) {
    bf16 *matrix = matrix_of(gradient, e);
    const int64_t outer = gradient->column == 1 ? num_rows : num_columns;
    const int64_t inner = gradient->column == 1 ? num_columns : num_rows;
    const int64_t step = gradient->column == 1 ? gradient->row : gradient->column;
    for (int64_t i = 0; matrix && i < outer; i++) memset(matrix + i * step, 0, (size_t)inner * sizeof(bf16));
}

/* Each token's sum of its rows, in float32, in the order of experts; weighed in the forward. */
static void add_up(const struct job *job, int is_forward, const int64_t *begin, const int64_t *row_of) {
    const int64_t D = job->width;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < job->num_tokens; t++)
        for (int64_t d = 0; d < D; d += 64) {
            __m512 sum[4];
            for (int i = 0; i < 4; i++) sum[i] = _mm512_setzero_ps();
            for (int64_t at = begin[t]; at < begin[t + 1]; at++) {
                const bf16 *row = job->rows + row_of[at] * D + d;
                const __m512 weight = _mm512_set1_ps(is_forward ? job->weight[row_of[at]] : 1.0f);
                for (int i = 0; i < 4; i++)
                    sum[i] = _mm512_fmadd_ps(weight, widen(row + 16 * i, first_lanes(D - d - 16 * i)), sum[i]);
            }
            for (int i = 0; i < 4; i++) narrow((bf16 *)job->y + t * D + d + 16 * i, first_lanes(D - d - 16 * i), sum[i]);
        }
}

/* Bytes of scratch memory: of the team of all, of each thread as a team of its own, and for sorting rows by token. */
static int64_t scratch_bytes(const struct job *job, int is_forward, int64_t *team_bytes, int64_t *thread_bytes) {
    if (is_forward) {
        const int64_t D = job->width, F = job->hidden;
        *team_bytes = 64 * ceil_div(4 * right_words((job->is_gated ? 2 : 1) * ceil_div(F, 16) * 16, D), 64) +
                      64 * ceil_div(4 * right_words(D, F), 64);
        *thread_bytes = 64 * ceil_div(4 * left_words(BLOCK, D > F ? D : F), 64) + 64 * ceil_div(2 * BLOCK * F, 64);
    } else {
        backward_memory(job, most_rows(job), NULL, NULL, team_bytes, thread_bytes);
    }
    const int64_t num_rows = job->num_experts ? job->end[job->num_experts - 1] : 0;
    return job->num_threads * (*team_bytes + *thread_bytes) + 8 * (job->num_tokens + 2 + num_rows) + 64;
}

int64_t moesaic_scratch_bytes(const struct job *job, int is_forward) {
    int64_t team_bytes, thread_bytes;
    return scratch_bytes(job, is_forward, &team_bytes, &thread_bytes);
}

void moesaic_grouped(const struct job *job, int is_forward) {
    int64_t team_bytes, thread_bytes, next = job->num_together, num_ranks = 0;
    scratch_bytes(job, is_forward, &team_bytes, &thread_bytes);
    char *scratch = (char *)(((uintptr_t)job->scratch + 63) / 64 * 64);
    int64_t *begin = (int64_t *)(scratch + job->num_threads * (team_bytes + thread_bytes));
    int64_t *row_of = begin + job->num_tokens + 2;
    const int64_t num_rows = job->num_experts ? job->end[job->num_experts - 1] : 0;
    /* Rows by token: a count, one place late, becomes where each token begins, and then where it ends. */
    memset(begin, 0, (size_t)(job->num_tokens + 2) * sizeof *begin);
    for (int64_t i = 0; i < num_rows; i++) begin[job->token[i] + 2]++;
    for (int64_t t = 0; t < job->num_tokens; t++) begin[t + 2] += begin[t + 1];
    for (int64_t i = 0; i < num_rows; i++) row_of[begin[job->token[i] + 1]++] = i;
#pragma omp parallel num_threads(job->num_threads)
    {
        struct team all, alone = {0, 1};
#pragma omp atomic capture
        all.rank = num_ranks++;
#pragma omp barrier
        all.size = num_ranks;
        char *own_team = scratch + all.rank * (team_bytes + thread_bytes), *own_thread = own_team + team_bytes;
        for (int64_t i = 0; i < job->num_together; i++) {
            if (is_forward)
                forward_expert(job, &all, job->order[i], scratch, own_thread);
            else
                backward_expert(job, &all, job->order[i], scratch, own_thread);
        }
#pragma omp barrier
        for (;;) {
            int64_t i;
#pragma omp atomic capture
            i = next++;
            if (i >= job->num_order) break;
            if (is_forward)
                forward_expert(job, &alone, job->order[i], own_team, own_thread);
            else
                backward_expert(job, &alone, job->order[i], own_team, own_thread);
        }
        if (!is_forward) {
#pragma omp for schedule(static)
            for (int64_t e = 0; e < job->num_experts; e++) {
                if (job->end[e] > (e ? job->end[e - 1] : 0)) continue;
                if (job->is_gated) forget(&job->grad_gate, e, job->width, job->hidden);
                forget(&job->grad_up, e, job->width, job->hidden);
                forget(&job->grad_down, e, job->hidden, job->width);
            }
        }
#pragma omp barrier
        if (is_forward || job->wants_x) add_up(job, is_forward, begin, row_of);
    }
}

int moesaic_has_products(void) { return 1; }
#else
#include "job.h"

int moesaic_has_products(void) { return 0; }
#endif

int64_t moesaic_job_bytes(void) { return sizeof(struct job); }

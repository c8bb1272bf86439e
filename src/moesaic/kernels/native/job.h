/* What Python hands over: sizes, where tensors lie, and which rows are whose. Mirrored field by field in build.py. */
#ifndef MOESAIC_JOB_H
#define MOESAIC_JOB_H

#include <stdint.h>

typedef uint16_t bf16;

/* A stack of E matrices. Element (e, i, j) lies at data + e * matrix + i * row + j * column; row or column is 1. */
struct stack {
    void *data;
    int64_t matrix, row, column;
};

struct job {
    int64_t num_experts, num_tokens, width, hidden; /* E, T, D, F */
    int32_t activation, is_gated, num_threads, is_bf16;
    const void *x; /* (T, D), rows x_row apart */
    int64_t x_row;
    const int64_t *token; /* of each row, rows sorted by expert */
    const int64_t *end;   /* (E,): where each expert's rows end */
    const float *weight;  /* of each row */
    struct stack gate, up, down; /* (E, D, F), (E, D, F), (E, F, D) */
    void *y;                     /* (T, D), side by side: the output; in the backward, the gradient of x */
    /* Only for many rows. */
    const int64_t *order; /* experts with rows, the first num_together by all threads together, then one by one */
    int64_t num_order, num_together;
    void *gate_pre, *up_pre; /* (N, F) pre-activations, kept for the backward; NULL if none is to come */
    void *rows;              /* (N, D): outputs, or gradients of inputs, of each row */
    char *scratch;           /* as many bytes as asked for */
    /* Only for the backward. */
    const void *grad_y; /* (T, D), rows grad_y_row apart */
    int64_t grad_y_row;
    float *grad_weight;                         /* (N,) */
    struct stack grad_gate, grad_up, grad_down; /* data NULL where not wanted */
    int32_t wants_x, padding;
};

#endif

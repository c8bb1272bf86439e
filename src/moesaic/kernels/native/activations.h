/* The non-linearities of experts and their derivatives, in float, written so that compilers turn loops over them into
 * vector code: no branches, no calls. The numbers are those of moesaic/kernels/activations.py. */
#ifndef MOESAIC_ACTIVATIONS_H
#define MOESAIC_ACTIVATIONS_H

#include <stdint.h>
#include <string.h>

enum activation { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED };

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* e^x to two units in the last place: 2^n times a polynomial of what is left. NaN stays NaN. */
static inline float exp_f(float x) {
    const float magic = 0x1.8p23f; /* adding it rounds to a whole number, which then stands in the lowest bits */
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

static inline float sigmoid_f(float x) { return 1.0f / (1.0f + exp_f(-x)); }

static inline float tanh_f(float x) { return 1.0f - 2.0f / (exp_f(2.0f * x) + 1.0f); }

/* The normal distribution function, within 1e-7: Abramowitz and Stegun, 7.1.26. */
static inline float normal_cdf_f(float x) {
    const float z = (x < 0 ? -x : x) * 0.70710678f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = 0.5f * p * t * exp_f(-z * z);
    return x < 0 ? tail : 1.0f - tail;
}

static inline __attribute__((always_inline)) void act_each(enum activation act, int64_t n, const float *restrict x,
                                                           float *restrict value, float *restrict slope) {
    for (int64_t i = 0; i < n; i++) {
        const float x_i = x[i];
        if (act == SILU) {
            const float s = sigmoid_f(x_i);
            value[i] = x_i * s;
            if (slope) slope[i] = s * (1.0f + x_i * (1.0f - s));
        } else if (act == GELU) {
            const float p = normal_cdf_f(x_i);
            value[i] = x_i * p;
            if (slope) slope[i] = p + x_i * 0.39894228f * exp_f(-0.5f * x_i * x_i);
        } else if (act == GELU_TANH) {
            const float t = tanh_f(0.79788456f * (x_i + 0.044715f * x_i * x_i * x_i));
            const float half = 0.5f * (1.0f + t);
            value[i] = x_i * half;
            if (slope)
                slope[i] = half + 0.5f * x_i * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * x_i * x_i);
        } else {
            const float positive = x_i < 0 ? 0.0f : x_i; /* and NaN stays NaN */
            value[i] = act == RELU ? positive : positive * positive;
            if (slope) slope[i] = act == RELU ? (x_i > 0 ? 1.0f : 0.0f) : 2.0f * positive;
        }
    }
}

/* The activation of n numbers, and its derivative there unless slope is NULL. */
static void activate(enum activation act, int64_t n, const float *x, float *value, float *slope) {
    switch (act) {
    case SILU: act_each(SILU, n, x, value, slope); break;
    case GELU: act_each(GELU, n, x, value, slope); break;
    case GELU_TANH: act_each(GELU_TANH, n, x, value, slope); break;
    case RELU: act_each(RELU, n, x, value, slope); break;
    case RELU_SQUARED: act_each(RELU_SQUARED, n, x, value, slope); break;
    }
}

#endif

"""The activations of experts and their derivatives, as Triton knows them; float32 in, float32 out."""

import triton
import triton.language as tl


@triton.jit
def activated(x, NAME: tl.constexpr):
    """The activation of that name."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "relu":
        y = tl.where(x <= 0, 0.0, x)
    else:
        tl.static_assert(NAME == "relu_squared")
        y = tl.where(x <= 0, 0.0, x * x)
    return y


@triton.jit
def derivative(x, NAME: tl.constexpr):
    """Its derivative; 0 at the corner of relu, as autograd has it."""
    if NAME == "silu":
        share = tl.sigmoid(x)
        y = share * (1 + x * (1 - share))
    elif NAME == "gelu":
        y = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        bent = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        slope = 0.7978845608028654 * (1 + 0.134145 * x * x)
        y = 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * slope
    elif NAME == "relu":
        y = tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(NAME == "relu_squared")
        y = tl.where(x <= 0, 0.0, 2 * x)
    return y


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def hidden_of(gate, up, NAME: tl.constexpr, GATED: tl.constexpr):
    """The hidden rows of pre-activations; ``gate`` is not read where there is none."""
    if GATED:
        hidden = activated(gate, NAME) * up
    else:
        hidden = activated(up, NAME)
    return hidden


@triton.jit
def gradients_of(grad, gate, up, NAME: tl.constexpr, GATED: tl.constexpr):
    """The gradients of both pre-activations, from that of the hidden rows; without a gate, the second is up's twice."""
    if GATED:
        grad_up = grad * activated(gate, NAME)
        grad_gate = grad * up * derivative(gate, NAME)
    else:
        grad_up = grad * derivative(up, NAME)
        grad_gate = grad_up
    return grad_gate, grad_up

"""LLaMA-MoE, 2024: a dense model's networks cut into experts, under a noisy gate with a hidden layer."""

from __future__ import annotations

from typing import Literal, cast

from moesaic.balance import LossTerm, importance_cv2, load_cv2
from moesaic.core.init import normal, zeros
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn, gate_drawn
from moesaic.routers import NoisyTopKRouter


def llama_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 16,
    top_k: int = 4,
    scale: float | None = None,
    gate_network: str = "mlp",
    noise_epsilon: float = 0.01,
    activation: str = "silu",
    init_std: float | None = None,
    gate_init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Noisy top-k with a small gate network, SwiGLU experts that are slices of a dense one, weights scaled up.

    Args:
        width: D.
        hidden: F, of one expert: the dense width over E.
        num_experts: E, 16 or 8 in the released models.
        top_k: K, 4 or 2 of 16, or 2 of 8.
        scale: what a token's weights add up to; None for E / K, which makes up for the slices that are left out.
        gate_network: "mlp" or "linear".
        noise_epsilon: least standard deviation of the noise.
        activation: of the experts' gates.
        init_std: of gate and experts (which conversion replaces), 0.02 unless given.
        gate_init_std: of the gate and of the map to the noise's width; None draws the gate as the experts and starts
            the noise's map at 0.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    router = NoisyTopKRouter(
        width,
        num_experts,
        top_k=top_k,
        noise_epsilon=noise_epsilon,
        gate=cast("Literal['linear', 'mlp']", gate_network),
        scale=num_experts / top_k if scale is None else scale,
        init=gate_drawn(gate_init_std, init),
        noise_init=gate_drawn(gate_init_std, zeros),
    )
    act = activation_named(activation)
    return MoELayer(router, GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init))


LLAMA_MOE = Recipe(
    name="llama-moe",
    year=2024,
    summary="slices of a dense SwiGLU network as experts, a noisy gate with a hidden layer, weights times E / K",
    citation="Zhu et al. LLaMA-MoE: Building Mixture-of-Experts from LLaMA. EMNLP 2024. arXiv:2406.16554",
    router="the four best of logits with learned noise, a softmax over the four, scaled by E / K",
    formula="""\
z = V tanh(W x);  H = z + noise * (softplus(x W_noise) + noise_epsilon);  in evaluation H = z
S = the K largest of H;  w = scale * softmax(H over S);  y = sum_{e in S} w_e SwiGLU_e(x)
P(x, e) = Phi((z - the K-th largest H of the others)_e / (softplus(x W_noise) + noise_epsilon)_e)
loss = 0.01 * CV(sum_x w)^2 + 0.01 * CV(sum_x P(x))^2""",
    sources={
        "num_experts": "authors' code, num_experts",
        "top_k": "authors' code, num_selects",
        "scale": "authors' documentation, score_scale_factor",
        "gate_network": "authors' code, gate_network",
        "noise_epsilon": "authors' code, gate_noise_epsilon",
        "activation": "LLaMA",
        "init_std": "authors' code, initializer_range",
        "gate_init_std": "authors' code: initializer_range for the gate, zeros for the noise",
    },
    differences=(
        "The authors' code asks whether the noise alone, not the noisy logit, is above the threshold when it estimates "
        "the load; this asks for the noisy logit, as Shazeer 2017. Its variances are those of a sample, E / (E - 1) "
        "times ours. Its default scale is 1, its documentation and released models have E / K."
    ),
    build=llama_moe_layer,
    balance=(
        LossTerm(name="importance", loss=importance_cv2, coefficient=1e-2),
        LossTerm(name="load", loss=load_cv2, coefficient=1e-2),
    ),
)

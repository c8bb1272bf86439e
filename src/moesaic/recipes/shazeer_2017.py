"""Sparsely-gated mixture of experts, 2017: noisy top-k gates, and two losses on what they spread."""

from __future__ import annotations

from moesaic.balance import LossTerm, importance_cv2, load_cv2
from moesaic.core.init import scaled_by_fan_in, zeros
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn, gate_drawn
from moesaic.routers import NoisyTopKRouter


def shazeer_2017_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 256,
    top_k: int = 4,
    noise_epsilon: float = 0.0,
    activation: str = "relu",
    init_std: float | None = None,
    gate_init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Noisy logits, the K best, a softmax over those; plain ReLU experts, none of them ever full.

    Args:
        width: D, 512 in the paper's language models.
        hidden: F, 1024 there.
        num_experts: E, 4 to 256 in the flat models of table 7.
        top_k: K.
        noise_epsilon: least standard deviation of the noise; 0.01 in the authors' tensor2tensor.
        activation: of the experts.
        init_std: of the experts; None draws them with variance 1 / fan-in.
        gate_init_std: of the gates and of the maps to the noise's width; None starts them at 0, so that noise alone
            decides at first.
        kernel: of the experts.
    """
    gate, init = gate_drawn(gate_init_std, zeros), drawn(init_std, scaled_by_fan_in())
    router = NoisyTopKRouter(width, num_experts, top_k=top_k, noise_epsilon=noise_epsilon, init=gate, noise_init=gate)
    experts = MLPExperts(num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init)
    return MoELayer(router, experts)


SHAZEER_2017 = Recipe(
    name="shazeer-2017",
    year=2017,
    summary="noisy top-k gates that start at zero; importance and smooth load kept even",
    citation="Shazeer et al. Outrageously Large Neural Networks. ICLR 2017. arXiv:1701.06538",
    router="the four best of logits with learned noise, a softmax over the four",
    formula="""\
H = x W_g + noise * (softplus(x W_noise) + noise_epsilon);  in evaluation H = x W_g
S = the K largest of H;  w = softmax(H over S);  y = sum_{e in S} w_e FFN_e(x)
P(x, e) = Phi((x W_g - the K-th largest H of the others)_e / softplus(x W_noise)_e)
loss = 0.1 * CV(sum_x w)^2 + 0.1 * CV(sum_x P(x))^2""",
    sources={
        "num_experts": "table 7, MoE-256",
        "top_k": "appendix C.1",
        "noise_epsilon": "equation 4; 0.01 in tensor2tensor, expert_utils.noisy_top_k_gating",
        "activation": "appendix C.1",
        "init_std": "the paper does not say",
        "gate_init_std": "appendix A",
    },
    differences=(
        "tensor2tensor adds 0.01 to the noise's width, and 1e-10 to the squared mean under the variance; this follows "
        "the paper, and divides by the mean alone. Variances are those of a population, as in tensor2tensor; ports to "
        "torch often take the sample's, E / (E - 1) times as large. In the paper's language models the layer's output "
        "passes a sigmoid and dropout, and a residual connection: that is the model's, not the layer's. Its "
        "translation models have coefficients of 0.01."
    ),
    build=shazeer_2017_layer,
    balance=(
        LossTerm(name="importance", loss=importance_cv2, coefficient=0.1),
        LossTerm(name="load", loss=load_cv2, coefficient=0.1),
    ),
)

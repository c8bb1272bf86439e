"""OLMoE, 2024: open in every part; many small experts, none of them shared."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss, z_loss
from moesaic.core.init import truncated_normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def olmoe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 64,
    top_k: int = 8,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Raw softmax scores as weights, SwiGLU experts, dropless.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: K.
        activation: of the experts' gates.
        init_std: 0.02 cut off at three standard deviations unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, truncated_normal(0.02, deviations=3))
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="scores", init=init)
    experts = GatedExperts(
        num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init
    )
    return MoELayer(router, experts)


OLMOE = Recipe(
    name="olmoe",
    year=2024,
    summary="eight of 64 small experts by raw softmax scores, none shared; balance and z-loss",
    citation="Muennighoff et al. OLMoE: Open Mixture-of-Experts Language Models. ICLR 2025. arXiv:2409.02060",
    router="the eight best experts of a softmax, weighted by their scores as they are",
    formula="""\
p = softmax(W x);  S = the K largest of p
y = sum_{e in S} p_e SwiGLU_e(x)
loss = 0.01 * E * sum_e f_e P_e + 0.001 * mean_t logsumexp(W x_t)^2""",
    sources={
        "num_experts": "table 1",
        "top_k": "table 1",
        "activation": "table 1",
        "init_std": "released training configuration",
    },
    differences=(
        "Trained with MegaBlocks, whose loss is 1 at balance for every K, as ours, but averages over layers where this "
        "adds them up. transformers' is K at balance and pools layers before it multiplies; it has no z-loss."
    ),
    build=olmoe_layer,
    balance=(
        LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),
        LossTerm(name="z", loss=z_loss, coefficient=1e-3),
    ),
)

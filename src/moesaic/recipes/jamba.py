"""Jamba, 2024: Mixtral's experts between Mamba and attention layers, weighted by raw scores."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def jamba_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 16,
    top_k: int = 2,
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
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="scores", init=init)
    experts = GatedExperts(
        num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init
    )
    return MoELayer(router, experts)


JAMBA = Recipe(
    name="jamba",
    year=2024,
    summary="two of 16 SwiGLU experts in every other layer, weighted by raw softmax scores; dropless",
    citation="Lieber et al. Jamba: A Hybrid Transformer-Mamba Language Model. 2024. arXiv:2403.19887",
    router="the two best experts of a softmax, weighted by their scores as they are",
    formula="""\
p = softmax(W x);  S = the K largest of p
y = sum_{e in S} p_e SwiGLU_e(x)
loss = 0.002 * E * sum_e f_e P_e over all K choices, per layer""",
    sources={
        "num_experts": "section 3.1",
        "top_k": "section 3.1",
        "activation": "section 2",
        "init_std": "transformers",
    },
    differences=(
        "The paper does not say how scores become weights; the released code, in transformers, does not renormalise "
        "them. Nor does it give a coefficient: transformers' is 0.001 for a loss that is K = 2 at balance and pools "
        "all layers before it multiplies, so 0.002 here, for each of L layers: L times the pull of the pooled loss."
    ),
    build=jamba_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=2e-3),),
)

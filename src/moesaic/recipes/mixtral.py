"""Mixtral, 2023: two of eight SwiGLU experts in every layer, no token dropped."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def mixtral_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 8,
    top_k: int = 2,
    jitter: float = 0.0,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Softmax over the chosen logits, SwiGLU experts, dropless.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: K.
        jitter: ``router_jitter_noise`` of transformers, 0 there too; here only the router sees it.
        activation: of the experts' gates.
        init_std: 0.02 unless given, ``initializer_range`` of transformers' configuration.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="chosen", jitter=jitter, init=init)
    experts = GatedExperts(
        num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init
    )
    return MoELayer(router, experts)


MIXTRAL = Recipe(
    name="mixtral",
    year=2023,
    summary="two of eight SwiGLU experts, weights renormalised over the two; dropless",
    citation="Jiang et al. Mixtral of Experts. 2024. arXiv:2401.04088",
    router="the two best experts of a softmax, renormalised over the two",
    formula="""\
z = W x;  S = the K largest of z
w = softmax(z over S);  y = sum_{e in S} w_e SwiGLU_e(x)
loss = coefficient * E * sum_e f_e P_e over all K choices, per layer""",
    sources={
        "num_experts": "section 2.1, table 1",
        "top_k": "section 2.1, table 1",
        "jitter": "transformers",
        "activation": "section 2.1",
        "init_std": "transformers",
    },
    differences=(
        "transformers takes the softmax over all experts first and divides the chosen by their sum: the same "
        "numbers. Its loss counts all K choices without dividing by K (value K at balance) and pools all layers "
        "before it multiplies."
    ),
    build=mixtral_layer,
    # Mistral published no training recipe. The released 8x7B configuration has 0.02, for transformers' loss, which is K
    # at balance and pools all L layers before it multiplies: one layer feels 0.02 * K / L = 0.00125.
    # Ours is of that size.
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=2e-3),),
)

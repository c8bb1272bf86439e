"""Yuan 2.0-M32, 2024: a router that lets experts attend to each other."""

from __future__ import annotations

from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import AttentionRouter


def attention_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 32,
    top_k: int = 2,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Queries, keys and values of experts, one number each, from the token; the best two of the attention's output.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: experts per token.
        activation: of the experts' gates.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    router = AttentionRouter(width, num_experts, top_k=top_k, init=init)
    act = activation_named(activation)
    return MoELayer(router, GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init))


ATTENTION = Recipe(
    name="attention",
    year=2024,
    summary="scores come from attention among experts, so that they are not independent; no balance loss",
    citation=("Wu et al. Yuan 2.0-M32: Mixture of Experts with Attention Router. 2024. arXiv:2405.17976"),
    router="the best two of an attention over experts, softmax over these",
    formula="""\
q = Wq x, k = Wk x, v = Wv x, one number for each expert
P = softmax(q k^T) v, softmax over keys, no scaling
S = the K largest of P;  w = softmax over S of P;  y = sum_{e in S} w_e SwiGLU_e(x)""",
    sources={
        "num_experts": "paper",
        "top_k": "paper",
        "activation": "authors' inference code",
        "init_std": "not published; the common 0.02",
    },
    differences=(
        "The authors' inference code computes the softmax of each token's own outer product, as this does. Their "
        "training code views experts as positions of a sequence first. No balance loss is published."
    ),
    build=attention_layer,
)

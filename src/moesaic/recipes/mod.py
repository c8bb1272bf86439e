"""Mixture of depths, 2024: most tokens skip the layer."""

from __future__ import annotations

from moesaic.balance import LossTerm, depth_loss
from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import DepthRouter


def mod_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 1,
    capacity: float = 0.125,
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """The tokens that the router rates highest run through the layer; the others get exactly 0.

    Args:
        width: D.
        hidden: F.
        num_experts: E, 1 for the block's own network; more choose their tokens independently (MoDE).
        capacity: share of each sequence's tokens that an expert takes in training.
        activation: of the experts.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    router = DepthRouter(width, num_experts, capacity=capacity, init=init)
    act = activation_named(activation)
    experts = MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    return MoELayer(router, experts)


MOD = Recipe(
    name="mod",
    year=2024,
    summary="a layer runs for one token in eight of each sequence and is skipped by the others",
    citation="Raposo, Ritter, Richards, Lillicrap, Humphreys, Santoro. Mixture-of-Depths. 2024. arXiv:2404.02258",
    router="the best eighth of each sequence in training, every token rated above 0 in evaluation",
    formula="""\
r_te = w_e . x_t
training: S_e = the max(1, floor(capacity * n)) largest r_te of each sequence of n tokens;  evaluation: r_te > 0
y_t = sum_{e: t in S_e} r_te FFN_e(x_t), exactly 0 for a token that no expert takes
loss = 0.01 * mean_te BCE(sigmoid(r_te), t in S_e)""",
    sources={
        "num_experts": "section 3.3: the block's own network",
        "capacity": "section 4.1, 12.5 % of the sequence",
        "activation": "not published; that of the first GPT",
    },
    differences=(
        "The paper skips whole blocks, attention and feed-forward, every other one; this is the feed-forward part, and "
        "which blocks have it is up to the model. Of the paper's two ways to choose without later tokens this is the "
        "first, a loss on the router itself, whose coefficient the paper does not give. Evaluation may take more or "
        "fewer than the capacity. The weight is the router's output as it is: where it is negative, the layer's "
        "output is turned round."
    ),
    build=mod_layer,
    balance=(LossTerm(name="depth", loss=depth_loss, coefficient=0.01),),
    causality="in evaluation",
)

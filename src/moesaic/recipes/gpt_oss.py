"""gpt-oss, 2025: biases in router and experts, and gates that are cut off."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.init import normal
from moesaic.experts import BiasedExperts
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def gpt_oss_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 128,
    top_k: int = 4,
    alpha: float = 1.702,
    limit: float = 7.0,
    init_std: float | None = None,
) -> MoELayer:
    """Top-k of biased logits, softmax over the chosen, gated experts with biases and bounds; dropless.

    Args:
        width: D.
        hidden: F.
        num_experts: E, 128 in gpt-oss-120b and 32 in gpt-oss-20b.
        top_k: K.
        alpha: steepness of the gate's sigmoid.
        limit: where both branches of an expert are cut off.
        init_std: 0.02 unless given; biases start at 0.
    """
    init = drawn(init_std, normal(0.02))
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="logits", logit_bias=True, init=init)
    return MoELayer(router, BiasedExperts(num_experts, width, hidden, alpha=alpha, limit=limit, init=init))


GPT_OSS = Recipe(
    name="gpt-oss",
    year=2025,
    summary="four of 128 experts with biases and bounded gates, softmax over the chosen biased logits",
    citation="OpenAI. gpt-oss-120b & gpt-oss-20b Model Card. 2025. arXiv:2508.10925",
    router="the four largest logits, bias included; softmax over the four",
    formula="""\
z = W x + b;  S = the K largest of z;  w = softmax(z over S)
g = min(x gate_e + a_e, limit);  u = x up_e + b_e, between -limit and limit
y = sum_{e in S} w_e ((g sigmoid(alpha g) * (u + 1)) down_e + c_e)
loss = 0.004 * E * sum_e f_e P_e over all K choices, per layer""",
    sources={
        "num_experts": "released code, gpt_oss/torch/model.py",
        "top_k": "released code, gpt_oss/torch/model.py",
        "alpha": "released code, gpt_oss/torch/model.py",
        "limit": "released code, gpt_oss/torch/model.py",
        "init_std": "transformers; not published",
    },
    differences=(
        "Checkpoints store gate and up interleaved, column by column; here they are two weights. Only code for "
        "inference was released: the loss is transformers', 0.001 times K = 4 by its convention, for each layer and "
        "not pooled over all. transformers draws the router's bias; it starts at 0 here. The router runs in float32 "
        "here, in bfloat16 there."
    ),
    build=gpt_oss_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=4e-3),),
)

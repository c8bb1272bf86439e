"""Qwen1.5-MoE, 2024: fine-grained experts beside one wide shared expert with a gate."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def qwen1_5_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 60,
    top_k: int = 4,
    num_shared: int = 4,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Raw softmax scores as weights, and a shared expert times the sigmoid of one number per token.

    Args:
        width: D.
        hidden: F, of each routed expert.
        num_experts: routed experts.
        top_k: routed experts per token.
        num_shared: the shared expert is as wide as this many routed ones.
        activation: of the experts' gates.
        init_std: 0.02 unless given.
        kernel: of the routed experts.
    """
    if num_shared < 1:
        raise ConfigError(f"num_shared must be at least 1, got {num_shared}. Qwen1.5-MoE has 4; olmoe has none.")
    init = drawn(init_std, normal(0.02))
    act = activation_named(activation)
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="scores", init=init)
    experts = GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    shared = SharedExpert(width, num_shared * hidden, activation=act, token_gate=True, init=init)
    return MoELayer(router, experts, shared=shared)


QWEN1_5_MOE = Recipe(
    name="qwen1.5-moe",
    year=2024,
    summary="four of 60 small experts by raw softmax scores, beside a gated shared one; dropless",
    citation="Qwen Team. Qwen1.5-MoE: Matching 7B Model Performance with 1/3 Activated Parameters. Blog, March 2024.",
    router="the four best experts of a softmax, weighted by their scores as they are",
    formula="""\
s = softmax(W x);  S = the K largest of s
y = sum_{e in S} s_e SwiGLU_e(x) + sigmoid(v . x) * shared(x)
loss = 0.004 * E * sum_e f_e P_e over all K choices, per layer""",
    sources={
        "num_experts": "released configuration",
        "top_k": "released configuration",
        "num_shared": "released configuration, 5632 = 4 * 1408",
        "activation": "released configuration",
        "init_std": "released configuration",
    },
    differences=(
        "The released model was upcycled from Qwen-1.8B: its experts are shuffled parts of one network, half of them "
        "drawn anew; this builds the layer from fresh weights. transformers' loss counts all K choices without "
        "dividing by K (value K at balance) and pools all layers before it multiplies: its coefficient of 0.001 "
        "times K = 4 is the 0.004 here, for each of L layers, which is L times the pull of the pooled loss."
    ),
    build=qwen1_5_moe_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=4e-3),),
)

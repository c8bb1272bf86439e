"""Grok-1, 2024: two of eight GELU-gated experts, and a router that starts at zero."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.init import normal, zeros
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn, gate_drawn
from moesaic.routers import TopKRouter


def grok_1_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 8,
    top_k: int = 2,
    activation: str = "gelu_tanh",
    init_std: float | None = None,
    gate_init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Raw softmax scores as weights, GELU-gated experts, dropless.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: K.
        activation: of the experts' gates.
        init_std: of the experts, 0.02 unless given.
        gate_init_std: of the router; None starts it at zero, where every expert ties and the first ones are chosen.
        kernel: of the experts.
    """
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="scores", init=gate_drawn(gate_init_std, zeros))
    experts = GatedExperts(
        num_experts,
        width,
        hidden,
        activation=activation_named(activation),
        kernel=kernel,
        init=drawn(init_std, normal(0.02)),
    )
    return MoELayer(router, experts)


GROK_1 = Recipe(
    name="grok-1",
    year=2024,
    summary="two of eight GELU-gated experts by raw softmax scores; the router starts at zero",
    citation="xAI. Open Release of Grok-1. March 2024. github.com/xai-org/grok-1",
    router="the two best experts of a softmax, weighted by their scores as they are",
    formula="""\
p = softmax(W x), W = 0 at first;  S = the K largest of p
y = sum_{e in S} p_e (gelu(x gate_e) * (x up_e)) down_e
loss = 0.01 * E * sum_e f_e P_e over all K choices, per layer""",
    sources={
        "num_experts": "released code, run.py",
        "top_k": "released code, run.py",
        "activation": "released code, model.py: jax.nn.gelu is the tanh form",
        "init_std": "not published",
        "gate_init_std": "released code, model.py",
    },
    differences=(
        "Only code for inference was released: the loss, its coefficient and the experts' first weights are not "
        "published, and are Switch's and GPT-2's here. jax.nn.gelu is the tanh form, torch's the exact one unless told "
        "otherwise."
    ),
    build=grok_1_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),),
)

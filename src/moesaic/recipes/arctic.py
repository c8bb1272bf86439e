"""Snowflake Arctic, 2024: a dense network in parallel with two of 128 experts."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def arctic_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 128,
    top_k: int = 2,
    dense_hidden: int | None = None,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Two renormalised experts per token, and a dense gated network that every token visits.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: K.
        dense_hidden: hidden width of the dense network; None for the model's width, as published.
        activation: of the gates, also the dense network's.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    if dense_hidden is not None and dense_hidden < 1:
        raise ConfigError(f"dense_hidden must be at least 1, got {dense_hidden}. Leave it out for the model's width.")
    init = drawn(init_std, normal(0.02))
    act = activation_named(activation)
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="chosen", init=init)
    experts = GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    return MoELayer(router, experts, shared=SharedExpert(width, dense_hidden or width, activation=act, init=init))


ARCTIC = Recipe(
    name="arctic",
    year=2024,
    summary="two of 128 experts beside a dense network of the model's width in every layer",
    citation="Snowflake AI Research. Snowflake Arctic: The Best LLM for Enterprise AI. Blog, April 2024.",
    router="the two best experts of a softmax, renormalised over the two",
    formula="""\
p = softmax(W x);  S = the K largest of p;  w_e = p_e / sum_S p
y = sum_{e in S} w_e SwiGLU_e(x) + dense(x)
loss = 0.002 * E * sum_e f_e P_e over all K choices, per layer""",
    sources={
        "num_experts": "released configuration",
        "top_k": "released configuration",
        "dense_hidden": "released code: hidden_size",
        "activation": "released configuration",
        "init_std": "released configuration, initializer_range",
    },
    differences=(
        "In the released model the experts read the block's input before attention and the dense network what comes "
        "after it, each through a norm of its own; a layer has one input, and here both read it. Trained with "
        "DeepSpeed, whose top-2 draws the second expert with noise and may drop rows; its settings are not "
        "published, and this does neither, as the released code for one device. Its coefficient of 0.001 is for a "
        "loss per layer that is K = 2 at balance."
    ),
    build=arctic_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=2e-3),),
)

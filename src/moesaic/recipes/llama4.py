"""Llama 4, 2025: one expert per token, whose input is weighed, beside a shared one."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter, sigmoid


def llama4_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 16,
    top_k: int = 1,
    num_shared: int = 1,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """The largest logit chooses; its sigmoid multiplies what goes into the expert; a shared expert beside.

    Args:
        width: D.
        hidden: F, of each routed and of the shared expert.
        num_experts: E, 16 in Scout and 128 in Maverick.
        top_k: K; 1 as published, more works the same way.
        num_shared: experts that every token visits.
        activation: of the experts' gates.
        init_std: 0.02 unless given.
        kernel: of the routed experts.
    """
    if num_shared < 0:
        raise ConfigError(f"num_shared must be at least 0, got {num_shared}. Llama 4 has 1.")
    init = drawn(init_std, normal(0.02))
    act = activation_named(activation)
    router = TopKRouter(width, num_experts, top_k=top_k, score=sigmoid, normalize="scores", init=init)
    experts = GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, weigh="input", init=init)
    shared = SharedExpert(width, num_shared * hidden, activation=act, init=init) if num_shared else None
    return MoELayer(router, experts, shared=shared)


LLAMA4 = Recipe(
    name="llama4",
    year=2025,
    summary="one expert per token with its input times a sigmoid, beside a shared expert; dropless",
    citation="Meta AI. The Llama 4 Herd: The Beginning of a New Era of Natively Multimodal AI. Blog, April 2025.",
    router="the largest logit; its sigmoid multiplies the expert's input",
    formula="""\
z = W x;  S = the K largest of z
y = sum_{e in S} SwiGLU_e(sigmoid(z_e) x) + shared(x)
loss = 0.001 * E * sum_e f_e P_e,  P from sigmoid(z) / sum sigmoid(z)""",
    sources={
        "num_experts": "released configuration, Scout",
        "top_k": "released configuration",
        "num_shared": "released code",
        "activation": "released configuration",
        "init_std": "released configuration, initializer_range",
    },
    differences=(
        "transformers runs every expert on every token, with zeros for those it did not choose: the same numbers, as "
        "experts have no bias. Its configuration names a loss coefficient of 0.001 that no code reads, and Meta "
        "published no loss: this is Switch's, with that coefficient. Maverick has an MoE in every other layer only."
    ),
    build=llama4_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=1e-3),),
)

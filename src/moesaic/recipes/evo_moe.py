"""EvoMoE, 2021: a gate that starts dense and cools to sparse."""

from __future__ import annotations

from typing import Literal, cast

from moesaic.balance import AnnealingRule, LossTerm, active_share_loss
from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import AnnealedRouter, Cooling


def evo_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 16,
    top_k: int = 1,
    threshold: float = 0.001,
    temperature: float = 2.0,
    end_temperature: float = 0.3,
    cooling_steps: int = 10_000,
    cooling: str = "exponential",
    hard_after: int | None = None,
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Experts whose share of a noisy softmax exceeds a threshold; as it cools, fewer do.

    Args:
        width: D.
        hidden: F.
        num_experts: E; nearly all are active while the gate is hot.
        top_k: most experts per token in evaluation.
        threshold: share that an active expert exceeds.
        temperature: at first.
        end_temperature: at last.
        cooling_steps: optimizer steps from first to last.
        cooling: "exponential" or "linear".
        hard_after: optimizer steps after which only the best expert is active; None for never.
        activation: of the experts.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    schedule = Cooling(
        start=temperature,
        end=end_temperature,
        num_steps=cooling_steps,
        kind=cast(Literal["exponential", "linear"], cooling),
        hard_after=hard_after,
    )
    router = AnnealedRouter(width, num_experts, top_k=top_k, threshold=threshold, cooling=schedule, init=init)
    act = activation_named(activation)
    return MoELayer(router, MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init))


EVO_MOE = Recipe(
    name="evo-moe",
    year=2021,
    summary="a Gumbel-softmax gate starts with all experts and cools to few",
    citation=(
        "Nie et al. EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate. 2021. "
        "arXiv:2112.14397"
    ),
    router="experts with a noticeable share of a cooling softmax with Gumbel noise, weighted by the share",
    formula="""\
g = softmax((W x + Gumbel noise) / tau), no noise in evaluation
S = experts with g_e > 0.001, in evaluation the best K of them;  y = sum_{e in S} g_e FFN_e(x)
after each step: tau = max(2.0 * (0.3 / 2.0)^(step / 10000), 0.3)
loss = 0.01 * E * sum_e G_e A_e,  G_e = mean weight of e, 0 where inactive,  A_e = share of tokens with e active""",
    sources={
        "num_experts": "experiments of the paper, from memory",
        "top_k": "authors' code: evaluation takes the best expert",
        "threshold": "authors' code, GUMBEL_THRESHOLD",
        "temperature": "paper, from memory; 1.0 in the authors' code",
        "end_temperature": "paper, from memory; 0.5 in the authors' code",
        "cooling_steps": "paper, from memory; the authors' code leaves it to the user",
        "cooling": "authors' code has both",
        "hard_after": "authors' code, switch_to_hard_gumbel_softmax",
        "activation": "GPT (2018), the paper's model",
        "init_std": "ours",
    },
    differences=(
        "The gate with noise weighs, as in the paper and in the authors' use_gumbel_gates; their default "
        "weighs by the softmax without noise or temperature. Their evaluation takes the best of a gate that keeps "
        "its noise with that flag; here it has none. Their switch to a hard gate is on from the start unless "
        "set; here it is off. A token's best expert stays active below any threshold. The loss's coefficient of "
        "0.01 is Switch's: 1.0 is the code's default for all gates. Growing the experts from one (stage 1) is left out."
    ),
    build=evo_moe_layer,
    balance=(LossTerm(name="active-share", loss=active_share_loss, coefficient=1e-2), AnnealingRule()),
)

"""MoE++, 2024: beside feed-forward experts some that do nothing, copy or return a constant; gating residuals."""

from __future__ import annotations

from typing import Literal, cast

from torch import nn

from moesaic.balance import LossTerm, heterogeneous_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init, normal
from moesaic.dispatch import HeterogeneousCapacity
from moesaic.experts import (
    ConstantExpert,
    CopyExpert,
    GatedExperts,
    MixedExperts,
    SequentialExperts,
    ZeroExpert,
)
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import ResidualRouter


def moe_plus_plus_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 12,
    top_k: int = 2,
    num_constant: int | None = None,
    num_copy: int | None = None,
    num_zero: int | None = None,
    tau: float = 0.75,
    capacity_factor: float = 1.1,
    eval_capacity_factor: float | None = None,
    router_net: str = "linear",
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Top-2 of a softmax over experts of unequal cost, with the logits of the layer below.

    Experts stand as in the authors' code: feed-forward, constant, copy, zero.

    Args:
        width: D.
        hidden: F of the feed-forward experts.
        num_experts: E, of all kinds: 12 is published as 8 + 4.
        top_k: K.
        num_constant: None as published, 2 of 12 and 20 experts, 6 of 40; fewer where half of the experts would not be
            feed-forward.
        num_copy: None for 1; for 0 below four experts.
        num_zero: None for 1.
        tau: weight of a zero-computation expert in the loss, and the other way round in the capacity.
        capacity_factor: room over the rows in training, gamma in the paper.
        eval_capacity_factor: the same in evaluation; None drops nothing, as the authors' code.
        router_net: "linear" as in the paper, or "tanh", the two layers of the authors' code.
        activation: of the experts' gates.
        init_std: 0.02 unless given; constants start standard normal, as in the authors' code.
        kernel: of the feed-forward experts.
    """
    init = drawn(init_std, normal(0.02))
    counts = special_experts(num_experts, num_constant, num_copy, num_zero)
    num_ffn = num_experts - sum(counts)
    if num_ffn < 1:
        raise ConfigError(
            f"num_constant, num_copy and num_zero must leave a feed-forward expert of num_experts={num_experts}, got "
            f"{counts[0]}, {counts[1]} and {counts[2]}. Add experts, or take fewer special ones."
        )
    router = ResidualRouter(
        width,
        num_experts,
        top_k=top_k,
        num_special=sum(counts),
        tau=tau,
        net=cast('Literal["linear", "tanh"]', router_net),
        init=init,
    )
    ffn = GatedExperts(num_ffn, width, hidden, activation=activation_named(activation), kernel=kernel, init=init)
    special = _built(counts, width, init)
    experts = MixedExperts(ffn, SequentialExperts(special)) if special else ffn
    return MoELayer(router, experts, dispatch=HeterogeneousCapacity(capacity_factor, eval_factor=eval_capacity_factor))


def special_experts(
    num_experts: int, num_constant: int | None, num_copy: int | None, num_zero: int | None
) -> tuple[int, int, int]:
    """How many constant, copy and zero experts there are: as told, else as published, at most half of all.

    Raises:
        ConfigError: if a number is negative.
    """
    for name, value in (("num_constant", num_constant), ("num_copy", num_copy), ("num_zero", num_zero)):
        if value is not None and value < 0:
            raise ConfigError(f"{name} must be at least 0, got {value}. MoE++ has 2 constant, 1 copy and 1 zero.")
    special = min(8 if num_experts > 20 else 4, num_experts // 2)
    zero, copy, constant = min(special, 1), min(max(special - 1, 0), 1), max(special - 2, 0)
    return (
        constant if num_constant is None else num_constant,
        copy if num_copy is None else num_copy,
        zero if num_zero is None else num_zero,
    )


def _built(counts: tuple[int, int, int], width: int, init: Init) -> list[nn.Module]:
    num_constant, num_copy, num_zero = counts
    constants = [ConstantExpert(width, init=init) for _ in range(num_constant)]
    return [*constants, *(CopyExpert() for _ in range(num_copy)), *(ZeroExpert() for _ in range(num_zero))]


MOE_PLUS_PLUS = Recipe(
    name="moe++",
    year=2024,
    summary="zero, copy and constant experts beside feed-forward ones; routers that hear the layer below",
    citation="Jin, Zhu, Yuan, Yan. MoE++: Accelerating MoE with Zero-Computation Experts. ICLR 2025. arXiv:2410.07348",
    router="the two best of a softmax over W x plus a linear map of the logits of the MoE layer below",
    formula="""\
G(x) = W x + W_g G_below(x), without the second term in the first MoE layer;  p = softmax(G)
y = sum of p_e E_e(x) over the K best;  E_e: SwiGLU, or a x + b v with a, b = softmax(W_c x), or x, or 0
room for gamma * tau * T K / (tau N_ffn + N_zero) rows in an FFN, 1 / tau times as many elsewhere
loss = 0.01 * sum_e eta_e f_e P_e,  eta = 1 for an FFN, tau elsewhere,  f_e = rows of e / tokens""",
    sources={
        "num_experts": "table 2, 0.6B/(8+4)E",
        "top_k": "section 4.1",
        "num_constant": "table 2",
        "num_copy": "table 2",
        "num_zero": "table 2",
        "tau": "section 4.1 and table 3, the best of five",
        "capacity_factor": "section 4.1, gamma",
        "eval_capacity_factor": "authors' code, no capacity in inference",
        "router_net": "section 3.2; two layers in the authors' code",
        "activation": "table 2, the architecture of LLaMA",
        "init_std": "authors' code, initializer_range",
    },
    differences=(
        "Weights follow the paper: the probabilities as they are. The authors' code sets a chosen zero expert's weight "
        "to 0, divides the weights by their sum, and doubles every expert's input. The paper's capacity counts T "
        "tokens; this counts the T K rows, half of which could not fit otherwise. Of a chosen zero expert the row "
        "stays in the table with its weight: it is counted in load, loss and capacity, and adds nothing."
    ),
    build=moe_plus_plus_layer,
    balance=(LossTerm(name="heterogeneous", loss=heterogeneous_loss, coefficient=1e-2),),
)

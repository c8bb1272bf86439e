"""DeepSeek-V3, 2024: sigmoid scores, a bias in place of a balance loss, groups, and a shared expert."""

from __future__ import annotations

from moesaic.balance import BiasRule, LossTerm, sequence_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import GroupLimit, TopKRouter, sigmoid


def deepseek_v3_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 256,
    top_k: int = 8,
    num_shared: int = 1,
    num_groups: int | None = None,
    groups_kept: int | None = None,
    scale: float = 2.5,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Select by biased sigmoid within the best groups, weigh by the unbiased one, add a shared expert.

    Args:
        width: D.
        hidden: F, of each routed and each shared expert.
        num_experts: routed experts.
        top_k: routed experts per token.
        num_shared: experts that every token visits.
        num_groups: None for groups of 32 experts as published (8 of 256), and one group below 64 experts.
        groups_kept: None for half of the groups as published (4 of 8).
        scale: what the renormalised weights add up to.
        activation: of the experts' gates.
        init_std: 0.006 unless given (section 4.2).
        kernel: of the routed experts.
    """
    if num_shared < 0:
        raise ConfigError(f"num_shared must be at least 0, got {num_shared}. DeepSeek-V3 has 1.")
    init = drawn(init_std, normal(0.006))
    if num_groups is None:
        num_groups = num_experts // 32 if num_experts >= 64 and num_experts % 32 == 0 else 1
    if groups_kept is None:
        groups_kept = max(1, num_groups // 2)
    groups = None
    if (num_groups, groups_kept) != (1, 1):
        groups = GroupLimit(num_groups=num_groups, groups_kept=groups_kept, best_per_group=2)
    router = TopKRouter(
        width,
        num_experts,
        top_k=top_k,
        score=sigmoid,
        normalize="chosen",
        scale=scale,
        groups=groups,
        selection_bias=True,
        init=init,
    )
    act = activation_named(activation)
    experts = GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    shared = SharedExpert(width, num_shared * hidden, activation=act, init=init) if num_shared else None
    return MoELayer(router, experts, shared=shared)


DEEPSEEK_V3 = Recipe(
    name="deepseek-v3",
    year=2024,
    summary="sigmoid scores with a selection bias for balance, node-limited groups, a shared expert",
    citation="DeepSeek-AI. DeepSeek-V3 Technical Report. 2024. arXiv:2412.19437",
    router="sigmoid scores plus a bias select within the best groups; the bare scores weigh",
    formula="""\
s = sigmoid(W x);  groups of experts score the sum of their two best s + b; the best groups stay
S = the K largest of s + b within them;  w_e = scale * s_e / sum_S s
y = sum_{e in S} w_e SwiGLU_e(x) + shared(x)
after each step: b_e += 0.001 * sign(mean load - load_e)
loss = 1e-4 * E * sum_e f_e P_e within each sequence, P from s / sum s""",
    sources={
        "num_experts": "section 4.2",
        "top_k": "section 4.2",
        "num_shared": "section 4.2",
        "num_groups": "released configuration",
        "groups_kept": "section 4.2, M = 4",
        "scale": "released configuration, routed_scaling_factor",
        "activation": "section 4.2",
        "init_std": "section 4.2",
    },
    differences=(
        "Masked groups are minus infinity here, 0 in early public code, where a masked expert could beat an "
        "allowed one. The paper's sequence loss counts the K best unbiased scores; this counts the rows that were "
        "dispatched. The bias step is shifted to add up to 0."
    ),
    build=deepseek_v3_layer,
    balance=(LossTerm(name="sequence", loss=sequence_loss, coefficient=1e-4), BiasRule(rate=1e-3)),
)

"""Hierarchical mixture of experts, 2017: a gate chooses groups, and a gate in each group chooses experts."""

from __future__ import annotations

from moesaic.balance import LossTerm, importance_cv2, load_cv2
from moesaic.core.errors import ConfigError
from moesaic.core.init import scaled_by_fan_in, zeros
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn, gate_drawn
from moesaic.routers import HierarchicalRouter


def hierarchical_2017_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 256,
    top_k: int = 2,
    num_groups: int | None = None,
    noise_epsilon: float = 0.0,
    activation: str = "relu",
    init_std: float | None = None,
    gate_init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Two levels of noisy gates whose weights multiply; plain ReLU experts, none of them ever full.

    Args:
        width: D, 512 in the paper's language models.
        hidden: F, 1024 there.
        num_experts: E, 256 to 131072 in the paper.
        top_k: choices at each level: a token visits ``top_k`` groups and ``top_k`` experts in each, 4 experts as
            published. (With a single group, which is what is left where no cut gives each level ``top_k`` to choose
            from, it visits ``top_k`` experts.)
        num_groups: None for 16 as published with 256 experts or more, and below that as near to the square root of E
            as it can be divided.
        noise_epsilon: least standard deviation of the noise; 0.01 in the authors' tensor2tensor.
        activation: of the experts.
        init_std: of the experts; None draws them with variance 1 / fan-in.
        gate_init_std: of the gates and of the maps to the noise's width; None starts them at 0, so that noise alone
            decides at first.
        kernel: of the experts.
    """
    if num_groups is None:
        num_groups = _published_groups(num_experts, top_k)
    if num_groups < 1 or num_experts % num_groups:
        raise ConfigError(
            f"num_groups must divide num_experts={num_experts}, got {num_groups}. "
            "Change one so that every group holds as many experts."
        )
    gate, init = gate_drawn(gate_init_std, zeros), drawn(init_std, scaled_by_fan_in())
    router = HierarchicalRouter(
        width,
        num_groups,
        num_experts // num_groups,
        groups_per_token=1 if num_groups == 1 else top_k,
        members_per_token=top_k,
        noise_epsilon=noise_epsilon,
        init=gate,
        noise_init=gate,
    )
    experts = MLPExperts(num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init)
    return MoELayer(router, experts)


def _published_groups(num_experts: int, top_k: int) -> int:
    """16, or the largest even cut near the square root, that leaves ``top_k`` to choose from at both levels."""
    cuts = [g for g in range(top_k, num_experts // top_k + 1) if num_experts % g == 0]
    if num_experts >= 256 and 16 in cuts:
        return 16
    return min(cuts, key=lambda g: (abs(g - num_experts // g), -g), default=1)


HIERARCHICAL_2017 = Recipe(
    name="hierarchical-2017",
    year=2017,
    summary="noisy gates in two levels, groups and their members, whose weights multiply",
    citation="Shazeer et al. Outrageously Large Neural Networks. ICLR 2017. arXiv:1701.06538",
    router="two groups by one noisy gate, two experts in each by the group's own; weights multiply",
    formula="""\
G = noisy top-k gate over groups;  G_g = noisy top-k gate over the experts of group g (see shazeer-2017)
y = sum_g sum_e G(x)_g G_g(x)_e FFN_ge(x)
importance_ge = sum_x G(x)_g G_g(x)_e
load_ge = load(G)_g * load(G_g over X_g)_e / |X_g|,  X_g = the tokens that visit group g
loss = 0.1 * CV(importance)^2 + 0.1 * CV(load)^2""",
    sources={
        "num_experts": "table 7, MoE-256-h",
        "top_k": "appendix C.1",
        "num_groups": "appendix C.1, first-level branching factor 16",
        "noise_epsilon": "equation 4; 0.01 in tensor2tensor, expert_utils.noisy_top_k_gating",
        "activation": "appendix C.1",
        "init_std": "the paper does not say",
        "gate_init_std": "appendix A",
    },
    differences=(
        "As for shazeer-2017. top_k counts choices at each level, so that a token visits its square. The noise of "
        "groups that a token does not visit is drawn too, and not used."
    ),
    build=hierarchical_2017_layer,
    balance=(
        LossTerm(name="importance", loss=importance_cv2, coefficient=0.1),
        LossTerm(name="load", loss=load_cv2, coefficient=0.1),
    ),
)

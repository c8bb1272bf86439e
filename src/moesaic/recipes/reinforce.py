"""Routing by reinforcement, 2022: experts are drawn, and the draw is rewarded by how well the token was predicted."""

from __future__ import annotations

from moesaic.balance import LossTerm, reinforce_loss, switch_loss
from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import PolicyRouter


def reinforce_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 64,
    top_k: int = 1,
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Draw experts from a softmax in training, take the best in evaluation; all weigh the same.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: experts per token.
        activation: of the experts.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    router = PolicyRouter(width, num_experts, top_k=top_k, init=init)
    act = activation_named(activation)
    return MoELayer(router, MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init))


REINFORCE = Recipe(
    name="reinforce",
    year=2022,
    summary="the router is a policy: it draws experts and learns from the reward alone, by REINFORCE",
    citation=(
        "Clark et al. Unified Scaling Laws for Routed Language Models (RL-R). ICML 2022. arXiv:2202.01169. First for "
        "blocks of hidden units: Bengio, Bacon, Pineau, Precup. Conditional Computation in Neural Networks for Faster "
        "Models. 2015. arXiv:1511.06297"
    ),
    router="experts drawn from a softmax in training, the best in evaluation, all of the same weight",
    formula="""\
p = softmax(W x);  S = K experts drawn from p without replacement, in evaluation the K best
y = 1/K * sum_{e in S} FFN_e(x), no gradient to W
reward r_t = log-likelihood of the token's label, baseline b = mean_t r_t
loss = -0.01 * mean_t (r_t - b) log p(S_t) + 0.01 * E * sum_e f_e P_e""",
    sources={
        "num_experts": "paper's advice: 64 to 128 experts",
        "top_k": "paper: one expert",
        "activation": "GPT-2 (2019)",
        "init_std": "ours",
    },
    differences=(
        "No code of RL-R is public, and its appendix is followed from memory: the weight of 1/K, the batch's "
        "mean reward as baseline (instead of a learned one), both coefficients of 0.01 and the Switch loss that keeps "
        "the policy from collapsing are ours. 2015's policy switches each block on or off by itself."
    ),
    build=reinforce_layer,
    balance=(
        LossTerm(name="reinforce", loss=reinforce_loss, coefficient=1e-2, rewarded=True),
        LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),
    ),
)

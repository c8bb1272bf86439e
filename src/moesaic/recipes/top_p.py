"""Top-p routing, 2024: as many experts as it takes to be sure."""

from __future__ import annotations

from moesaic.balance import LossTerm, entropy_loss, switch_loss
from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopPRouter


def top_p_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 16,
    top_p: float = 0.4,
    top_k: int | None = None,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Best experts first until their probabilities reach p; the probabilities weigh as they are.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_p: probability that a token's experts must reach together.
        top_k: most experts of one token; None as published, no bound but the one that p sets.
        activation: of the experts' gates.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    router = TopPRouter(width, num_experts, p=top_p, top_k=top_k, init=init)
    act = activation_named(activation)
    return MoELayer(router, GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init))


TOP_P = Recipe(
    name="top-p",
    year=2024,
    summary="a token takes its best experts until their probabilities add up to p, so hard tokens take more",
    citation="Huang et al. Harder Tasks Need More Experts: Dynamic Routing in MoE Models. ACL 2024. arXiv:2403.07652",
    router="the fewest experts whose softmax probabilities reach p together, weighted by these",
    formula="""\
p = softmax(W x), experts in falling order of p
S = the first t experts, t the least number with p_1 + ... + p_t >= top_p
y = sum_{e in S} p_e SwiGLU_e(x)
loss = 0.01 * E * sum_e f_e P_e + 0.0001 * mean_t H(p_t),  f_e = share of rows,  P_e = mean_t p_te""",
    sources={
        "num_experts": "experiments of the paper, from memory",
        "top_p": "paper, and top_p_threshold in the authors' code",
        "top_k": "none published; the authors' code has experts_topk and does not read it",
        "activation": "authors' code",
        "init_std": "initializer_range in the authors' code",
    },
    differences=(
        "The authors' code keeps what crosses a strictly larger sum (> p, not >= p), the same but for exact ties, and "
        "at p = 1 drops all but one expert where rounding lets no sum cross; here p = 1 keeps all. The paper's balance "
        "loss divides loads by tokens, this by rows: at t experts per token theirs is t times ours. The "
        "coefficients 0.01 and 0.0001 are quoted from memory: the released code is for inference only."
    ),
    build=top_p_layer,
    balance=(
        LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),
        LossTerm(name="entropy", loss=entropy_loss, coefficient=1e-4),
    ),
)

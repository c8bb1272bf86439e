"""SMEAR, 2023: the parameters of all experts are averaged, once for each sequence, and one network runs."""

from __future__ import annotations

from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.merge import MergedMoE
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers.pooled import PooledRouter


def smear_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 8,
    expert_dropout: float = 0.1,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MergedMoE:
    """Route a sequence by the mean of its tokens, average the experts' weights, run the average.

    Args:
        width: D.
        hidden: F, ``width / 32`` for the adapters of the paper.
        num_experts: E.
        expert_dropout: chance that an expert is left out of a merge in training.
        activation: of the experts.
        init_std: of the router's map and of the experts; the gain of the map's normalisation starts at 0.01.
        kernel: of the merged networks.
    """
    init = drawn(init_std, normal(0.01))
    router = PooledRouter(width, num_experts, normalized=True, init=init)
    experts = MLPExperts(num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init)
    return MergedMoE(router, experts, expert_dropout=expert_dropout)


SMEAR = Recipe(
    name="smear",
    year=2023,
    summary="one network per sequence, the average of all experts' weights; expert dropout for balance",
    citation="Muqeeth, Liu, Raffel. Soft Merging of Experts with Adaptive Routing. 2023. arXiv:2306.03745",
    router="one softmax over experts for each sequence, from the mean of its tokens",
    formula="""\
r = softmax(LayerNorm(V) LayerNorm(mean over the sequence of x))
in training each r_e is set to 0 with chance 0.1, the rest divided by their sum
y = FFN(x; sum_e r_e W_e) for every token of the sequence
no loss""",
    sources={
        "num_experts": "authors' code, T5 on GLUE",
        "expert_dropout": "authors' code, commands of the published runs",
        "activation": "authors' code, swish",
        "init_std": "authors' code, 0.01",
    },
    differences=(
        "The paper's experts are adapters with biases beside a frozen T5; here they are the feed-forward network, "
        "without biases. Decoder layers of the paper route by the encoder's output; here a layer sees its own input, "
        "later tokens included. Where dropout leaves no expert, all count the same, which the code's 1e-10 amounts to."
    ),
    build=smear_layer,
    causality="never",
)

"""THOR, 2021: experts drawn at random, and a loss that makes them agree."""

from __future__ import annotations

from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn, one_choice
from moesaic.routers import RandomRouter


def thor_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 2,
    top_k: int = 1,
    activation: str = "relu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Draw one expert for each sequence in training, average all in evaluation.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: 1, in training; nothing else is published.
        activation: of the experts.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    one_choice("thor", top_k)
    act = activation_named(activation)
    init = drawn(init_std, normal(0.02))
    experts = MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    return MoELayer(RandomRouter(num_experts), experts)


THOR = Recipe(
    name="thor",
    year=2021,
    summary="an expert drawn at random for each sequence; two passes are taught to agree",
    citation=(
        "Zuo, Liu, Jiao, Kim, Hassan, Zhang, Zhao, Gao. Taming Sparsely Activated Transformer with Stochastic "
        "Experts. ICLR 2022. arXiv:2110.04260"
    ),
    router="one expert drawn uniformly for each sequence in training, the mean of all in evaluation",
    formula="""\
training: e drawn uniformly for each sequence;  y_t = FFN_e(x_t)
evaluation: y_t = 1/E sum_e FFN_e(x_t)
two passes: loss = CE(p1, y) + CE(p2, y) + 5 * (KL(p1 || p2) + KL(p2 || p1)) / 2""",
    sources={
        "num_experts": "authors' code, default and example",
        "top_k": "authors' code",
        "activation": "authors' code (fairseq Transformer)",
    },
    differences=(
        "The authors' code draws one expert for the whole batch in training, the paper one for each input: this "
        "follows the paper. Paper and code draw in inference as well, for each sentence or token; this is "
        "deterministic in evaluation, the ensemble of all experts, and so computes E experts there. Training runs the "
        "usual single pass: for the published loss call the model twice and add balance.consistency_loss, 5 times as "
        "strong. Balance losses and controllers have nothing to train here."
    ),
    build=thor_layer,
)

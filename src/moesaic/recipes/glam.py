"""GLaM, 2021: GShard's layer as a decoder-only language model, 64 GELU experts in every other layer."""

from __future__ import annotations

from moesaic.balance import LossTerm, gshard_loss
from moesaic.layer import MoELayer
from moesaic.recipes.gshard import gshard_layer
from moesaic.recipes.recipe import Recipe


def glam_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 64,
    top_k: int = 2,
    second_threshold: float = 0.5,
    capacity_factor: float = 2.0,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    group_size: int | None = None,
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """GShard's layer with fewer experts and GELU.

    Args:
        width: D.
        hidden: F.
        num_experts: E, 32 to 256 in the paper.
        top_k: K.
        second_threshold: weight from which on the second expert is always used; below, by chance in training.
        capacity_factor: room of an expert over tokens / E, K not counted: 2.0 just fits two choices if balanced.
        eval_capacity_factor: the same in evaluation.
        min_capacity: least rows per expert and group.
        group_size: tokens that compete with each other for places; None for those of one sequence.
        activation: of the experts.
        init_std: None draws with variance 1 / fan-in.
        kernel: of the experts.
    """
    return gshard_layer(
        width,
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k,
        second_threshold=second_threshold,
        capacity_factor=capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        min_capacity=min_capacity,
        group_size=group_size,
        activation=activation,
        init_std=init_std,
        kernel=kernel,
    )


GLAM = Recipe(
    name="glam",
    year=2021,
    summary="GShard's gating in a decoder: two of 64 plain GELU experts, every other layer",
    citation="Du et al. GLaM: Efficient Scaling of Language Models with Mixture-of-Experts. 2021. arXiv:2112.06905",
    router="the two best of a softmax, renormalised over the two; the second used by chance in training",
    formula="""\
p = softmax(W x);  S = the 2 largest of p;  w = p over S / sum_S p
training: the second is used with probability min(1, w_2 / second_threshold)
within each group of tokens an expert takes at most C = max(min_capacity, ceil(capacity_factor * tokens / E)) rows
y = sum over rows kept of w_e FFN_e(x),  FFN with GELU
loss = 0.01 * E * sum_e f_e P_e,  f_e = share of first choices that chose e, before capacity""",
    sources={
        "num_experts": "section 4, 64B/64E",
        "top_k": "section 4",
        "second_threshold": "GShard, which section 4 follows",
        "capacity_factor": "GShard, which section 4 follows",
        "eval_capacity_factor": "GShard, which section 4 follows",
        "min_capacity": "Mesh TensorFlow",
        "group_size": "GShard, which section 4 follows",
        "activation": "recount of the parameters of table 4: experts of two matrices; GELU as in its dense layers",
        "init_std": "not published",
    },
    differences=(
        "The gate is GShard's, and so are the differences; the paper does not spell it out. Its other layers have "
        "feed-forward networks with a gated linear unit and GELU; experts have two matrices, as the published numbers "
        "of parameters show."
    ),
    build=glam_layer,
    balance=(LossTerm(name="gshard", loss=gshard_loss, coefficient=1e-2),),
)

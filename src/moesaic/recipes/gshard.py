"""GShard, 2020: two experts per token, the second by chance, within groups that each have a capacity."""

from __future__ import annotations

from moesaic.balance import LossTerm, gshard_loss
from moesaic.core.init import scaled_by_fan_in
from moesaic.dispatch import Capacity
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import SampledTopKRouter


def gshard_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 2048,
    top_k: int = 2,
    second_threshold: float = 0.5,
    capacity_factor: float = 2.0,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    group_size: int | None = None,
    activation: str = "relu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Top-2 of a softmax, weights renormalised over the two before anything is dropped, capacity in local groups.

    Args:
        width: D.
        hidden: F.
        num_experts: E, 128 to 2048 in the paper.
        top_k: K.
        second_threshold: weight from which on the second expert is always used; below, by chance in training.
        capacity_factor: room of an expert over tokens / E, K not counted: 2.0 just fits two choices if balanced.
        eval_capacity_factor: the same in evaluation.
        min_capacity: least rows per expert and group; 4 in Mesh TensorFlow.
        group_size: tokens that compete with each other for places; None for those of one sequence.
        activation: of the experts.
        init_std: None draws with variance 1 / fan-in.
        kernel: of the experts.
    """
    init = drawn(init_std, scaled_by_fan_in())
    router = SampledTopKRouter(width, num_experts, top_k=top_k, threshold=second_threshold, init=init)
    experts = MLPExperts(num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init)
    dispatch = Capacity(
        capacity_factor,
        eval_factor=eval_capacity_factor,
        minimum=min_capacity,
        group="sequence" if group_size is None else group_size,
        per="token",
    )
    return MoELayer(router, experts, dispatch=dispatch)


GSHARD = Recipe(
    name="gshard",
    year=2020,
    summary="top-2 with a second expert used by chance; capacity within local groups",
    citation="Lepikhin et al. GShard. ICLR 2021. arXiv:2006.16668",
    router="the two best of a softmax, renormalised over the two; the second used by chance in training",
    formula="""\
p = softmax(W x);  S = the 2 largest of p;  w = p over S / sum_S p
training: the second is used with probability min(1, w_2 / second_threshold)
within each group of tokens an expert takes at most C = max(min_capacity, ceil(capacity_factor * tokens / E)) rows:
first choices, then second ones, earliest tokens first;  y = sum over rows kept of w_e FFN_e(x)
loss = 0.01 * E * sum_e f_e P_e,  f_e = share of first choices that chose e, before capacity""",
    sources={
        "num_experts": "table 1",
        "top_k": "section 2.2 and algorithm 1",
        "second_threshold": "algorithm 1, 2 * g2 > random",
        "capacity_factor": "section 2.2, capacity 2 N / (G E)",
        "eval_capacity_factor": "section 2.2; 2.0 in Mesh TensorFlow too",
        "min_capacity": "authors' code (Mesh TensorFlow)",
        "group_size": "section 2.2, local groups; 1024 tokens in Mesh TensorFlow",
        "activation": "algorithm 2",
        "init_std": "not published",
    },
    differences=(
        "The paper's loss has 1 / E where this and Mesh TensorFlow have E, so that it is 1 / E^2 of this; both take it "
        "for each group and average, this takes the batch. A second choice that is not used takes a place in the "
        "paper's algorithm, which counts it either way, and none in Mesh TensorFlow and here; second choices queue "
        "behind all first choices in the paper and here, behind those kept in Mesh TensorFlow. Mesh TensorFlow uses "
        "the second expert by chance in evaluation too, with a threshold of 0.2, and rounds C down. DeepSpeed and "
        "fairscale renormalise weights after dropping, so that a lone first choice weighs 1; here it keeps its weight."
    ),
    build=gshard_layer,
    balance=(LossTerm(name="gshard", loss=gshard_loss, coefficient=1e-2),),
)

"""ST-MoE, 2022: top-2 made stable by the router z-loss, with a dense network behind each sparse layer."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from moesaic.balance import LossTerm, gshard_loss, z_loss
from moesaic.core.init import scaled_by_fan_in
from moesaic.dispatch import Capacity
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import SampledTopKRouter


def st_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 64,
    top_k: int = 2,
    second_threshold: float = 0.2,
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    group_size: int | None = None,
    sparse_dense: bool = True,
    activation: str = "gelu_tanh",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Top-2 of a softmax as in GShard, GEGLU experts, and a dense GEGLU network behind them.

    Args:
        width: D.
        hidden: F, of each expert and of the dense network.
        num_experts: E, 64 in ST-MoE-32B and 32 in ST-MoE-L.
        top_k: K.
        second_threshold: weight from which on the second expert is always used; below, by chance in training.
        capacity_factor: room of an expert over tokens / E, K not counted: 2.0 just fits two choices if balanced.
        eval_capacity_factor: the same in evaluation.
        min_capacity: least rows per expert and group.
        group_size: tokens that compete with each other for places; None for those of one sequence.
        sparse_dense: add a dense network with a norm of its own behind the sparse layer.
        activation: of the gates: GELU in the tanh form of Mesh TensorFlow.
        init_std: None draws with variance 0.1 / fan-in, as Switch.
        kernel: of the experts.
    """
    init, act = drawn(init_std, scaled_by_fan_in(0.1)), activation_named(activation)
    router = SampledTopKRouter(width, num_experts, top_k=top_k, threshold=second_threshold, init=init)
    experts = GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    dispatch = Capacity(
        capacity_factor,
        eval_factor=eval_capacity_factor,
        minimum=min_capacity,
        group="sequence" if group_size is None else group_size,
        per="token",
    )
    after = None
    if sparse_dense:
        norm, ffn = nn.RMSNorm(width, eps=1e-6), SharedExpert(width, hidden, activation=act, init=init)
        after = nn.Sequential(OrderedDict(norm=norm, ffn=ffn))
    return MoELayer(router, experts, dispatch=dispatch, after=after)


ST_MOE = Recipe(
    name="st-moe",
    year=2022,
    summary="top-2 with a router z-loss; GEGLU experts and a dense network behind each sparse layer",
    citation="Zoph et al. ST-MoE: Designing Stable and Transferable Sparse Expert Models. 2022. arXiv:2202.08906",
    router="the two best of a softmax, renormalised over the two; the second used by chance in training",
    formula="""\
z = W x;  p = softmax(z);  S = the 2 largest of p;  w = p over S / sum_S p
training: the second is used with probability min(1, w_2 / second_threshold)
within each group of tokens an expert takes at most C = max(min_capacity, ceil(capacity_factor * tokens / E)) rows
y = sum over rows kept of w_e GEGLU_e(x);  with sparse_dense: y + GEGLU(RMSNorm(x + y))
loss = 0.01 * E * sum_e f_e P_e + 0.001 * mean_t logsumexp(z_t)^2,  f_e = share of first choices that chose e""",
    sources={
        "num_experts": "table 11, ST-MoE-32B",
        "top_k": "section 5",
        "second_threshold": "Mesh TensorFlow, moe_second_threshold_train",
        "capacity_factor": "section 5, table 8",
        "eval_capacity_factor": "section 5, table 8",
        "min_capacity": "Mesh TensorFlow",
        "group_size": "GShard; 1024 tokens in Mesh TensorFlow",
        "sparse_dense": "table 11, sparse-dense",
        "activation": "table 11, GEGLU; in the form of Mesh TensorFlow",
        "init_std": "Switch Transformer, section 2.4",
    },
    differences=(
        "As for gshard. In the paper each sub-layer has a norm and a residual connection of its own: the dense network "
        "would see the sum of the residual stream and the sparse output. This layer is one sub-layer and sees the "
        "normalised input x alone, so that the network works on the norm of x + y. The multiplicative bias within "
        "experts that its appendix tries is left out, as is the jitter of Switch, which cost quality (table 3). Mesh "
        "TensorFlow rounds C down, flaxformer to the nearest; this rounds up."
    ),
    build=st_moe_layer,
    balance=(
        LossTerm(name="gshard", loss=gshard_loss, coefficient=1e-2),
        LossTerm(name="z", loss=z_loss, coefficient=1e-3),
    ),
)

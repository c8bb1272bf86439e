"""DS-MoE, 2024: train densely, run sparsely."""

from __future__ import annotations

from moesaic.balance import LossTerm, mutual_information_loss
from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import DenseRouter


def ds_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 32,
    top_k: int | None = None,
    threshold: float = 0.0,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """All experts in training; in evaluation the best few, or those above a threshold.

    Args:
        width: D.
        hidden: F.
        num_experts: E, all of them active in training.
        top_k: most experts per token in evaluation; None for three of eight, 12 of the published 32.
        threshold: in evaluation an expert but the best must have more than this probability; 0 asks for nothing.
        activation: of the experts' gates.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    if top_k is None:
        top_k = max(1, num_experts * 3 // 8)
    router = DenseRouter(width, num_experts, eval_top_k=top_k, eval_threshold=threshold, init=init)
    act = activation_named(activation)
    return MoELayer(router, GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init))


DS_MOE = Recipe(
    name="ds-moe",
    year=2024,
    summary="all experts train on all tokens; a mutual information loss makes few of them enough later",
    citation=(
        "Pan et al. Dense Training, Sparse Inference: Rethinking Training of Mixture-of-Experts Language Models. 2024. "
        "arXiv:2404.05567"
    ),
    router="all experts in training, the K most probable in evaluation, weighted by the softmax",
    formula="""\
p = softmax(W x)
training: y = sum_e p_e SwiGLU_e(x);  evaluation: the same sum over the K largest p_e above the threshold
loss = 0.01 * (-H(mean_t p_t) + mean_t H(p_t))""",
    sources={
        "num_experts": "paper, from memory",
        "top_k": "ours, 12 of 32: the paper's models run 30 to 40 % of their parameters",
        "threshold": "paper, the other way to choose; off",
        "activation": "ours",
        "init_std": "ours",
    },
    differences=(
        "Weights are not renormalised over the experts that evaluation keeps, so that all of them give training's "
        "output. The best expert stays below any threshold. The loss's coefficient of 0.01 is ours: no code is "
        "public that we could read. The paper's mixture of attention heads is no part of a feed-forward layer."
    ),
    build=ds_moe_layer,
    balance=(LossTerm(name="mutual-information", loss=mutual_information_loss, coefficient=1e-2),),
)

"""Sinkhorn-BASE, 2022: BASE's even sharing, relaxed to optimal transport that a GPU solves in a few products."""

from __future__ import annotations

from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import SinkhornRouter


def sinkhorn_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 64,
    top_k: int = 1,
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Choose by a balanced transport plan in training, by the logits in evaluation; weigh by the token's own score.

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
    router = SinkhornRouter(width, num_experts, top_k=top_k, init=init)
    act = activation_named(activation)
    experts = MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    return MoELayer(router, experts)


SINKHORN = Recipe(
    name="sinkhorn",
    year=2022,
    summary="experts chosen from an entropy-regularised balanced transport plan; no loss, no capacity",
    citation="Clark et al. Unified Scaling Laws for Routed Language Models. ICML 2022. arXiv:2202.01169",
    router="the best of a Sinkhorn plan in training, of the logits in evaluation; the token's own score weighs",
    formula="""\
L = x W^T;  Pi = diag(u) exp(L) diag(v) with rows adding up to 1/T and columns to 1/E
training: S_t = the K largest of Pi_t, without gradient;  evaluation: S_t = the K largest of L_t
w_te = sigmoid(L_te) for K = 1, softmax(L_t)_e for more;  y_t = sum_{e in S_t} w_te FFN_e(x_t)""",
    sources={
        "num_experts": "the paper has 2 to 512; 64 is in the middle of its sweeps",
        "top_k": "the paper routes to one",
        "activation": "Megatron-LM's default, whose Sinkhorn router this follows",
    },
    differences=(
        "Paper and Megatron-LM agree on the plan; weights, tolerance (1e-4) and the epsilon of 1e-8 are Megatron-LM's. "
        "The plan is computed in float64, and a step limit ends what never settles in float32. The paper limits "
        "capacity as well; Megatron-LM and this drop nothing, since the plan is nearly balanced. In evaluation "
        "nothing balances."
    ),
    build=sinkhorn_layer,
    causality="in evaluation",
)

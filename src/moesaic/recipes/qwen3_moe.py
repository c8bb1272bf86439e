"""Qwen3-MoE, 2025: no shared expert, and a balance loss over the global batch."""

from __future__ import annotations

from moesaic.balance import LossTerm, global_batch_loss
from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def qwen3_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 128,
    top_k: int = 8,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Softmax over the chosen logits, SwiGLU experts, dropless.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: K.
        activation: of the experts' gates.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="chosen", init=init)
    experts = GatedExperts(
        num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init
    )
    return MoELayer(router, experts)


QWEN3_MOE = Recipe(
    name="qwen3-moe",
    year=2025,
    summary="eight of 128 experts, renormalised; balance over the global batch, not each micro-batch",
    citation="Qwen Team. Qwen3 Technical Report. 2025. arXiv:2505.09388",
    router="the eight best experts of a softmax, renormalised over the eight",
    formula="""\
p = softmax(W x);  S = the K largest of p;  w_e = p_e / sum_S p
y = sum_{e in S} w_e SwiGLU_e(x)
loss = 0.01 * E * sum_e f_e P_e,  f_e = share of rows of the global batch, P_e = mean of this micro-batch""",
    sources={
        "num_experts": "Qwen3 report, table 2",
        "top_k": "Qwen3 report, table 2",
        "activation": "released configuration",
        "init_std": "released configuration",
    },
    differences=(
        "The report names the loss, of Qiu et al. 2025 (arXiv:2501.11873), and not its coefficient: 0.01 is that "
        "paper's. transformers has 0.001 for fine-tuning, times K = 8 by its convention, and takes the load of one "
        "micro-batch. A layer called by itself knows no global batch: its own stands for the whole."
    ),
    build=qwen3_moe_layer,
    balance=(LossTerm(name="global-batch", loss=global_batch_loss, coefficient=1e-2),),
)

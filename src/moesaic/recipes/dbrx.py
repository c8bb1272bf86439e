"""DBRX, 2024: four of sixteen experts, finer-grained than Mixtral's two of eight."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def dbrx_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 16,
    top_k: int = 4,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Softmax scores divided by the L1 norm of the chosen ones, gated experts, dropless.

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
    # Scores are positive: their L1 norm is their sum.
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="chosen", init=init)
    experts = GatedExperts(
        num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init
    )
    return MoELayer(router, experts)


DBRX = Recipe(
    name="dbrx",
    year=2024,
    summary="four of 16 gated experts, weights divided by their L1 norm; dropless",
    citation="Databricks Mosaic Research. Introducing DBRX: A New State-of-the-Art Open LLM. Blog, March 2024.",
    router="the four best experts of a softmax, divided by the L1 norm of the four",
    formula="""\
p = softmax(W x);  S = the K largest of p;  w_e = p_e / sum_S |p|
y = sum_{e in S} w_e SwiGLU_e(x)
loss = 0.05 * E * sum_e f_e P_e over all K choices, per layer""",
    sources={
        "num_experts": "released configuration, moe_num_experts",
        "top_k": "released configuration, moe_top_k",
        "activation": "released configuration, ffn_act_fn",
        "init_std": "released configuration, initializer_range",
    },
    differences=(
        "The coefficient is the released moe_loss_weight. MegaBlocks, which trained DBRX, averages the loss over "
        "layers, where this adds them up; transformers' is K at balance and pools layers before it multiplies. "
        "transformers takes the softmax in the model's dtype, this in float32."
    ),
    build=dbrx_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=5e-2),),
)

"""MiniMax-01, 2025: two of 32 wide experts, between layers of linear attention."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def minimax_01_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 32,
    top_k: int = 2,
    jitter: float = 0.0,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Softmax over the chosen logits, SwiGLU experts, dropless.

    Args:
        width: D, 6144 as released.
        hidden: F, 9216 as released.
        num_experts: E.
        top_k: K.
        jitter: ``router_jitter_noise`` of transformers, 0 there too; here only the router sees it.
        activation: of the experts' gates.
        init_std: 0.02 unless given, ``initializer_range`` of transformers' configuration.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="chosen", jitter=jitter, init=init)
    act = activation_named(activation)
    return MoELayer(router, GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init))


MINIMAX_01 = Recipe(
    name="minimax-01",
    year=2025,
    summary="two of 32 SwiGLU experts, weights renormalised over the two, in a model of linear attention",
    citation="MiniMax. MiniMax-01: Scaling Foundation Models with Lightning Attention. 2025. arXiv:2501.08313",
    router="the two best experts of a softmax, renormalised over the two",
    formula="""\
z = W x;  S = the K largest of z
w = softmax(z over S);  y = sum_{e in S} w_e SwiGLU_e(x)
loss = 0.01 * E * sum_e f_e P_e over all K choices, per layer""",
    sources={
        "num_experts": "released configuration, num_local_experts",
        "top_k": "released configuration, num_experts_per_tok",
        "jitter": "transformers",
        "activation": "released configuration",
        "init_std": "transformers; the paper draws by Xavier",
    },
    differences=(
        "The model was trained with a capacity whose factor is not published, and with counts gathered across devices "
        "before rows are dropped, so that devices drop alike (a global router); released code, transformers and this "
        "drop nothing. The loss is GShard's over all choices; its coefficient of 0.01 is as readers of the paper quote "
        "it, where transformers has 0.001, for a loss that is K at balance and pools all layers."
    ),
    build=minimax_01_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),),
)

"""DeepSeekMoE, 2024: many small experts, and shared ones that every token visits."""

from __future__ import annotations

from moesaic.balance import LossTerm, sequence_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def deepseek_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 64,
    top_k: int = 6,
    num_shared: int = 2,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Softmax over the routed experts, raw scores as weights, shared experts beside them.

    Args:
        width: D.
        hidden: F, of each routed and each shared expert.
        num_experts: routed experts.
        top_k: routed experts per token.
        num_shared: experts that every token visits.
        activation: of the experts' gates.
        init_std: 0.006 unless given.
        kernel: of the routed experts.
    """
    if num_shared < 0:
        raise ConfigError(f"num_shared must be at least 0, got {num_shared}. DeepSeekMoE 16B has 2.")
    init = drawn(init_std, normal(0.006))
    act = activation_named(activation)
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="scores", init=init)
    experts = GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    shared = SharedExpert(width, num_shared * hidden, activation=act, init=init) if num_shared else None
    return MoELayer(router, experts, shared=shared)


DEEPSEEK_MOE = Recipe(
    name="deepseek-moe",
    year=2024,
    summary="six of 64 small experts by raw softmax scores, beside two shared ones; dropless",
    citation="Dai et al. DeepSeekMoE: Towards Ultimate Expert Specialization. ACL 2024. arXiv:2401.06066",
    router="the six best experts of a softmax, weighted by their scores as they are",
    formula="""\
s = softmax(W x);  S = the K largest of s
y = sum_{e in S} s_e SwiGLU_e(x) + shared(x)
loss = 0.001 * E * sum_e f_e P_e within each sequence, averaged over sequences""",
    sources={
        "num_experts": "section 5.1, 16B",
        "top_k": "section 5.1, 16B",
        "num_shared": "section 5.1, 16B",
        "activation": "released configuration",
        "init_std": "section 4.1",
    },
    differences=(
        "The paper's loss is over T tokens; the released code counts them sequence by sequence (seq_aux), as this "
        "does. The 145B model adds 0.05 times the device loss (balance.device_loss, with GroupLimit naming the "
        "devices); 2B and 16B train without it, and so does this. The first layer of 16B and 145B is dense."
    ),
    build=deepseek_moe_layer,
    balance=(LossTerm(name="sequence", loss=sequence_loss, coefficient=1e-3),),
)

"""Residual-MoE, 2022: a dense network for every token, and one expert to correct it."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.dispatch import Capacity
from moesaic.experts import LearnedMix, MLPExperts, SharedExpert
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def residual_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 32,
    top_k: int = 1,
    combine: str = "sum",
    capacity_factor: float = 1.0,
    eval_capacity_factor: float = 1.0,
    min_capacity: int = 4,
    jitter: float = 0.0,
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """A plain network for every token plus its best expert, weighted by the expert's probability.

    Args:
        width: D.
        hidden: F, of the network and of each expert.
        num_experts: E.
        top_k: K.
        combine: "sum" as in the paper, or "learned", a softmax of two numbers per token as in DeepSpeed's code.
        capacity_factor: room over a balanced load in training.
        eval_capacity_factor: the same in evaluation.
        min_capacity: least rows per expert.
        jitter: width of the noise on the router's input in training; DeepSpeed offers 0.01.
        activation: of the network and the experts.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    if combine not in ("sum", "learned"):
        raise ConfigError(f"combine must be 'sum' or 'learned', got {combine!r}. The paper has 'sum'.")
    init, act = drawn(init_std, normal(0.02)), activation_named(activation)
    return MoELayer(
        TopKRouter(width, num_experts, top_k=top_k, normalize="scores", jitter=jitter, init=init),
        MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init),
        dispatch=Capacity(capacity_factor, eval_factor=eval_capacity_factor, minimum=min_capacity),
        shared=SharedExpert(width, hidden, activation=act, gated=False, init=init),
        mix=LearnedMix(width, init=init) if combine == "learned" else None,
    )


SOURCES = {
    "num_experts": "section 4.1, figure 4, 350M+MoE-32",
    "top_k": "section 4.1",
    "combine": "section 4.1; DeepSpeed's code has the other",
    "capacity_factor": "DeepSpeed's default",
    "eval_capacity_factor": "DeepSpeed's default",
    "min_capacity": "DeepSpeed's default",
    "jitter": "DeepSpeed's default, no noise",
    "activation": "Megatron's GPT, GELU",
    "init_std": "Megatron's default",
}
DIFFERENCES = (
    "The paper adds the two outputs; DeepSpeed's layer mixes them by a learned softmax, option combine. DeepSpeed "
    "drops random rows of an overfull expert unless told otherwise; here the latest go. Its kept top-1 weight is the "
    "probability, as here."
)
BALANCE = (LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),)

RESIDUAL_MOE = Recipe(
    name="residual-moe",
    year=2022,
    summary="a dense network for every token and one expert to correct it, for the price of one expert more",
    citation="Rajbhandari et al. DeepSpeed-MoE. ICML 2022. arXiv:2201.05596",
    router="one expert per token, the best of a softmax, weighted by its probability",
    formula="""\
p = softmax(W x);  e* = argmax_e p_e
y = MLP(x) + p_e* FFN_e*(x);  or with a, b = softmax(V x + c):  a p_e* FFN_e*(x) + b MLP(x)
each expert takes at most max(4, ceil(T / E)) tokens, earliest first
loss = 0.01 * E * sum_e f_e P_e""",
    sources=SOURCES,
    differences=DIFFERENCES,
    build=residual_moe_layer,
    balance=BALANCE,
)

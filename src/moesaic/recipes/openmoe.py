"""OpenMoE, 2024: an open ST-MoE with a dense network beside the experts."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss, z_loss
from moesaic.core.init import normal
from moesaic.dispatch import Capacity
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def openmoe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 32,
    top_k: int = 2,
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    min_capacity: int = 4,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Top-2 of a softmax at its bare probabilities, a capacity, SwiGLU experts, a dense network for every token.

    Args:
        width: D.
        hidden: F, of each expert and of the dense network.
        num_experts: E, 32 in the 8B and 34B models.
        top_k: K.
        capacity_factor: room over a balanced load in training, K counted.
        eval_capacity_factor: the same in evaluation.
        min_capacity: least rows per expert.
        activation: of the gates.
        init_std: 0.02 unless given, ``initializer_range`` of the released configuration.
        kernel: of the experts.
    """
    init, act = drawn(init_std, normal(0.02)), activation_named(activation)
    router = TopKRouter(width, num_experts, top_k=top_k, normalize="scores", init=init)
    experts = GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    dispatch = Capacity(capacity_factor, eval_factor=eval_capacity_factor, minimum=min_capacity)
    shared = SharedExpert(width, hidden, activation=act, init=init)
    return MoELayer(router, experts, dispatch=dispatch, shared=shared)


OPENMOE = Recipe(
    name="openmoe",
    year=2024,
    summary="two of 32 experts at their bare probabilities, beside a dense network; z-loss",
    citation="Xue et al. OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models. 2024. arXiv:2402.01739",
    router="the two best of a softmax, weighted by their probabilities",
    formula="""\
z = W x;  p = softmax(z);  S = the 2 largest of p
each expert takes at most C = max(min_capacity, ceil(capacity_factor * T * K / E)) rows, first choices first
y = sum over rows kept of p_e SwiGLU_e(x) + SwiGLU(x)
loss = 0.02 * E * sum_e f_e P_e + 0.0001 * mean_t logsumexp(z_t)^2,  f_e = share of rows that chose e""",
    sources={
        "num_experts": "table of configurations, 8B/32E and 34B/32E",
        "top_k": "section on the architecture",
        "capacity_factor": "released code, router_capacity_factor_train",
        "eval_capacity_factor": "released code, router_capacity_factor_eval",
        "min_capacity": "released code, router_min_capacity",
        "activation": "released configuration, hidden_act swiglu",
        "init_std": "released configuration, initializer_range",
    },
    differences=(
        "The paper puts the dense network beside the experts, on the same input, as here; the released PyTorch code "
        "puts it behind them, with a norm of its own (as st-moe here). Weights are bare probabilities in flaxformer "
        "and the released code, not renormalised over the two, and no second choice is left to chance. The published "
        "0.01 stands before a loss that counts both choices for each token, and so is 2 at balance; 0.02 here stands "
        "before one that is 1. The released code counts K in the capacity, as here, rounds it down and then up to an "
        "even number. The paper's z-loss of 0.001 on the final softmax is the model's, not the layer's."
    ),
    build=openmoe_layer,
    balance=(
        LossTerm(name="switch", loss=switch_loss, coefficient=2e-2),
        LossTerm(name="z", loss=z_loss, coefficient=1e-4),
    ),
)

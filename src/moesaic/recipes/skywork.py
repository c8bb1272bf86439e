"""Skywork-MoE, 2024: normalised gating logits, and balance that follows what each layer drops."""

from __future__ import annotations

from moesaic.balance import AdaptiveRule, LossTerm, even_gate_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.dispatch import Capacity
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import NormalizedRouter


def skywork_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 16,
    top_k: int = 2,
    sharpness: float = 1.0,
    capacity_factor: float = 1.25,
    min_capacity: int = 4,
    coefficient: float = 0.01,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Softmax of normalised logits, renormalised over the chosen two; a capacity in training alone.

    Args:
        width: D.
        hidden: F.
        num_experts: E, at least 3: the normalised logits of two never change.
        top_k: K.
        sharpness: standard deviation of the normalised logits, the paper's lambda.
        capacity_factor: room of an expert over a balanced load in training.
        min_capacity: least rows per expert in training.
        coefficient: of the balance loss at the first step; a controller moves it by the rows that are dropped.
        activation: of the experts' gates.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    if coefficient < 0:
        raise ConfigError(f"coefficient must be at least 0, got {coefficient}. Skywork-MoE's is 0.01 at most.")
    init = drawn(init_std, normal(0.02))
    router = NormalizedRouter(width, num_experts, top_k=top_k, scale=sharpness, init=init)
    experts = GatedExperts(
        num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init
    )
    # A factor of E / K is room for every token in every expert: evaluation drops nothing.
    dispatch = Capacity(capacity_factor, eval_factor=max(1.0, num_experts / top_k), minimum=min_capacity)
    return MoELayer(router, experts, dispatch=dispatch, coefficient=coefficient)


SKYWORK = Recipe(
    name="skywork",
    year=2024,
    summary="gating logits of one spread; each layer's balance coefficient follows its drop rate",
    citation="Wei et al. Skywork-MoE: A Deep Dive into Training Techniques for MoE. 2024. arXiv:2406.06563",
    router="the two best experts of a softmax over logits normalised token by token, renormalised over the two",
    formula="""\
z = W x + b;  z' = sharpness * (z - mean(z)) / std(z) over the experts of a token
S = the K largest of z';  w = softmax(z' over S);  y = sum_{e in S} w_e SwiGLU_e(x)
in training each expert takes at most C = max(min_capacity, ceil(capacity_factor * T * K / E)) rows
loss = alpha * sum_e (1/E - P_e)^2,  P_e = mean_t softmax(z')_te
after each step, for each layer: alpha <- 0.99 alpha + 0.01 min(share of rows dropped / 5, 0.01)""",
    sources={
        "num_experts": "abstract",
        "top_k": "section 4.1",
        "sharpness": "section 4.1, lambda; 0.5, 1 and 2 were tried",
        "capacity_factor": "not published; Switch's",
        "min_capacity": "not published; 4 in Mesh TensorFlow",
        "coefficient": "not published; the paper's alpha_max",
        "activation": "Skywork-13B, which it grew from",
        "init_std": "not published",
    },
    differences=(
        "The paper measures the rate of dropped tokens without giving its capacity, nor the first alpha. The standard "
        "deviation is the population's, which the paper leaves open; related code (MoE++) takes the sample's, "
        "sqrt(E / (E - 1)) more, and leaves the mean in, which softmax does not see. A millionth is added to the "
        "variance, so that equal logits stay equal. The released model grew from a dense one; this builds the layer "
        "from fresh weights."
    ),
    build=skywork_layer,
    balance=(
        LossTerm(name="even-gate", loss=even_gate_loss, coefficient=1.0, adaptive=True),
        AdaptiveRule(xi=0.2, alpha_max=0.01, beta=0.99),
    ),
)

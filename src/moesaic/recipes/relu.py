"""ReMoE, 2024: ReLU in place of top-k, and a coefficient that finds the wanted sparsity."""

from __future__ import annotations

from moesaic.balance import LossTerm, SparsityRule, l1_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import ReLURouter


def relu_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 8,
    top_k: int = 1,
    coefficient: float = 1e-8,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Every expert of positive logit runs, weighted by the logit.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: average experts per token that training comes to; at first it is about half of all.
        coefficient: first coefficient of the L1 loss; a controller moves it.
        activation: of the experts' gates.
        init_std: 0.01 unless given.
        kernel: of the experts.
    """
    if coefficient <= 0:
        raise ConfigError(f"coefficient must be positive, got {coefficient}. ReMoE starts at 1e-8.")
    init = drawn(init_std, normal(0.01))
    router = ReLURouter(width, num_experts, top_k=top_k, init=init)
    act = activation_named(activation)
    experts = GatedExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    return MoELayer(router, experts, coefficient=coefficient)


RELU = Recipe(
    name="relu",
    year=2024,
    summary="experts of positive logit run; an L1 loss that adapts leaves as many of them as wished",
    citation=(
        "Wang, Chen, Zhu. ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing. ICLR 2025. arXiv:2412.14711"
    ),
    router="every expert whose logit is positive, weighted by the logit; no choice, no normalisation",
    formula="""\
g = relu(W x);  y = sum_e g_e SwiGLU_e(x)
loss = lambda * E / (k T^2) * sum_e (sum_t g_te) n_e,  n_e = tokens with g_te > 0
after each step: lambda = lambda * 1.2^sign((1 - k/E) - sparsity),  first 1e-8, one for all layers
sparsity = share of all (token, expert) pairs with g_te = 0""",
    sources={
        "num_experts": "authors' script for 182M parameters",
        "top_k": "authors' script",
        "coefficient": "paper and authors' script, lambda_0",
        "activation": "authors' script",
        "init_std": "authors' script, init-method-std",
    },
    differences=(
        "The paper averages the loss over layers, the authors' code adds it up, as this does; the coefficient "
        "adapts to either. Where sparsity is exactly as wished the coefficient stays, as in the paper's sign; the "
        "code's comparison lowers it. The coefficient never falls below the least normal float32."
    ),
    build=relu_layer,
    balance=(LossTerm(name="l1", loss=l1_loss, coefficient=1.0, adaptive=True), SparsityRule(factor=1.2)),
)

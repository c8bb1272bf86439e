"""MixLoRA, 2024: two of eight low-rank experts per token around one frozen feed-forward network."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.init import normal
from moesaic.experts import LoRAExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import TopKRouter


def mixlora_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 8,
    top_k: int = 2,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    jitter: float = 0.0,
    train_base: bool = False,
    activation: str = "silu",
    init_std: float | None = None,
) -> MoELayer:
    """Top-2 of a softmax, renormalised; each expert is the frozen network with low-rank changes.

    Args:
        width: D.
        hidden: F of the frozen network.
        num_experts: E.
        top_k: K.
        rank: of the changes.
        alpha: they are scaled by ``alpha / rank``.
        dropout: of their input in training.
        jitter: width of the noise on the router's input in training.
        train_base: let the network train too.
        activation: of its gate.
        init_std: of the network, the router and the changes' first factors; None for 0.02 and Kaiming's uniform. The
            second factors start at 0 always.
    """
    router = TopKRouter(width, num_experts, top_k=top_k, jitter=jitter, init=drawn(init_std, normal(0.02)))
    experts = LoRAExperts(
        num_experts,
        width,
        hidden,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        activation=activation_named(activation),
        train_base=train_base,
        init=None if init_std is None else normal(init_std),
    )
    return MoELayer(router, experts)


MIXLORA = Recipe(
    name="mixlora",
    year=2024,
    summary="two of eight low-rank experts per token, around one frozen feed-forward network",
    citation="Li et al. MixLoRA: Fine-Tuning with LoRA-based Mixture of Experts. 2024. arXiv:2404.15159",
    router="the two best experts of a softmax, renormalised over the two",
    formula="""\
z = V x;  S = the K largest of z;  w = softmax(z over S)
FFN_e: the frozen SwiGLU, each matrix W replaced by W + alpha / rank * B_e A_e (dropout before A_e)
y = sum_{e in S} w_e FFN_e(x)
loss = 0.01 * E * sum_e f_e P_e over all K choices""",
    sources={
        "num_experts": "section 4, and authors' code",
        "top_k": "section 4, and authors' code",
        "rank": "section 4; 8 in the README of the authors' code",
        "alpha": "section 4; 16 in the README of the authors' code",
        "dropout": "section 4, and authors' code",
        "jitter": "authors' code, jitter_noise",
        "train_base": "section 3, frozen",
        "activation": "LLaMA-2 (2023)",
        "init_std": "authors' code, router_init_range and Kaiming's uniform",
    },
    differences=(
        "The code's default coefficient is 0.001, its README and the paper have 0.01, used here. MixLoRA also puts "
        "ordinary LoRA on attention, which is outside this layer."
    ),
    build=mixlora_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),),
)

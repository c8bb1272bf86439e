"""X-MoE, 2022: routing by direction on a small sphere, against the collapse of representations."""

from __future__ import annotations

from moesaic.balance import LossTerm, switch_loss
from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import CosineRouter, sigmoid, softmax

_SCORES = {"softmax": (softmax, 0.3), "sigmoid": (sigmoid, 0.07)}


def cosine_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 32,
    top_k: int = 1,
    inner_width: int | None = None,
    score: str = "softmax",
    temperature: float | None = None,
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Project the token to a few dimensions, choose the expert whose embedding points the same way.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: experts per token; 1 as published, more works the same way.
        inner_width: dimensions of the sphere; None for E / 2 as published, at least 2.
        score: "softmax" over experts or "sigmoid" of each.
        temperature: that cosines are divided by at first; None for 0.3 with softmax, 0.07 with sigmoid.
        activation: of the experts.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    if score not in _SCORES:
        raise ConfigError(f"score must be one of {', '.join(_SCORES)}, got {score!r}. X-MoE has both.")
    score_function, published = _SCORES[score]
    init = drawn(init_std, normal(0.02))
    router = CosineRouter(
        width,
        num_experts,
        top_k=top_k,
        inner_width=max(2, num_experts // 2) if inner_width is None else inner_width,
        score=score_function,
        temperature=published if temperature is None else temperature,
        init=init,
    )
    act = activation_named(activation)
    return MoELayer(router, MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init))


COSINE = Recipe(
    name="cosine",
    year=2022,
    summary="experts scored by the cosine with a token in few dimensions, over a learned temperature",
    citation=("Chi et al. On the Representation Collapse of Sparse Mixture of Experts. NeurIPS 2022. arXiv:2204.09179"),
    router="one expert per token by the cosine in a few dimensions, weighted by its score",
    formula="""\
s_e = cos(W x, v_e);  p = softmax(s / tau) or sigmoid(s / tau),  tau learned
e* = argmax_e s_e;  y = p_e* FFN_e*(x)
loss = 0.01 * E * sum_e f_e P_e,  f_e = share of rows that chose e,  P_e = mean_t p_te / sum_e p_te""",
    sources={
        "num_experts": "experiments of the paper",
        "top_k": "paper",
        "inner_width": "paper, half the number of experts: 16 for 32",
        "score": "paper, both; softmax first",
        "temperature": "paper, 0.3 for softmax and 0.07 for sigmoid",
        "activation": "authors' code (torchscale)",
        "init_std": "ours",
    },
    differences=(
        "This is the paper's definition; its numbers, and that its balance loss is Switch's, are from memory. The "
        "authors' code (torchscale) normalises only experts, rescales them in place to length 1.5 in every forward, "
        "and divides by no temperature. The temperature is learned as its logarithm here (Tutel does too), so that it "
        "stays positive; vectors shorter than 1e-4 are not stretched to length 1. Nothing is dropped. "
        "The paper freezes the router in fine-tuning: call layer.router.requires_grad_(False)."
    ),
    build=cosine_layer,
    balance=(LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),),
)

"""PanGu-Σ, 2023: random routed experts, a fixed random table within each domain's own experts."""

from __future__ import annotations

from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn, one_choice
from moesaic.routers import DomainHashRouter


def pangu_sigma_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 640,
    top_k: int = 1,
    num_domains: int | None = None,
    vocab_size: int = 40_000,
    seed: int = 0,
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Look up each token's expert in the random table of its text's domain.

    Args:
        width: D.
        hidden: F.
        num_experts: E, of all domains together.
        top_k: 1; nothing else is published.
        num_domains: None for 4 as published, and for 1 where 4 does not divide the experts.
        vocab_size: of the model's tokenizer; ids beyond it are an error.
        seed: of the random tables; the same in every layer unless given.
        activation: of the experts.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    one_choice("pangu-sigma", top_k)
    if num_domains is None:
        num_domains = 1 if num_experts % 4 else 4
    router = DomainHashRouter(num_experts, vocab_size=vocab_size, num_domains=num_domains, seed=seed)
    act = activation_named(activation)
    init = drawn(init_std, normal(0.02))
    experts = MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    return MoELayer(router, experts)


PANGU_SIGMA = Recipe(
    name="pangu-sigma",
    year=2023,
    summary="experts of each domain apart, and a fixed random table from token ids among them",
    citation="Ren et al. PanGu-Σ: Towards Trillion Parameter Language Model. 2023. arXiv:2303.10845",
    router="a fixed random table from token ids to the experts of the text's domain",
    formula="""\
table[q, v] drawn uniformly from the E / Q experts of domain q, once, for each id v
y_t = FFN_{table[domain_t, id_t]}(x_t)""",
    sources={
        "num_experts": "640 in each of the top 8 layers",
        "top_k": "one table gives one expert",
        "num_domains": "Chinese, English, bilingual, code",
        "vocab_size": "released PanGu-α, whose model this extends; pass your tokenizer's",
        "seed": "any: the paper's tables are random and not released",
        "activation": "GELU in PanGu-α",
    },
    differences=(
        "The published model has such layers only at the top, 8 of 40. Tables are drawn here from a seed and saved "
        "with the model. Balance losses and controllers have nothing to train here."
    ),
    build=pangu_sigma_layer,
)

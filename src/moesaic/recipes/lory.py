"""Lory, 2024: experts merged anew for every segment, routed by the segment before it."""

from __future__ import annotations

from moesaic.core.init import normal
from moesaic.experts import GatedExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.merge import MergedMoE
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers.pooled import PooledRouter


def lory_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 8,
    segment: int = 256,
    activation: str = "silu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MergedMoE:
    """Route each segment by the mean of the one before it, average the experts' weights, run the average.

    Args:
        width: D.
        hidden: F.
        num_experts: E; 8, 16 and 32 in the paper.
        segment: tokens of a segment. A sequence must be longer than one for the router to learn anything.
        activation: of the experts' gates.
        init_std: 0.02 unless given.
        kernel: of the merged networks.
    """
    init = drawn(init_std, normal(0.02))
    router = PooledRouter(width, num_experts, init=init)
    experts = GatedExperts(
        num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init
    )
    return MergedMoE(router, experts, segment=segment)


LORY = Recipe(
    name="lory",
    year=2024,
    summary="one network per segment of 256 tokens, merged by what the segment before it was about",
    citation="Zhong, Xia, Chen, Lewis. Lory: Fully Differentiable Mixture-of-Experts. 2024. arXiv:2405.03133",
    router="one softmax over experts for each segment, from the mean of the segment before it",
    formula="""\
e_k = softmax(R mean over segment k of x)
segment k runs FFN(x; sum_i e_(k-1),i W_i); the first runs with its own e_1, through which no gradient passes
no loss""",
    sources={
        "num_experts": "section 4.1",
        "segment": "section 3.2",
        "activation": "section 4.1, the architecture of LLaMA",
        "init_std": "LLaMA (2023)",
    },
    differences=(
        "A segment's network depends on earlier segments only, but the first one's on all of its own tokens: so the "
        "layer as trained is not strictly causal. The authors generate with the network merged once from the prompt, "
        "MergedMoE.for_prompt here. They start from a dense model after 5 % of training, and batch similar documents "
        "together; both are outside the layer."
    ),
    build=lory_layer,
    causality="never",
)

"""DeepSpeed-MoE: GPT with 128 experts in every other layer, and its pyramid with a dense network beside the experts."""

from __future__ import annotations

from moesaic.zoo.layers import Attention, Dense, Experts, Feed, Layer
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

_PAPER = "Rajbhandari et al. DeepSpeed-MoE. ICML 2022, arXiv:2201.05596."
_OPEN = "A vocabulary of 51,200, 2,048 learned positions and GPT's biases are assumed."


def _deepspeed(
    name: str,
    total: str,
    *,
    width: int,
    head_dim: int,
    experts: tuple[int, ...],
    residual: bool = False,
    note: str = "",
) -> ModelShape:
    attention = Attention(heads=16, kv_heads=16, head_dim=head_dim, qkv_bias=True, out_bias=True)
    dense = Dense(hidden=4 * width, gated=False, bias=True)
    layers = []
    for index in range(24):
        feeds: tuple[Feed, ...] = (dense,)
        if index % 2:
            mixture = Experts(num_experts=experts[index // 2], top_k=1, hidden=4 * width, gated=False, bias=True)
            feeds = (dense, mixture) if residual else (mixture,)
        layers.append(Layer(mixers=(attention,), feeds=feeds))
    return ModelShape(
        name=name,
        year=2022,
        width=width,
        vocab=51_200,
        layers=tuple(layers),
        tied=True,
        positions=2048,
        norm="layer",
        activation="GELU",
        citation=_PAPER,
        source="paper, table 1; vocabulary from memory",
        open=_OPEN,
        published=Published(total=total, source="paper, table 1", note=note),
    )


_PYRAMID = "The paper prints one digit."

MODELS = (
    _deepspeed("deepspeed-350m-moe-128", "13B", width=1024, head_dim=64, experts=(128,) * 12),
    _deepspeed("deepspeed-1.3b-moe-128", "52B", width=2048, head_dim=128, experts=(128,) * 12),
    _deepspeed(
        "pr-moe-350m-32-64", "4B", width=1024, head_dim=64, experts=(32,) * 10 + (64,) * 2, residual=True, note=_PYRAMID
    ),
    _deepspeed("pr-moe-1.3b-64-128", "31B", width=2048, head_dim=128, experts=(64,) * 10 + (128,) * 2, residual=True),
)

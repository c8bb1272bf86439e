"""gpt-oss, GLM-4.5 and Llama 4."""

from __future__ import annotations

from dataclasses import replace

from moesaic.zoo.layers import Attention, Dense, Experts, Layer
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

_GPT_OSS = "OpenAI. gpt-oss-120b and gpt-oss-20b model card. arXiv:2508.10925."
_GLM = "GLM-4.5 team. GLM-4.5. arXiv:2508.06471."
_LLAMA = "Meta. Llama 4. April 2025."


def _gpt_oss(name: str, total: str, active: str, *, depth: int, experts: int) -> ModelShape:
    full = Attention(heads=64, kv_heads=8, head_dim=64, qkv_bias=True, out_bias=True, sinks=True)
    feeds = (Experts(num_experts=experts, top_k=4, hidden=2880, bias=True, router_bias=True),)
    return ModelShape(
        name=name,
        year=2025,
        width=2880,
        vocab=201_088,
        layers=(
            Layer(mixers=(replace(full, window=128),), feeds=feeds),
            Layer(mixers=(full,), feeds=feeds),
        )
        * (depth // 2),
        activation="SwiGLU, clamped",
        citation=_GPT_OSS,
        source="repository openai/gpt-oss",
        published=Published(total=total, active=active, active_without="input embedding", source="model card, table 1"),
    )


def _glm(
    name: str, total: str, active: str, *, width: int, dense: Layer, sparse: int, num_dense: int, mixture: Experts
) -> ModelShape:
    return ModelShape(
        name=name,
        year=2025,
        width=width,
        vocab=151_552,
        layers=(dense,) * num_dense + (replace(dense, feeds=(mixture,)),) * sparse,
        citation=_GLM,
        source="paper, table 1; defaults of transformers",
        checked=name == "glm-4.5-air",
        open="The layer that predicts a second token is not counted; the published total may hold it.",
        published=Published(total=total, active=active, active_without="embeddings", source="paper, table 1"),
    )


_GLM_ATTENTION = Attention(heads=96, kv_heads=8, head_dim=128, qkv_bias=True)
_LLAMA_ATTENTION = (Attention(heads=40, kv_heads=8, head_dim=128),)

MODELS = (
    _gpt_oss("gpt-oss-20b", "20.91B", "3.61B", depth=24, experts=32),
    _gpt_oss("gpt-oss-120b", "116.83B", "5.13B", depth=36, experts=128),
    _glm(
        "glm-4.5",
        "355B",
        "32B",
        width=5120,
        dense=Layer(mixers=(replace(_GLM_ATTENTION, qk_norm="head"),), feeds=(Dense(hidden=12_288),)),
        num_dense=3,
        sparse=89,
        mixture=Experts(num_experts=160, top_k=8, hidden=1536, shared_hidden=1536, selection_bias=True),
    ),
    _glm(
        "glm-4.5-air",
        "106B",
        "12B",
        width=4096,
        dense=Layer(mixers=(_GLM_ATTENTION,), feeds=(Dense(hidden=10_944),)),
        num_dense=1,
        sparse=45,
        mixture=Experts(num_experts=128, top_k=8, hidden=1408, shared_hidden=1408, selection_bias=True),
    ),
    ModelShape(
        name="llama-4-scout",
        year=2025,
        width=5120,
        vocab=202_048,
        layers=(
            Layer(mixers=_LLAMA_ATTENTION, feeds=(Experts(num_experts=16, top_k=1, hidden=8192, shared_hidden=8192),)),
        )
        * 48,
        citation=_LLAMA,
        source="code of transformers; sizes from memory",
        checked=False,
        open="Attention in chunks of 8,192 tokens, in three layers of four, is counted as if all tokens were seen.",
        published=Published(
            total="109B", active="17B", source="release notes", note="109B holds what sees images; counted is the text."
        ),
    ),
    ModelShape(
        name="llama-4-maverick",
        year=2025,
        width=5120,
        vocab=202_048,
        layers=(
            Layer(mixers=_LLAMA_ATTENTION, feeds=(Dense(hidden=16_384),)),
            Layer(mixers=_LLAMA_ATTENTION, feeds=(Experts(num_experts=128, top_k=1, hidden=8192, shared_hidden=8192),)),
        )
        * 24,
        citation=_LLAMA,
        source="code of transformers; sizes from memory",
        checked=False,
        published=Published(total="400B", active="17B", source="release notes"),
    ),
)

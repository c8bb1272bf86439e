"""Models whose layers differ: Jamba, MiniMax-01, Snowflake Arctic, Yuan 2.0-M32."""

from __future__ import annotations

from moesaic.zoo.layers import Attention, Dense, Experts, Layer, LinearAttention, Mamba
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

_JAMBA_FEEDS = (Dense(hidden=14_336), Experts(num_experts=16, top_k=2, hidden=14_336))
_JAMBA_MIXERS = (
    Mamba(inner=8192, state=16, conv=4, dt_rank=256, norms=True),
    Attention(heads=32, kv_heads=8, head_dim=128),
)
_MINIMAX_FEEDS = (Experts(num_experts=32, top_k=2, hidden=9216),)

MODELS = (
    ModelShape(
        name="jamba-v0.1",
        year=2024,
        width=4096,
        vocab=65_536,
        layers=tuple(
            Layer(mixers=(_JAMBA_MIXERS[index % 8 == 4],), feeds=(_JAMBA_FEEDS[index % 2],)) for index in range(32)
        ),
        citation="Lieber et al. Jamba. arXiv:2403.19887.",
        source="paper; defaults of transformers",
        published=Published(total="51.6B", active="12B", source="model card; paper"),
    ),
    ModelShape(
        name="minimax-text-01",
        year=2025,
        width=6144,
        vocab=200_064,
        layers=(
            *[Layer(mixers=(LinearAttention(heads=64, head_dim=128),), feeds=_MINIMAX_FEEDS)] * 7,
            Layer(mixers=(Attention(heads=64, kv_heads=8, head_dim=128),), feeds=_MINIMAX_FEEDS),
        )
        * 10,
        citation="MiniMax. MiniMax-01. arXiv:2501.08313.",
        source="README of its repository",
        published=Published(total="456B", active="45.9B", active_without="embeddings", source="README"),
    ),
    ModelShape(
        name="arctic",
        year=2024,
        width=7168,
        vocab=32_000,
        layers=(
            Layer(
                mixers=(Attention(heads=56, kv_heads=8, head_dim=128),),
                # A dense network beside the experts, as wide as the model.
                feeds=(Dense(hidden=7168), Experts(num_experts=128, top_k=2, hidden=4864)),
                norms=3,
            ),
        )
        * 35,
        citation="Snowflake. Arctic. April 2024.",
        source="README of its repository",
        published=Published(total="480B", active="17B", source="README", note="17B is 17.3B recounted."),
    ),
    ModelShape(
        name="yuan-2.0-m32",
        year=2024,
        width=2048,
        vocab=135_040,
        layers=(
            Layer(
                mixers=(Attention(heads=16, kv_heads=16, head_dim=256),),
                # Queries, keys and values of the experts: the attention router.
                feeds=(Experts(num_experts=32, top_k=2, hidden=8192, router_maps=3),),
            ),
        )
        * 24,
        citation="Wu et al. Yuan 2.0-M32. arXiv:2405.17976.",
        source="paper; the vocabulary from memory",
        open="The filters before attention are not counted: their sizes are not in our sources.",
        published=Published(total="40B", active="3.7B", source="paper"),
    ),
)

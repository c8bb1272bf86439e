"""Mixtral, and those of its layout: Phi-3.5-MoE, DBRX, Grok-1."""

from __future__ import annotations

from moesaic.zoo.layers import Attention, Experts, Layer
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

MODELS = (
    ModelShape(
        name="mixtral-8x7b",
        year=2023,
        width=4096,
        vocab=32_000,
        layers=(
            Layer(
                mixers=(Attention(heads=32, kv_heads=8, head_dim=128),),
                feeds=(Experts(num_experts=8, top_k=2, hidden=14_336),),
            ),
        )
        * 32,
        citation="Jiang et al. Mixtral of Experts. arXiv:2401.04088.",
        source="paper, table 1; configuration in litgpt",
        published=Published(total="46.7B", active="12.9B", source="release notes of Mistral AI, December 2023"),
    ),
    ModelShape(
        name="mixtral-8x22b",
        year=2024,
        width=6144,
        vocab=32_768,
        layers=(
            Layer(
                mixers=(Attention(heads=48, kv_heads=8, head_dim=128),),
                feeds=(Experts(num_experts=8, top_k=2, hidden=16_384),),
            ),
        )
        * 56,
        citation="Mistral AI. Mixtral 8x22B. April 2024.",
        source="configuration in litgpt",
        published=Published(total="141B", active="39B", source="release notes of Mistral AI, April 2024"),
    ),
    ModelShape(
        name="dbrx",
        year=2024,
        width=6144,
        vocab=100_352,
        layers=(
            Layer(
                mixers=(Attention(heads=48, kv_heads=8, head_dim=128),),
                feeds=(Experts(num_experts=16, top_k=4, hidden=10_752),),
            ),
        )
        * 40,
        citation="Databricks. DBRX. March 2024.",
        source="repository databricks/dbrx",
        published=Published(total="132B", active="36B", source="repository databricks/dbrx"),
    ),
    ModelShape(
        name="grok-1",
        year=2024,
        width=6144,
        vocab=131_072,
        layers=(
            Layer(
                mixers=(Attention(heads=48, kv_heads=8, head_dim=128),),
                feeds=(Experts(num_experts=8, top_k=2, hidden=32_768),),
                norms=4,
            ),
        )
        * 64,
        tied=True,
        activation="GELU, gated",
        citation="xAI. Grok-1. March 2024.",
        source="repository xai-org/grok-1",
        published=Published(
            total="314B", active="86B", source="repository xai-org/grok-1", note="86B could not be reached: 83.8B."
        ),
    ),
    ModelShape(
        name="phi-3.5-moe",
        year=2024,
        width=4096,
        vocab=32_064,
        layers=(
            Layer(
                mixers=(Attention(heads=32, kv_heads=8, head_dim=128, qkv_bias=True, out_bias=True),),
                feeds=(Experts(num_experts=16, top_k=2, hidden=6400),),
            ),
        )
        * 32,
        norm="layer",
        head_bias=True,
        citation="Abdin et al. Phi-3 technical report. arXiv:2404.14219.",
        source="defaults of transformers",
        published=Published(total="41.9B", active="6.6B", source="model card"),
    ),
)

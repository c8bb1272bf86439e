"""Qwen's mixtures and OLMoE."""

from __future__ import annotations

from moesaic.zoo.layers import Attention, Experts, Layer
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

_QWEN3 = "Yang et al. Qwen3 technical report. arXiv:2505.09388."

MODELS = (
    ModelShape(
        name="qwen1.5-moe-a2.7b",
        year=2024,
        width=2048,
        vocab=151_936,
        layers=(
            Layer(
                mixers=(Attention(heads=16, kv_heads=16, head_dim=128, qkv_bias=True),),
                feeds=(Experts(num_experts=60, top_k=4, hidden=1408, shared_hidden=5632, shared_gate=True),),
            ),
        )
        * 24,
        citation="Qwen team. Qwen1.5-MoE. February 2024.",
        source="defaults of transformers",
        published=Published(total="14.3B", active="2.7B", source="release notes"),
    ),
    ModelShape(
        name="qwen2-57b-a14b",
        year=2024,
        width=3584,
        vocab=151_936,
        layers=(
            Layer(
                mixers=(Attention(heads=28, kv_heads=4, head_dim=128, qkv_bias=True),),
                feeds=(Experts(num_experts=64, top_k=8, hidden=2560, shared_hidden=20_480, shared_gate=True),),
            ),
        )
        * 28,
        citation="Yang et al. Qwen2 technical report. arXiv:2407.10671.",
        source="report, table 1; in part from memory",
        checked=False,
        published=Published(total="57.4B", active="14.2B", source="model card", checked=False),
    ),
    ModelShape(
        name="qwen3-30b-a3b",
        year=2025,
        width=2048,
        vocab=151_936,
        layers=(
            Layer(
                mixers=(Attention(heads=32, kv_heads=4, head_dim=128, qk_norm="head"),),
                feeds=(Experts(num_experts=128, top_k=8, hidden=768),),
            ),
        )
        * 48,
        citation=_QWEN3,
        source="report, table 2; code of transformers",
        published=Published(total="30.5B", active="3.3B", source="model card"),
    ),
    ModelShape(
        name="qwen3-235b-a22b",
        year=2025,
        width=4096,
        vocab=151_936,
        layers=(
            Layer(
                mixers=(Attention(heads=64, kv_heads=4, head_dim=128, qk_norm="head"),),
                feeds=(Experts(num_experts=128, top_k=8, hidden=1536),),
            ),
        )
        * 94,
        citation=_QWEN3,
        source="report, table 2; code of transformers",
        published=Published(total="235B", active="22B", source="model card"),
    ),
    ModelShape(
        name="olmoe-1b-7b",
        year=2024,
        width=2048,
        vocab=50_304,
        layers=(
            Layer(
                mixers=(Attention(heads=16, kv_heads=16, head_dim=128, qk_norm="full"),),
                feeds=(Experts(num_experts=64, top_k=8, hidden=1024),),
            ),
        )
        * 16,
        citation="Muennighoff et al. OLMoE. ICLR 2025, arXiv:2409.02060.",
        source="paper, table 1; its released configuration",
        published=Published(total="6.9B", active="1.3B", source="paper"),
    ),
)

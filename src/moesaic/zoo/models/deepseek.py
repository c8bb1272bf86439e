"""DeepSeekMoE, DeepSeek-V2, DeepSeek-V3 and Kimi-K2, which has V3's layout."""

from __future__ import annotations

from moesaic.zoo.layers import Attention, Dense, Experts, LatentAttention, Layer, Mixer
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

_FINE = "Dai et al. DeepSeekMoE. ACL 2024, arXiv:2401.06066."
_V2 = "DeepSeek-AI. DeepSeek-V2. arXiv:2405.04434."


def _stack(mixer: Mixer, *, dense: int, dense_hidden: int, sparse: int, mixture: Experts) -> tuple[Layer, ...]:
    """Dense layers, then sparse ones."""
    first = Layer(mixers=(mixer,), feeds=(Dense(hidden=dense_hidden),))
    return (first,) * dense + (Layer(mixers=(mixer,), feeds=(mixture,)),) * sparse


def _latent(heads: int, q_rank: int | None) -> LatentAttention:
    return LatentAttention(heads=heads, q_rank=q_rank, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)


MODELS = (
    ModelShape(
        name="deepseek-moe-2b",
        year=2024,
        width=1280,
        vocab=8000,
        layers=_stack(
            Attention(heads=10, kv_heads=10, head_dim=128),
            dense=0,
            dense_hidden=0,
            sparse=9,
            mixture=Experts(num_experts=63, top_k=7, hidden=853, shared_hidden=853),
        ),
        citation=_FINE,
        source="paper, section 4; an expert's width is a quarter of 8/3 of the model's",
        open="The paper gives the vocabulary as 8K.",
        published=Published(total="2.0B", active="0.3B", source="paper, table 1"),
    ),
    ModelShape(
        name="deepseek-moe-16b",
        year=2024,
        width=2048,
        vocab=102_400,
        layers=_stack(
            Attention(heads=16, kv_heads=16, head_dim=128),
            dense=1,
            dense_hidden=10_944,
            sparse=27,
            mixture=Experts(num_experts=64, top_k=6, hidden=1408, shared_hidden=2816),
        ),
        citation=_FINE,
        source="paper, section 5",
        published=Published(total="16.4B", active="2.8B", source="paper, section 5"),
    ),
    ModelShape(
        name="deepseek-moe-145b",
        year=2024,
        width=4096,
        vocab=102_400,
        layers=_stack(
            Attention(heads=32, kv_heads=32, head_dim=128),
            dense=1,
            dense_hidden=10_944,
            sparse=61,
            mixture=Experts(num_experts=128, top_k=12, hidden=1408, shared_hidden=5632),
        ),
        citation=_FINE,
        source="paper, section 7; an expert's width and the vocabulary worked out from its totals",
        open="The width of the first layer's dense network is taken from the 16B model.",
        published=Published(total="144.6B", active="22.2B", source="paper, section 7"),
    ),
    ModelShape(
        name="deepseek-v2-lite",
        year=2024,
        width=2048,
        vocab=102_400,
        layers=_stack(
            _latent(16, None),
            dense=1,
            dense_hidden=10_944,
            sparse=26,
            mixture=Experts(num_experts=64, top_k=6, hidden=1408, shared_hidden=2816),
        ),
        citation=_V2,
        source="configuration of the DeepSeek-V3 repository",
        published=Published(total="15.7B", active="2.4B", active_without="input embedding", source="paper, appendix B"),
    ),
    ModelShape(
        name="deepseek-v2",
        year=2024,
        width=5120,
        vocab=102_400,
        layers=_stack(
            _latent(128, 1536),
            dense=1,
            dense_hidden=12_288,
            sparse=59,
            mixture=Experts(num_experts=160, top_k=6, hidden=1536, shared_hidden=3072, groups=8, groups_kept=3),
        ),
        citation=_V2,
        source="paper, section 3; configuration of the DeepSeek-V3 repository",
        published=Published(total="236B", active="21B", active_without="input embedding", source="paper"),
    ),
    ModelShape(
        name="deepseek-v3",
        year=2024,
        width=7168,
        vocab=129_280,
        layers=_stack(
            _latent(128, 1536),
            dense=3,
            dense_hidden=18_432,
            sparse=58,
            mixture=Experts(
                num_experts=256, top_k=8, hidden=2048, shared_hidden=2048, groups=8, groups_kept=4, selection_bias=True
            ),
        ),
        citation="DeepSeek-AI. DeepSeek-V3 technical report. arXiv:2412.19437.",
        source="paper, section 4.2; configuration of its repository",
        open="The module that predicts a second token (11.5B of its own) is not counted, nor in the published 671B.",
        published=Published(total="671B", active="37B", active_without="input embedding", source="paper"),
    ),
    ModelShape(
        name="kimi-k2",
        year=2025,
        width=7168,
        vocab=163_840,
        layers=_stack(
            _latent(64, 1536),
            dense=1,
            dense_hidden=18_432,
            sparse=60,
            mixture=Experts(num_experts=384, top_k=8, hidden=2048, shared_hidden=2048, selection_bias=True),
        ),
        citation="Moonshot AI. Kimi K2. arXiv:2507.20534.",
        source="README of its repository; configuration in Megatron",
        published=Published(
            total="1.04T",
            active="32B",
            active_without="input embedding",
            source="paper",
            note="1.04T is what 61 sparse layers would have; the released configuration has 60 and a dense one.",
        ),
    ),
)

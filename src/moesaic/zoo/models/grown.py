"""Mixtures made from a dense model, and OpenMoE: LLaMA-MoE, Skywork-MoE, OpenMoE."""

from __future__ import annotations

from moesaic.zoo.layers import Attention, Dense, Experts, Feed, Layer
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

_LLAMA_MOE = "Zhu et al. LLaMA-MoE. EMNLP 2024, arXiv:2406.16554."
_OPENMOE = "Xue et al. OpenMoE. ICML 2024, arXiv:2402.01739."


def _llama_moe(name: str, active: str, *, experts: int, top_k: int) -> ModelShape:
    # The 11,008 neurons of LLaMA-2's network, dealt out; a gate of two maps with a tanh between, and one for noise.
    mixture = Experts(
        num_experts=experts, top_k=top_k, hidden=11_008 // experts, router_maps=2, router_extra=experts**2
    )
    return ModelShape(
        name=name,
        year=2023,
        width=4096,
        vocab=32_000,
        layers=(Layer(mixers=(Attention(heads=32, kv_heads=32, head_dim=128),), feeds=(mixture,)),) * 32,
        citation=_LLAMA_MOE,
        source="repository pjlab-sys4nlp/llama-moe; the gate's form from memory",
        published=Published(total="6.7B", active=active, source="README of the repository"),
    )


def _openmoe(
    name: str, total: str, active: str, *, width: int, depth: int, heads: int, head_dim: int, experts: int, every: int
) -> ModelShape:
    dense = Dense(hidden=4 * width)
    mixture = Experts(num_experts=experts, top_k=2, hidden=4 * width)
    layers = []
    for index in range(depth):
        feeds: tuple[Feed, ...] = (dense, mixture) if index % every == every - 1 else (dense,)
        layers.append(Layer(mixers=(Attention(heads=heads, kv_heads=heads, head_dim=head_dim),), feeds=feeds))
    return ModelShape(
        name=name,
        year=2024,
        width=width,
        vocab=256_384,
        layers=tuple(layers),
        tied=True,
        citation=_OPENMOE,
        source="paper, tables of configurations",
        published=Published(
            total=total,
            active=active,
            source="paper; its active number with embeddings",
            note="The paper's 34B is 34.6B recounted." if total == "34B" else "",
        ),
    )


MODELS = (
    _llama_moe("llama-moe-3.5b-4-16", "3.5B", experts=16, top_k=4),
    _llama_moe("llama-moe-3.5b-2-8", "3.5B", experts=8, top_k=2),
    _llama_moe("llama-moe-3.0b-2-16", "3.0B", experts=16, top_k=2),
    ModelShape(
        name="skywork-moe",
        year=2024,
        width=4608,
        vocab=65_536,
        layers=(
            Layer(
                mixers=(Attention(heads=36, kv_heads=36, head_dim=128),),
                feeds=(Experts(num_experts=16, top_k=2, hidden=12_288, router_bias=True),),
            ),
        )
        * 52,
        citation="Wei et al. Skywork-MoE. arXiv:2406.06563.",
        source="paper",
        open="As many key-value heads as query heads are assumed.",
        published=Published(total="146B", active="22B", source="paper", note="22B is 22.7B recounted."),
    ),
    _openmoe("openmoe-base-16e", "650M", "339M", width=768, depth=12, heads=12, head_dim=64, experts=16, every=4),
    _openmoe("openmoe-8b-32e", "8.7B", "2.6B", width=2048, depth=24, heads=24, head_dim=128, experts=32, every=6),
    _openmoe("openmoe-34b-32e", "34B", "6.8B", width=3072, depth=32, heads=24, head_dim=128, experts=32, every=4),
)

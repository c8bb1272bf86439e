"""GLaM and PanGu-Σ: decoders scaled up by experts."""

from __future__ import annotations

from dataclasses import replace

from moesaic.zoo.layers import Attention, Dense, Experts, Layer
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

_GLAM = "Du et al. GLaM. ICML 2022, arXiv:2112.06905."
_GLAM_OPEN = (
    "Dense networks are gated and experts are not: the paper does not say so of experts, its totals need it. "
    "The vocabulary is taken as 256,000; the paper says 256K."
)
_ACTIVE = "The paper's active numbers of its smaller models could not be reached with any convention."


def _glam(
    name: str,
    total: str,
    active: str,
    *,
    width: int,
    hidden: int,
    heads: int,
    head_dim: int,
    depth: int,
    note: str = "",
) -> ModelShape:
    attention = Attention(heads=heads, kv_heads=heads, head_dim=head_dim)
    dense = Dense(hidden=hidden)
    sparse = Experts(num_experts=64, top_k=2, hidden=hidden, gated=False)
    first = Layer(mixers=(replace(attention, buckets=32),), feeds=(dense,))
    others = [Layer(mixers=(attention,), feeds=(sparse if index % 2 else dense,)) for index in range(1, depth)]
    large = name == "glam-64b-64e"
    return ModelShape(
        name=name,
        year=2021,
        width=width,
        vocab=256_000,
        layers=(first, *others),
        tied=True,
        activation="GELU, gated in dense networks",
        citation=_GLAM,
        source="paper, table 4, in part from memory",
        checked=False,
        open=_GLAM_OPEN,
        published=Published(
            total=total,
            active=active,
            total_without="nothing" if large else "embeddings",
            active_without="nothing" if large else "embeddings",
            source="paper, table 4",
            checked=False,
            note=note,
        ),
    )


_PANGU_LAYER = Layer(
    mixers=(Attention(heads=40, kv_heads=40, head_dim=128, qkv_bias=True, out_bias=True),),
    feeds=(Dense(hidden=20_480, gated=False, bias=True),),
)

MODELS = (
    _glam("glam-0.1b-64e", "1.9B", "145M", width=768, hidden=3072, heads=12, head_dim=64, depth=12, note=_ACTIVE),
    _glam("glam-1.7b-64e", "27B", "1.879B", width=2048, hidden=8192, heads=16, head_dim=128, depth=24, note=_ACTIVE),
    _glam("glam-8b-64e", "143B", "9.8B", width=4096, hidden=16_384, heads=32, head_dim=128, depth=32, note=_ACTIVE),
    _glam("glam-64b-64e", "1.2T", "96.6B", width=8192, hidden=32_768, heads=128, head_dim=128, depth=64),
    ModelShape(
        name="pangu-sigma",
        year=2023,
        width=5120,
        vocab=0,
        layers=(
            *[_PANGU_LAYER] * 32,
            # A table drawn before training chooses: nothing of the router is learned.
            *[
                replace(
                    _PANGU_LAYER,
                    feeds=(Experts(num_experts=640, top_k=1, hidden=20_480, gated=False, bias=True, router_maps=0),),
                )
            ]
            * 8,
        ),
        norm="layer",
        activation="GELU",
        citation="Ren et al. PanGu-Σ. arXiv:2303.10845.",
        source="paper, from memory",
        checked=False,
        open="The vocabulary is not in our sources: no table of tokens is counted.",
        published=Published(total="1.085T", source="paper", checked=False),
    ),
)

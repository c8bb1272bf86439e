"""GShard, Switch Transformers and ST-MoE: encoder-decoders that read and write text."""

from __future__ import annotations

from dataclasses import replace

from moesaic.zoo.layers import Attention, Dense, Experts, Feed, Layer
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

_GSHARD = "Lepikhin et al. GShard. ICLR 2021, arXiv:2006.16668."
_SWITCH = "Fedus, Zoph, Shazeer. Switch Transformers. JMLR 2022, arXiv:2101.03961."
_ST_MOE = "Zoph et al. ST-MoE. arXiv:2202.08906."


def stacks(attention: Attention, feeds: list[Feed], *, buckets: int) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """Encoder and decoder with the same feed-forward networks; the first layer of each learns relative positions."""
    cross = replace(attention, cross=True)
    first = [replace(attention, buckets=buckets), *[attention] * (len(feeds) - 1)]
    encoder = tuple(Layer(mixers=(own,), feeds=(feed,)) for own, feed in zip(first, feeds, strict=True))
    decoder = tuple(Layer(mixers=(own, cross), feeds=(feed,), norms=3) for own, feed in zip(first, feeds, strict=True))
    return encoder, decoder


def _gshard(name: str, total: str, *, experts: int, depth: int) -> ModelShape:
    dense = Dense(hidden=8192, gated=False)
    sparse = Experts(num_experts=experts, top_k=2, hidden=8192, gated=False)
    attention = Attention(heads=16, kv_heads=16, head_dim=128)
    # The depth of the paper's table is that of both stacks; every other feed-forward network is a mixture.
    feeds: list[Feed] = [sparse if index % 2 else dense for index in range(depth)]
    encoder, decoder = stacks(attention, feeds, buckets=0)
    return ModelShape(
        name=name,
        year=2020,
        width=1024,
        vocab=0,
        encoder=encoder[: depth // 2],
        layers=decoder[: depth // 2],
        norm="layer",
        final_norms=2,
        activation="ReLU",
        citation=_GSHARD,
        source="paper, table 1; widths from memory",
        checked=False,
        open="The paper rounds its totals and leaves the vocabulary open, so no table of tokens is counted.",
        published=Published(total=total, source="paper, table 1"),
    )


def _switch(
    name: str, total: str, *, width: int, hidden: int, heads: int, depth: int, experts: int, gated: bool, note: str = ""
) -> ModelShape:
    dense = Dense(hidden=hidden, gated=gated)
    sparse = Experts(num_experts=experts, top_k=1, hidden=hidden, gated=gated)
    every = name == "switch-c-2048"
    feeds: list[Feed] = [sparse if every or index % 2 else dense for index in range(depth)]
    encoder, decoder = stacks(Attention(heads=heads, kv_heads=heads, head_dim=64), feeds, buckets=32)
    return ModelShape(
        name=name,
        year=2021,
        width=width,
        vocab=32_128,
        encoder=encoder,
        layers=decoder,
        tied=True,
        final_norms=2,
        activation="GEGLU" if gated else "ReLU",
        citation=_SWITCH,
        source="paper, table 9",
        published=Published(total=total, source="paper, tables 8 and 9", note=note),
    )


def _st_moe(name: str, total: str, *, width: int, hidden: int, heads: int, head_dim: int, experts: int) -> ModelShape:
    dense = Dense(hidden=hidden)
    sparse = Experts(num_experts=experts, top_k=2, hidden=hidden)
    feeds: list[Feed] = [sparse if index % 4 == 3 else dense for index in range(27)]
    encoder, decoder = stacks(Attention(heads=heads, kv_heads=heads, head_dim=head_dim), feeds, buckets=32)
    return ModelShape(
        name=name,
        year=2022,
        width=width,
        vocab=32_128,
        encoder=encoder,
        layers=decoder,
        final_norms=2,
        activation="GEGLU",
        citation=_ST_MOE,
        source="paper, table 11",
        open="The extra dense network beside each sparse layer is not counted: the paper's total holds without it.",
        published=Published(total=total, source="paper, table 11"),
    )


_TWICE = "The paper's table says 64 experts, which would be 201B; the checkpoint of that total has 128."
_LARGE = "The paper's widths give 27.1B; the released checkpoint, ReLU networks 4096 wide, has 26.3B."

MODELS = (
    _gshard("gshard-600b", "600B", experts=2048, depth=36),
    _gshard("gshard-200b", "200B", experts=2048, depth=12),
    _gshard("gshard-150b", "150B", experts=512, depth=36),
    _gshard("gshard-50b", "50B", experts=512, depth=12),
    _gshard("gshard-37b", "37B", experts=128, depth=36),
    _gshard("gshard-12.5b", "12.5B", experts=128, depth=12),
    _gshard("gshard-1t", "1T", experts=2048, depth=60),
    _switch("switch-base-128", "7.41B", width=768, hidden=2048, heads=12, depth=12, experts=128, gated=True),
    _switch(
        "switch-large-128", "26B", width=1024, hidden=2816, heads=16, depth=24, experts=128, gated=True, note=_LARGE
    ),
    _switch(
        "switch-xxl-128", "395B", width=4096, hidden=10_240, heads=64, depth=24, experts=128, gated=True, note=_TWICE
    ),
    _switch("switch-c-2048", "1571B", width=2080, hidden=6144, heads=32, depth=15, experts=2048, gated=False),
    _st_moe("st-moe-l", "4.1B", width=1024, hidden=2816, heads=16, head_dim=64, experts=32),
    _st_moe("st-moe-32b", "269B", width=5120, hidden=20_480, heads=64, head_dim=128, experts=64),
)

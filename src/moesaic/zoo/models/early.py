"""Recurrent language models with a mixture between two LSTM layers, 2017."""

from __future__ import annotations

from moesaic.zoo.layers import Experts, Layer, Lstm
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

_PAPER = "Shazeer et al. Outrageously large neural networks. ICLR 2017, arXiv:1701.06538."
_OPEN = (
    "LSTM biases are not counted. The vocabulary of 793,471 words is from memory; it gives the paper's totals with "
    "embeddings. A token passes 2 experts in each of 2 branches of the tree of gates."
)
_OPEN_NEWS = "LSTM biases and the vocabulary are not counted. The tree's first level is assumed to have 256 branches."


def _lstm_model(
    name: str,
    total: str,
    active: str,
    *,
    experts: int,
    tree: int = 0,
    width: int = 512,
    hidden: int = 1024,
    cells: int | None = None,
    vocab: int = 793_471,
) -> ModelShape:
    """Embed, LSTM, mixture, LSTM, softmax; noisy top-4, or the best 2 of the best 2 branches of a tree."""
    lstm = Lstm(hidden=width) if cells is None else Lstm(hidden=cells, projection=width)
    mixture = Experts(num_experts=experts, top_k=4, hidden=hidden, gated=False, router_maps=2, tree=tree)
    return ModelShape(
        name=name,
        year=2017,
        width=width,
        vocab=vocab,
        layers=(Layer(mixers=(lstm,), feeds=(mixture,), norms=0), Layer(mixers=(lstm,), feeds=(), norms=0)),
        norm="none",
        final_norms=0,
        activation="ReLU",
        citation=_PAPER,
        source="paper, section 5.1 and appendix C",
        open=_OPEN if vocab else _OPEN_NEWS,
        published=Published(
            total=total,
            active=active,
            total_without="embeddings",
            active_without="embeddings",
            source="paper, tables 7 and 8, read in copies of others; active is its operations per time step",
            checked=False,
        ),
    )


MODELS = (
    _lstm_model("shazeer-moe-4", "8.4M", "8.4M", experts=4),
    _lstm_model("shazeer-moe-32", "37.8M", "8.4M", experts=32),
    _lstm_model("shazeer-moe-256", "272.9M", "8.6M", experts=256),
    _lstm_model("shazeer-moe-256-h", "272.9M", "8.4M", experts=256, tree=16),
    _lstm_model("shazeer-moe-1024-h", "1079.0M", "8.5M", experts=1024, tree=16),
    _lstm_model("shazeer-moe-4096-h", "4303.4M", "8.9M", experts=4096, tree=16),
    _lstm_model("shazeer-moe-34m", "4313.9M", "33.8M", experts=1024, tree=16, width=1024, hidden=2048),
    _lstm_model("shazeer-moe-143m", "4371.1M", "142.7M", experts=256, tree=16, width=1024, hidden=8192, cells=4096),
    _lstm_model("shazeer-moe-65536-h", "68.8B", "", experts=65_536, tree=256, vocab=0),
)

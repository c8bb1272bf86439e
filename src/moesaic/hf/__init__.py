"""The bridge to transformers: dense models become sparse ones, are saved, loaded, trained and watched.

Nothing here imports transformers before a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.hf.convert import sparsify
    from moesaic.hf.layers import active_params, bias_controllers, is_sparse, moe_layers
    from moesaic.hf.recording import record, trace_domain
    from moesaic.hf.watching import BalanceTerms, Seen, balance, observe

_HOME = {
    "BalanceTerms": "watching",
    "Seen": "watching",
    "active_params": "layers",
    "balance": "watching",
    "bias_controllers": "layers",
    "is_sparse": "layers",
    "moe_layers": "layers",
    "observe": "watching",
    "record": "recording",
    "sparsify": "convert",
    "trace_domain": "recording",
}

__all__ = [
    "BalanceTerms",
    "Seen",
    "active_params",
    "balance",
    "bias_controllers",
    "is_sparse",
    "moe_layers",
    "observe",
    "record",
    "sparsify",
    "trace_domain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic.hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moesaic.hf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

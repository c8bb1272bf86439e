"""The bridge to transformers: dense models become sparse ones, are saved, loaded, trained and watched.

Nothing here imports transformers before a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.hf.batch_load import GlobalBatch, global_batch, uses_global_batch
    from moesaic.hf.convert import sparsify
    from moesaic.hf.layers import Steered, active_params, controllers, is_sparse, moe_layers
    from moesaic.hf.lstm import LstmForCausalLM
    from moesaic.hf.lstm_config import LstmConfig
    from moesaic.hf.recording import record, trace_domain
    from moesaic.hf.scope import domains
    from moesaic.hf.watching import BalanceTerms, Seen, balance, observe

_HOME = {
    "BalanceTerms": "watching",
    "GlobalBatch": "batch_load",
    "LstmConfig": "lstm_config",
    "LstmForCausalLM": "lstm",
    "Seen": "watching",
    "Steered": "layers",
    "active_params": "layers",
    "balance": "watching",
    "controllers": "layers",
    "domains": "scope",
    "global_batch": "batch_load",
    "is_sparse": "layers",
    "moe_layers": "layers",
    "observe": "watching",
    "record": "recording",
    "sparsify": "convert",
    "trace_domain": "recording",
    "uses_global_batch": "batch_load",
}

__all__ = [
    "BalanceTerms",
    "GlobalBatch",
    "LstmConfig",
    "LstmForCausalLM",
    "Seen",
    "Steered",
    "active_params",
    "balance",
    "controllers",
    "domains",
    "global_batch",
    "is_sparse",
    "moe_layers",
    "observe",
    "record",
    "sparsify",
    "trace_domain",
    "uses_global_batch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic.hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moesaic.hf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

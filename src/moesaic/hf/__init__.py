"""The bridge to transformers: dense models become sparse ones, are saved, loaded, trained and watched.

Nothing here imports transformers before a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.hf.batch_load import GlobalBatch, global_batch, uses_global_batch
    from moesaic.hf.convert import sparsify
    from moesaic.hf.intervening import intervene
    from moesaic.hf.interventions import Force, Swap, SwitchOff
    from moesaic.hf.layers import Steered, active_params, controllers, is_sparse, moe_layers
    from moesaic.hf.lstm import LstmForCausalLM
    from moesaic.hf.lstm_config import LstmConfig
    from moesaic.hf.native.adopt import adopt, kernel_reports, release
    from moesaic.hf.native.router_spec import RouterSpec
    from moesaic.hf.peft.check import TrainingCheck, check_trains
    from moesaic.hf.peft.hot import hot_experts
    from moesaic.hf.peft.judge import ExpertTrains
    from moesaic.hf.peft.lora import lora
    from moesaic.hf.peft.only import freeze_routers, train_only, undo_train_only
    from moesaic.hf.recording import record, trace_domain
    from moesaic.hf.replayed import replay
    from moesaic.hf.scope import domains
    from moesaic.hf.watching import BalanceTerms, Seen, balance, observe

_HOME = {
    "BalanceTerms": "watching",
    "ExpertTrains": "peft.judge",
    "Force": "interventions",
    "GlobalBatch": "batch_load",
    "LstmConfig": "lstm_config",
    "LstmForCausalLM": "lstm",
    "RouterSpec": "native.router_spec",
    "Seen": "watching",
    "Steered": "layers",
    "Swap": "interventions",
    "SwitchOff": "interventions",
    "TrainingCheck": "peft.check",
    "active_params": "layers",
    "adopt": "native.adopt",
    "balance": "watching",
    "check_trains": "peft.check",
    "controllers": "layers",
    "domains": "scope",
    "freeze_routers": "peft.only",
    "global_batch": "batch_load",
    "hot_experts": "peft.hot",
    "intervene": "intervening",
    "is_sparse": "layers",
    "kernel_reports": "native.adopt",
    "lora": "peft.lora",
    "moe_layers": "layers",
    "observe": "watching",
    "record": "recording",
    "release": "native.adopt",
    "replay": "replayed",
    "sparsify": "convert",
    "trace_domain": "recording",
    "train_only": "peft.only",
    "undo_train_only": "peft.only",
    "uses_global_batch": "batch_load",
}

__all__ = [
    "BalanceTerms",
    "ExpertTrains",
    "Force",
    "GlobalBatch",
    "LstmConfig",
    "LstmForCausalLM",
    "RouterSpec",
    "Seen",
    "Steered",
    "Swap",
    "SwitchOff",
    "TrainingCheck",
    "active_params",
    "adopt",
    "balance",
    "check_trains",
    "controllers",
    "domains",
    "freeze_routers",
    "global_batch",
    "hot_experts",
    "intervene",
    "is_sparse",
    "kernel_reports",
    "lora",
    "moe_layers",
    "observe",
    "record",
    "release",
    "replay",
    "sparsify",
    "trace_domain",
    "train_only",
    "undo_train_only",
    "uses_global_batch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic.hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moesaic.hf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

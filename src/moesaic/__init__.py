"""Moesaic: build, train, look inside, transform and prove Mixture-of-Experts models.

Start reading at ``moesaic/layer.py``. Nothing here imports transformers until the bridge to it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moesaic import balance, dispatch, experts, recipes, routers
from moesaic.core.context import Context
from moesaic.core.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    MoesaicError,
    ShapeError,
)
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing
from moesaic.hf.register import register as _register
from moesaic.layer import MoELayer
from moesaic.lora import LoRAMoE, MoLE
from moesaic.merge import MergedMoE
from moesaic.soft import SoftMoE

if TYPE_CHECKING:
    from moesaic import convert, data, hf, telemetry
    from moesaic.convert.grow.split import split
    from moesaic.convert.grow.upcycle import upcycle
    from moesaic.convert.shrink.merge import merge_experts
    from moesaic.convert.shrink.prune import prune_experts
    from moesaic.convert.shrink.to_dense import to_dense
    from moesaic.hf import adopt, record, sparsify
    from moesaic.lens import report
    from moesaic.telemetry import RoutingTrace

__version__ = "0.1.0"

# Imported when first used: these need transformers, or extras such as matplotlib and pyarrow.
_LAZY_MODULES = ("convert", "data", "hf", "telemetry")
_LAZY_NAMES = {
    "adopt": "moesaic.hf",
    "merge_experts": "moesaic.convert.shrink.merge",
    "prune_experts": "moesaic.convert.shrink.prune",
    "record": "moesaic.hf",
    "report": "moesaic.lens",
    "sparsify": "moesaic.hf",
    "split": "moesaic.convert.grow.split",
    "to_dense": "moesaic.convert.shrink.to_dense",
    "upcycle": "moesaic.convert.grow.upcycle",
    "RoutingTrace": "moesaic.telemetry",
}

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "Context",
    "DataError",
    "LoRAMoE",
    "MergedMoE",
    "MoELayer",
    "MoLE",
    "MoesaicError",
    "Plan",
    "Routing",
    "RoutingTrace",
    "ShapeError",
    "SoftMoE",
    "adopt",
    "balance",
    "convert",
    "data",
    "dispatch",
    "experts",
    "hf",
    "merge_experts",
    "prune_experts",
    "recipes",
    "record",
    "report",
    "routers",
    "sparsify",
    "split",
    "telemetry",
    "to_dense",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"moesaic.{name}")
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(_LAZY_NAMES[name]), name)
    raise AttributeError(f"module 'moesaic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


# So that AutoModel.from_pretrained knows our models, whichever of the two packages is imported first.
_register()

"""Moesaic: build, train, look inside, transform and prove Mixture-of-Experts models.

Start reading at ``moesaic/layer.py``. Nothing here is imported before it is used: ``moesaic.classic`` needs no torch,
and a layer needs no transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moesaic.hf.register import register as _register

if TYPE_CHECKING:
    from moesaic import (
        balance,
        classic,
        convert,
        data,
        dispatch,
        doctor,
        experts,
        hf,
        probe,
        recipes,
        routers,
        telemetry,
        zoo,
    )
    from moesaic.convert.grow.split import split
    from moesaic.convert.grow.upcycle import upcycle
    from moesaic.convert.shrink.merge import merge_experts
    from moesaic.convert.shrink.prune import prune_experts
    from moesaic.convert.shrink.to_dense import to_dense
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
    from moesaic.hf import adopt, record, sparsify
    from moesaic.layer import MoELayer
    from moesaic.lens import report
    from moesaic.lora import LoRAMoE, MoLE
    from moesaic.merge import MergedMoE
    from moesaic.soft import SoftMoE
    from moesaic.telemetry import RoutingTrace

__version__ = "0.1.0"

# Imported when first used. The first need torch; those of _LATE need transformers, or extras such as matplotlib,
# pyarrow and scikit-learn.
_EARLY = {
    "BackendError": "moesaic.core.errors",
    "CheckpointError": "moesaic.core.errors",
    "ConfigError": "moesaic.core.errors",
    "Context": "moesaic.core.context",
    "DataError": "moesaic.core.errors",
    "LoRAMoE": "moesaic.lora",
    "MergedMoE": "moesaic.merge",
    "MoELayer": "moesaic.layer",
    "MoLE": "moesaic.lora",
    "MoesaicError": "moesaic.core.errors",
    "Plan": "moesaic.core.plan",
    "Routing": "moesaic.core.routing",
    "ShapeError": "moesaic.core.errors",
    "SoftMoE": "moesaic.soft",
    "balance": "moesaic",
    "dispatch": "moesaic",
    "experts": "moesaic",
    "recipes": "moesaic",
    "routers": "moesaic",
}
_LATE = {
    "RoutingTrace": "moesaic.telemetry",
    "adopt": "moesaic.hf",
    "classic": "moesaic",
    "convert": "moesaic",
    "data": "moesaic",
    "doctor": "moesaic",
    "hf": "moesaic",
    "merge_experts": "moesaic.convert.shrink.merge",
    "probe": "moesaic",
    "prune_experts": "moesaic.convert.shrink.prune",
    "record": "moesaic.hf",
    "report": "moesaic.lens",
    "sparsify": "moesaic.hf",
    "split": "moesaic.convert.grow.split",
    "telemetry": "moesaic",
    "to_dense": "moesaic.convert.shrink.to_dense",
    "upcycle": "moesaic.convert.grow.upcycle",
    "zoo": "moesaic",
}
_HOME = _EARLY | _LATE

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
    "classic",
    "convert",
    "data",
    "dispatch",
    "doctor",
    "experts",
    "hf",
    "merge_experts",
    "probe",
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
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    if _HOME[name] == "moesaic":
        return importlib.import_module(f"moesaic.{name}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


# So that AutoModel.from_pretrained knows our models, whichever of the two packages is imported first.
_register()

"""The table that everything reads, the plan that sorts it, and the words they share.

Nothing here imports torch before a name that needs it is used: ``moesaic.classic`` is built on numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moesaic.core.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    MoesaicError,
    ShapeError,
    StoppedElsewhereError,
)

if TYPE_CHECKING:
    from moesaic.core.context import Context
    from moesaic.core.plan import Plan
    from moesaic.core.routing import Routing

_HOME = {"Context": "context", "Plan": "plan", "Routing": "routing"}

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "Context",
    "DataError",
    "MoesaicError",
    "Plan",
    "Routing",
    "ShapeError",
    "StoppedElsewhereError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic.core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moesaic.core.{_HOME[name]}"), name)

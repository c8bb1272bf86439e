"""The table that everything reads, the plan that sorts it, and the words they share."""

from moesaic.core.context import Context
from moesaic.core.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    MoesaicError,
    ShapeError,
    StoppedElsewhereError,
)
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing

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

"""The doctor: what goes wrong in mixtures without a word, found by measuring a run or a model.

Nothing here imports torch or transformers before a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.doctor.examination import examine
    from moesaic.doctor.finding import Finding, Report, Verdict
    from moesaic.doctor.thresholds import THRESHOLDS, Threshold

_HOME = {
    "THRESHOLDS": "thresholds",
    "Finding": "finding",
    "Report": "finding",
    "Threshold": "thresholds",
    "Verdict": "finding",
    "examine": "examination",
}

__all__ = ["THRESHOLDS", "Finding", "Report", "Threshold", "Verdict", "examine"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic.doctor' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moesaic.doctor.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Checkpoint in, checkpoint out, with a receipt: dense models become mixtures, mixtures become smaller, or native.

Start with ``steps.py``: a method is a function from a checkpoint's names to a list of steps, and ``run.py`` carries it
out. Nothing here imports transformers before a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.convert.branch import branch_train_mix
    from moesaic.convert.calibration import calibrate
    from moesaic.convert.check import check_folder
    from moesaic.convert.distillation import distill
    from moesaic.convert.fewer import fewer_choices
    from moesaic.convert.native import export
    from moesaic.convert.receipt import Receipt
    from moesaic.convert.run import Converted, convert
    from moesaic.convert.saliency import ExpertStats
    from moesaic.convert.source import Source, joined, open_source
    from moesaic.convert.steps import Change, Step
    from moesaic.convert.text import text_batches

_HOME = {
    "branch_train_mix": "branch",
    "text_batches": "text",
    "distill": "distillation",
    "calibrate": "calibration",
    "ExpertStats": "saliency",
    "Change": "steps",
    "Converted": "run",
    "Receipt": "receipt",
    "Source": "source",
    "Step": "steps",
    "check_folder": "check",
    "convert": "run",
    "export": "native",
    "fewer_choices": "fewer",
    "joined": "source",
    "open_source": "source",
}

__all__ = [
    "Change",
    "Converted",
    "ExpertStats",
    "Receipt",
    "Source",
    "Step",
    "branch_train_mix",
    "calibrate",
    "check_folder",
    "convert",
    "distill",
    "export",
    "fewer_choices",
    "joined",
    "open_source",
    "text_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic.convert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moesaic.convert.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Checkpoint in, checkpoint out, with a receipt: dense models become mixtures, mixtures become smaller, or native.

Start with ``steps.py``: a method is a function from a checkpoint's names to a list of steps, and ``run.py`` carries it
out. Nothing here imports transformers before a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.convert.checkpoint.source import Source, joined, open_source
    from moesaic.convert.grow.branch import branch_train_mix
    from moesaic.convert.native.export import export
    from moesaic.convert.proof.check import check_folder
    from moesaic.convert.proof.receipt import Receipt
    from moesaic.convert.run import Converted, convert
    from moesaic.convert.shrink.calibration import calibrate
    from moesaic.convert.shrink.distillation import distill
    from moesaic.convert.shrink.fewer import fewer_choices
    from moesaic.convert.shrink.saliency import ExpertStats
    from moesaic.convert.steps import Change, Step
    from moesaic.convert.text import text_batches

_HOME = {
    "branch_train_mix": "grow.branch",
    "text_batches": "text",
    "distill": "shrink.distillation",
    "calibrate": "shrink.calibration",
    "ExpertStats": "shrink.saliency",
    "Change": "steps",
    "Converted": "run",
    "Receipt": "proof.receipt",
    "Source": "checkpoint.source",
    "Step": "steps",
    "check_folder": "proof.check",
    "convert": "run",
    "export": "native.export",
    "fewer_choices": "shrink.fewer",
    "joined": "checkpoint.source",
    "open_source": "checkpoint.source",
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

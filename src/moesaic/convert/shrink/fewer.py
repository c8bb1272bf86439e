"""Let each token visit fewer experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.layout.counts import shrinkable, with_counts
from moesaic.convert.run import Converted, convert
from moesaic.convert.steps import Change
from moesaic.core.errors import ConfigError


def fewer_choices(
    source: str | Path | PreTrainedModel,
    top_k: int,
    *,
    out: str | Path | None = None,
    probe: Any = "random",
    shard_bytes: int | None = None,
) -> Converted:
    """Lower the number of experts that each token visits; no weight changes, and the receipt tells the gap.

    Where weights are normalised over the chosen they still add up to what they did; where they are scores as they are
    (OLMoE, Qwen1.5-MoE) the layer's output gets smaller by what is no longer chosen.

    Args:
        source: a folder, or a model in memory, which stays as it is: one of ours, or of a family of transformers.
        top_k: experts for each token, fewer than now.
        out: folder to write; None for a model in memory.
        probe: what the old and the new model are compared on; see :func:`~moesaic.convert.run.convert`.
        shard_bytes: see there.
    Raises:
        ConfigError: if it is not fewer, or the model cannot have it.
        CheckpointError: see :func:`~moesaic.convert.run.convert`.
    """
    opened = open_source(source)
    layouts = shrinkable(opened.blueprint)
    for path, layout in layouts.items():
        if layout.top_k is None or not 1 <= top_k < layout.top_k:
            raise ConfigError(
                f"top_k must be at least 1 and below what it is now, {layout.top_k} at {path}, got {top_k}. "
                "A router without a fixed number of choices cannot be changed like this."
            )
    counts = {path: layout.num_experts for path, layout in layouts.items()}
    before = sorted({layout.top_k for layout in layouts.values() if layout.top_k is not None})
    change = Change(
        method="fewer_choices",
        config=with_counts(opened, layouts, counts, top_k=top_k),
        steps=(),
        notes=(f"each token visits {top_k} experts instead of {', '.join(map(str, before))}",),
    )
    return convert(opened, change, out, probe=probe, shard_bytes=shard_bytes)

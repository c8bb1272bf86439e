"""Which layers a page shows, and short names for them: ``layer 3`` where paths differ in one number only."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from moesaic.lens.tokens import one_line
from moesaic.telemetry.trace import RoutingTrace

# What keeps the page of a large model at a few megabytes, and a figure on one screen.
_MOST_LAYERS = 12


def shown_layers(trace: RoutingTrace) -> list[int]:
    """The layers with rows, thinned evenly from first to last where they are many."""
    layers = np.unique(trace.layer)
    if len(layers) > _MOST_LAYERS:
        layers = layers[np.linspace(0, len(layers) - 1, _MOST_LAYERS).round().astype(int)]
    return [int(layer) for layer in layers]


def labels_of(trace: RoutingTrace) -> list[str]:
    """What each layer of a trace is called on the page, in depth order."""
    labels = layer_labels(trace.metadata.layer_names)
    return [labels[name] for name in trace.metadata.layer_names]


def layer_labels(names: Sequence[str]) -> dict[str, str]:
    """What each layer is called on the page, by its module path.

    ``model.layers.3.mlp`` is ``layer 3`` if all paths are the same but for that number; otherwise a path loses the
    part that all have in front and at the end.
    """
    pieces = [re.split(r"(\d+)", name) for name in names]
    widths = {len(piece) for piece in pieces}
    if len(widths) == 1 and len(set(names)) == len(names):
        differing = [place for place, values in enumerate(zip(*pieces, strict=True)) if len(set(values)) > 1]
        if len(names) == 1:
            differing = [place for place, value in enumerate(pieces[0]) if value.isdigit()]
        if len(differing) == 1 and pieces[0][differing[0]].isdigit():
            return {name: f"layer {piece[differing[0]]}" for name, piece in zip(names, pieces, strict=True)}
    before, after = _common_parts([name.split(".") for name in names])
    short = {}
    for name in names:
        parts = name.split(".")
        short[name] = one_line(".".join(parts[before : len(parts) - after])) or one_line(name)
    return short


def _common_parts(paths: Sequence[Sequence[str]]) -> tuple[int, int]:
    shortest = min(map(len, paths), default=0)
    before = 0
    while len(paths) > 1 and before < shortest - 1 and len({path[before] for path in paths}) == 1:
        before += 1
    after = 0
    while len(paths) > 1 and after < shortest - before - 1 and len({path[-1 - after] for path in paths}) == 1:
        after += 1
    return before, after

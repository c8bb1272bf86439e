"""Short names for layers: ``layer 3`` where their paths differ in one number only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moesaic.lens.tokens import one_line


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

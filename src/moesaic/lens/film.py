"""The training film: every expert's load from step to step, for the reader to play or to pull along."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesaic.lens.layers import layer_labels
from moesaic.lens.runs import Run
from moesaic.lens.tokens import one_line

_MOST_LAYERS = 6
_MOST_FRAMES = 160
# Frames times layers times experts: keeps the page of a large model at a few megabytes.
_MOST_NUMBERS = 120_000

FILM = (
    '<div class="film" hidden>\n'
    '<div class="tools"><button type="button" class="play">Play</button>'
    '<label>Step <input type="range" class="when" min="0" value="0"></label>'
    '<label class="which" hidden>Run <select></select></label></div>\n'
    '<output class="now"></output>\n<div class="stages"></div>\n'
    '<p class="note">Each bar is one expert, its height the share of the layer\'s choices at this step; the dashed '
    "line is uniform, 1/E, which is what chance would give. n is the tokens of one logged step, so that bars of small "
    "batches tremble.</p>\n</div>"
)
"""The place where the script shows the film; hidden without it."""


def film_data(runs: list[Run]) -> list[dict[str, Any]]:
    """What the script needs of each sparse run: steps, loss and shares in ten-thousandths; thinned where it is long."""
    return [_of_run(run) for run in runs if run.load and len(run.step) > 1]


def _of_run(run: Run) -> dict[str, Any]:
    names = list(run.load)
    labels = layer_labels(names)
    names = [names[place] for place in _spread(len(names), _MOST_LAYERS)]
    width = sum(run.load[name].shape[1] for name in names)
    frames = _spread(len(run.step), max(2, min(_MOST_FRAMES, _MOST_NUMBERS // width)))
    return {
        "label": one_line(run.label),
        "layers": [labels[name] for name in names],
        "steps": run.step[frames].astype(int).tolist(),
        "loss": [round(float(loss), 3) if np.isfinite(loss) else None for loss in run.loss[frames]],
        "share": [
            [np.nan_to_num(1e4 * run.load[name][frame]).round().astype(int).tolist() for name in names]
            for frame in frames
        ],
    }


def _spread(count: int, most: int) -> list[int]:
    """At most so many places of ``count``, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))

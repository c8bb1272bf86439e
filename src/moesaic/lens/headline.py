"""The handful of numbers that a reader wants first."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from moesaic.lens.runs import Run
from moesaic.lens.study import Study
from moesaic.lens.tokens import one_line


def headline_numbers(study: Study, runs: list[Run]) -> str:
    """A description list: what the runs reached at what size and speed, and how the trace's load lies."""
    items: list[tuple[str, str]] = []
    for run in runs:
        last = run.last_bits_per_byte
        if "mean" in last:
            items.append((f"{last['mean']:.3f}", f"bits per byte, {one_line(run.caption)}"))
    for run in runs:
        items += _size_and_speed(run.summary, one_line(run.label))
    trace = study.trace
    items.append(
        (f"{np.nanmax(study.worst.value):.2f}", "busiest expert over the mean, in the worst layer (1 is even)")
    )
    in_use = np.unique(trace.layer)
    total = sum(trace.metadata.num_experts[layer] for layer in in_use)
    idle = sum(layer in in_use for layer, _ in study.idle)
    items.append((f"{idle} of {total}", "experts idle"))
    items.append((f"{100 * float((~trace.kept).mean()):.2g} %", "choices dropped"))
    cells = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for value, name in items)
    return f'<dl class="numbers">\n{cells}\n</dl>'


def _size_and_speed(summary: Mapping[str, Any], label: str) -> list[tuple[str, str]]:
    items = []
    active, total, speed = (summary.get(key) for key in ("active_params", "total_params", "tokens_per_s"))
    if isinstance(active, int | float) and isinstance(total, int | float):
        if active == total:
            items.append((_short(total), f"parameters, {label}"))
        else:
            items.append((f"{_short(active)} of {_short(total)}", f"parameters active, {label}"))
    if isinstance(speed, int | float):
        items.append((f"{speed:,.0f}", f"tokens/s in training, {label}"))
    return items


def _short(count: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}\u00a0{unit}"
    return f"{count:.0f}"

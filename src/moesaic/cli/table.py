"""The table of figures at the end of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LABELS = {"moe": "MoE", "dense": "dense twin"}


def rows(summary: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Give the table's rows, the name of a figure and its value for each model."""
    figures = list(summary.values())
    names = [name for name in figures[0]["bits_per_byte"] if name != "mean"]
    bits = [(f"bits per byte, {name}", [f"{it['bits_per_byte'][name]:.3f}" for it in figures]) for name in names]
    body = [
        *bits,
        ("bits per byte, mean", [f"{it['bits_per_byte']['mean']:.3f}" for it in figures]),
        ("tokens/s", [_maybe(it["tokens_per_s"], ",.0f") for it in figures]),
        ("tokens seen", [f"{it['tokens']:,}" for it in figures]),
        ("total parameters", [f"{it['total_params']:,}" for it in figures]),
        ("active parameters", [f"{it['active_params']:,}" for it in figures]),
        ("load max/mean", [_maybe(it["load_max_over_mean"], ".2f") for it in figures]),
        ("dropped rows", [_maybe(it["drop_rate"], ".2%") for it in figures]),
    ]
    return [(name, *values) for name, values in body]


def show_summary(summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    drawn = Table(title="Held-out text, and what it took")
    drawn.add_column("")
    for kind in summary:
        drawn.add_column(_LABELS[kind], justify="right")
    for row in rows(summary):
        drawn.add_row(*row, style="bold" if row[0].endswith("mean") and "bits" in row[0] else None)
    console.print(drawn)


def _maybe(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)

"""Pictures of a trace: who took which domain, what an expert's number tells, how the work is spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesaic.lens import metrics, palette
from moesaic.lens.drawing import Picture, draw, panels
from moesaic.lens.information import Information
from moesaic.lens.layers import labels_of, shown_layers
from moesaic.lens.metrics import FloatArray
from moesaic.lens.tokens import one_line
from moesaic.telemetry.trace import RoutingTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond these a cell has no room for its number.
_MOST_NUMBERED_EXPERTS = 10


def domain_heat_map(trace: RoutingTrace) -> Picture:
    """Share of each expert in each domain, one panel for each layer, coloured by its ratio to uniform."""
    share_LQE = metrics.share(trace)
    names = [one_line(name) for name in metrics.domains(trace)]
    layers = shown_layers(trace)
    ratio_LQE = share_LQE * np.asarray(trace.metadata.num_experts)[:, None, None]
    limit = _colour_limit(ratio_LQE[layers])
    labels = labels_of(trace)
    rows_L = np.bincount(trace.layer, minlength=trace.num_layers)
    columns = 1 if len(layers) <= 6 and share_LQE.shape[2] <= 64 else 2
    height = 0.42 + (0.34 + 0.24 * len(names)) * -(-len(layers) // columns)

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(layers), columns)
        for place, (panel, layer) in enumerate(zip(axes, layers, strict=True)):
            num_experts = trace.metadata.num_experts[layer]
            _heat_panel(panel, share_LQE[layer, :, :num_experts], limit, columns)
            panel.set_yticks(np.arange(len(names)) + 0.5, names if place % columns == 0 else [""] * len(names))
            panel.tick_params(axis="y", labelcolor=palette.INK)
            panel.set_title(f"{labels[layer]}  ·  uniform {_percent(1 / num_experts)}")
            if layer == layers[-1] or trace.metadata.num_experts[layer] != trace.metadata.num_experts[layers[-1]]:
                panel.set_xlabel("expert")
        _ratio_key(figure, axes, limit)

    return draw(
        "domains",
        "Which expert takes which domain",
        "Each row shows how the choices of one domain's tokens split over the experts (a row adds up to 100 %). "
        "Orange: more than a uniform router would give; blue: less; no colour: exactly uniform. "
        f"{_shown(layers, trace)}n = {int(rows_L[layers].min()):,} choices or more in each panel, all of a "
        "token's choices counted.",
        height,
        paint,
    )


def information(trace: RoutingTrace, domain: list[Information], token: list[Information]) -> Picture | None:
    """What the expert's number tells about the domain, and the token about the expert; None if neither is known."""
    layers = shown_layers(trace)
    labels = labels_of(trace)
    shown = [
        ([values[layer] for layer in layers], title)
        for values, title, known in (
            (domain, "expert tells the domain", any(value.ceiling > 0 for value in domain)),
            (token, "token tells the expert", any(value.num_rows for value in token)),
        )
        if known
    ]
    if not shown:
        return None

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(shown), len(shown), sharey=True)
        for panel, (values, title) in zip(axes, shown, strict=True):
            told = [100 * value.bits / (value.ceiling or 1) for value in values]
            chance = [100 * value.chance / (value.ceiling or 1) for value in values]
            _lollipops(panel, told, chance, [f"{value.bits:.2f} bits" for value in values])
            panel.set_title(title)
            panel.set_xlabel("of what there is to tell")
        _name_rows(axes[0], [labels[layer] for layer in layers])

    rows = min(value.num_rows for values, _ in shown for value in values)
    return draw(
        "information",
        "What decides the expert: the domain, or just the token?",
        "Mutual information as a share of its ceiling: 0 % is nothing, 100 % everything. The grey tick is chance: for "
        "domains, whole texts with their domain labels shuffled; for tokens, the bias of counting a finite sample. "
        f"{_shown(layers, trace)}n = {rows:,} choices or more in each layer.",
        0.75 + 0.24 * len(layers),
        paint,
    )


def repetition(trace: RoutingTrace) -> Picture | None:
    """How often neighbouring tokens share their first expert; None if the trace has no neighbours."""
    observed_L, chance_L = metrics.repetition(trace)
    layers = [layer for layer in shown_layers(trace) if np.isfinite(observed_L[layer])]
    if not layers:
        return None
    labels = labels_of(trace)

    def paint(figure: Figure) -> None:
        (panel,) = panels(figure, 1)
        observed = [100 * float(observed_L[layer]) for layer in layers]
        _lollipops(
            panel, observed, [100 * float(chance_L[layer]) for layer in layers], [f"{v:.0f} %" for v in observed]
        )
        _name_rows(panel, [labels[layer] for layer in layers])

    return draw(
        "repetition",
        "How often a token keeps the expert of the token before it",
        "Share of neighbouring tokens with the same first-choice expert. The grey tick is chance: what two tokens "
        f"drawn at random from the layer would share. {_shown(layers, trace)}n = {trace.num_tokens:,} tokens.",
        0.4 + 0.24 * len(layers),
        paint,
    )


def load_by_expert(trace: RoutingTrace) -> Picture:
    """Share of all choices that each expert was given, one panel for each layer."""
    share_LE = metrics.load_share(trace)
    worst_L = metrics.max_over_mean(trace)
    layers = shown_layers(trace)
    labels = labels_of(trace)
    colours = [light for light, _ in palette.expert_colours(share_LE.shape[1])]
    columns = 2 if len(layers) > 1 else 1

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(layers), columns, sharey=True)
        for place, (panel, layer) in enumerate(zip(axes, layers, strict=True)):
            num_experts = trace.metadata.num_experts[layer]
            panel.bar(range(num_experts), share_LE[layer, :num_experts] * 100, color=colours[:num_experts], width=0.8)
            panel.axhline(100 / num_experts, color=palette.INK, linewidth=1, linestyle=(0, (3, 2)))
            panel.set_title(f"{labels[layer]}  ·  max/mean {worst_L[layer]:.2f}")
            panel.set_xticks(np.asarray(_expert_ticks(num_experts, columns)))
            panel.tick_params(axis="x", labelcolor=palette.MUTED)
            panel.spines["left"].set_visible(False)
            panel.yaxis.set_major_formatter("{x:.0f} %")
            panel.grid(axis="y")
            if place >= len(layers) - columns:
                panel.set_xlabel("expert")

    rows_L = np.bincount(trace.layer, minlength=trace.num_layers)
    return draw(
        "load",
        "How the work is spread over the experts",
        "Bars: share of all choices in the layer. Dashed line: uniform, 1/E. max/mean: the busiest expert's load over "
        f"the mean of all experts, idle ones included; 1 is perfect balance. {_shown(layers, trace)}"
        f"n = {int(rows_L[layers].min()):,} choices or more in each layer.",
        0.3 + 1.35 * -(-len(layers) // columns),
        paint,
        num_experts=share_LE.shape[1],
    )


def _heat_panel(panel: Axes, share_QE: FloatArray, limit: float, columns: int) -> None:
    num_domains, num_experts = share_QE.shape
    tint_QE4 = _tints(share_QE * num_experts, limit)
    panel.pcolormesh(
        np.arange(num_experts + 1),
        np.arange(num_domains + 1),
        tint_QE4,
        edgecolors=palette.PAPER,
        linewidth=1.2 if num_experts <= 32 else 0.4,
    )
    panel.set_ylim(num_domains, 0)
    ticks = _expert_ticks(num_experts, columns)
    panel.set_xticks(np.asarray(ticks) + 0.5, list(map(str, ticks)))
    for side in panel.spines.values():
        side.set_visible(False)
    if num_experts > _MOST_NUMBERED_EXPERTS:
        return
    for row, column in np.argwhere(~np.isnan(share_QE)):
        text = f"{share_QE[row, column] * 100:.0f}"
        panel.text(column + 0.5, row + 0.52, text, ha="center", va="center", fontsize=8)


def _tints(ratio: FloatArray, limit: float) -> FloatArray:
    """Orange above 1, blue below, the more opaque the further away in log ratio; nothing at 1 and where unknown."""
    from matplotlib.colors import to_rgb

    with np.errstate(divide="ignore"):
        distance = np.nan_to_num(np.log2(ratio), nan=0.0, neginf=-limit)
    tint = np.empty((*ratio.shape, 4))
    tint[..., :3] = np.where(distance[..., None] > 0, to_rgb(palette.MORE), to_rgb(palette.LESS))
    tint[..., 3] = np.minimum(1, np.abs(distance) / limit) * 0.95
    return tint


def _colour_limit(ratio: FloatArray) -> float:
    """Full colour at the 98th percentile, but at a factor of 1.5 at least, so that noise stays pale, and 4 at most."""
    known = ratio[~np.isnan(ratio) & (ratio > 0)]
    farthest = float(np.percentile(np.abs(np.log2(known)), 98)) if len(known) else 1.0
    return min(2.0, max(float(np.log2(1.5)), farthest))


def _ratio_key(figure: Figure, axes: list[Axes], limit: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    steps = np.linspace(-limit, limit, 13)
    colours = ListedColormap(_tints(2**steps, limit))
    # The colours in between lie half a step further out than the outermost ticks.
    mappable = ScalarMappable(Normalize(-limit * 14 / 13, limit * 14 / 13), colours)
    key = figure.colorbar(mappable, ax=axes, location="bottom", shrink=0.6, aspect=45, pad=0.03)
    key.outline.set_visible(False)
    ticks = [power for power in (-2, -1, -0.585, 0, 0.585, 1, 2) if abs(power) <= limit + 0.01]
    if limit > 1.2:
        ticks = [power for power in ticks if power != 0.585 and power != -0.585]
    names = {-2: "¼", -1: "½", -0.585: "⅔", 0: "uniform", 0.585: "1.5×", 1: "2×", 2: "4×"}
    key.set_ticks(ticks, labels=[names[power] for power in ticks])


def _lollipops(panel: Axes, values: list[float], chances: list[float], texts: list[str]) -> None:
    for row, (value, chance, text) in enumerate(zip(values, chances, texts, strict=True)):
        panel.plot([0, value], [row, row], color=palette.LINE, linewidth=2, zorder=1)
        panel.plot(chance, row, "|", color=palette.MUTED, markersize=11, mew=2, zorder=2)
        panel.plot(value, row, "o", color=palette.SPARSE, markersize=6, zorder=3)
        # Right of both marks, or the number would lie on the tick.
        panel.annotate(
            text, (max(value, chance), row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    panel.set_xlim(0, max(10.0, 1.45 * max(values)))
    panel.xaxis.set_major_formatter("{x:.0f} %")
    panel.spines["left"].set_visible(False)


def _name_rows(panel: Axes, names: list[str]) -> None:
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(axis="y", labelcolor=palette.INK)
    panel.set_ylim(len(names) - 0.5, -0.7)


def _shown(layers: list[int], trace: RoutingTrace) -> str:
    return "" if len(layers) == trace.num_layers else f"{len(layers)} of {trace.num_layers} layers are shown. "


def _expert_ticks(num_experts: int, columns: int) -> list[int]:
    step = 1
    while num_experts / step > 16 / columns:
        step *= 2
    return list(range(0, num_experts, step))


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"

"""Pictures of load: how the work is spread over the experts, in the first, middle and last layer and in all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesaic.lens import palette
from moesaic.lens.drawing import Picture, draw, panels
from moesaic.lens.figures.heat import colour_limit, expert_ticks, heat_map, name_rows, ratio_key
from moesaic.lens.study import Study, least
from moesaic.lens.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def load_by_expert(study: Study) -> Picture:
    """Share of all choices that each expert was given, in the first, the middle and the last layer."""
    share_LE = study.load.value
    colours = [light for light, _ in palette.expert_colours(share_LE.shape[1])]
    layers = study.picked

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(layers), sharey=True)
        for panel, layer in zip(axes, layers, strict=True):
            num_experts = study.trace.metadata.num_experts[layer]
            panel.bar(range(num_experts), share_LE[layer, :num_experts] * 100, color=colours[:num_experts], width=0.8)
            panel.axhline(100 / num_experts, color=palette.INK, linewidth=1, linestyle=(0, (3, 2)))
            panel.set_title(f"{study.labels[layer]}  ·  max/mean {study.worst.value[layer]:.2f}")
            panel.set_xticks(np.asarray(expert_ticks(num_experts)))
            panel.tick_params(axis="x", labelcolor=palette.MUTED)
            panel.spines["left"].set_visible(False)
            panel.yaxis.set_major_formatter("{x:.0f} %")
            panel.grid(axis="y")
        axes[-1].set_xlabel("expert")

    chance = ", ".join(f"{study.worst.chance[layer]:.2f}" for layer in layers)
    return draw(
        "load",
        "How the work is spread over the experts",
        "Bars: share of all choices in the layer. Dashed line: uniform, 1/E. max/mean: the busiest expert's load over "
        f"the mean of all experts, idle ones included; 1 is perfect balance, and a router that throws dice shows "
        f"{chance} here by luck alone. n = {least(study.load, layers):,} choices or more in each layer.",
        0.3 + 1.3 * len(layers),
        paint,
        num_experts=share_LE.shape[1],
        numbers=load_table(study),
    )


def load_by_layer(study: Study) -> Picture | None:
    """The load of every layer as a heat map, layers downwards; None where the bars have shown all of them."""
    layers = [layer for layer in range(study.trace.num_layers) if np.isfinite(study.load.value[layer]).any()]
    if len(layers) <= len(study.picked):
        return None
    ratio_LE = study.load.value[layers] / study.load.chance[layers]
    limit = colour_limit(ratio_LE)

    def paint(figure: Figure) -> None:
        (panel,) = panels(figure, 1)
        heat_map(panel, ratio_LE, limit, texts=100 * study.load.value[layers])
        name_rows(panel, [study.labels[layer] for layer in layers])
        panel.set_xlabel("expert")
        ratio_key(figure, [panel], limit, "uniform")

    return draw(
        "load_by_layer",
        "The load of every layer",
        "Each row shows how a layer's choices split over its experts (a row adds up to 100 %). Orange: more than "
        f"uniform, 1/E; blue: less. n = {least(study.load, layers):,} choices or more in each layer.",
        0.75 + min(0.26, 6 / len(layers)) * len(layers),
        paint,
    )


def load_table(study: Study) -> Table:
    """Each expert's share of its layer's choices, and what a uniform router would give it."""
    load = study.load
    count = np.broadcast_to(load.count, load.value.shape)
    return Table(
        name="load",
        title="Load of each expert",
        columns=(
            Column(name="layer", picks=True),
            Column(name="expert", form="d"),
            Column(name="share of choices", form=".2%"),
            Column(name="chance", form=".2%"),
            Column(name="choices in the layer", form=",d"),
        ),
        rows=[
            (study.labels[layer], int(expert), *map(float, (load.value[at], load.chance[at])), int(count[at]))
            for at in map(tuple, np.argwhere(np.isfinite(load.value)))
            for layer, expert in [at]
        ],
    )

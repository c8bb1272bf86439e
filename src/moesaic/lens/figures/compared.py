"""Pictures of two traces side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesaic.lens import palette
from moesaic.lens.comparison import Comparison
from moesaic.lens.drawing import Picture, draw, panels
from moesaic.lens.figures.dots import dots, label_rows, pair_of_dots
from moesaic.lens.figures.heat import colour_limit, heat_map, name_rows, ratio_key
from moesaic.lens.study import Study, least
from moesaic.lens.tables import Column, Table
from moesaic.lens.tokens import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (palette.SPARSE, palette.OTHERS[0])


def comparison_figures(pair: Comparison) -> list[Picture]:
    """Load and subject by depth, who takes which domain, and where the choices are the same."""
    pictures = [by_depth(pair), domains_of_both(pair), same_choices(pair)]
    return [picture for picture in pictures if picture is not None]


def by_depth(pair: Comparison) -> Picture:
    """How uneven the load is, and what the expert tells about the subject, over the depth of both models."""
    load = (pair.first.worst.value[pair.first.shown], pair.second.worst.value[pair.second.shown])
    told = (_told(pair.first), _told(pair.second))
    shown = [(load, "busiest expert over the mean", "{x:g}×")]
    if all(np.isfinite(line).any() for line in told):
        shown.append((told, "subject told by the expert, beyond chance", "{x:g} %"))

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(shown), sharex=True)
        for panel, (values, title, form) in zip(axes, shown, strict=True):
            pair_of_dots(panel, values, _COLOURS)
            panel.set_title(title)
            panel.yaxis.set_major_formatter(form)
        axes[0].axhline(1, color=palette.INK, linewidth=1, linestyle=(0, (3, 2)))
        if len(axes) > 1:
            axes[1].axhline(0, color=palette.INK, linewidth=1, linestyle=(0, (3, 2)))
        _name_both(axes[0], pair)

    return draw(
        "compare_depth",
        "Both models, from the first layer to the last",
        "Dashed: perfect balance above, chance below (subject labels of whole texts shuffled). "
        f"n = {least(pair.first.load, pair.first.shown):,} and {least(pair.second.load, pair.second.shown):,} choices "
        "or more in each layer.",
        0.7 + 1.6 * len(shown),
        paint,
        numbers=_depth_table(pair),
    )


def domains_of_both(pair: Comparison) -> Picture | None:
    """Heat maps of domains by experts, one model on the left and one on the right; None if neither has domains."""
    studies = (pair.first, pair.second)
    if max(len(study.domains) for study in studies) < 2:
        return None
    count = min(len(study.picked) for study in studies)
    layers = [[study.picked[place] for place in (0, len(study.picked) // 2, -1)[3 - count :]] for study in studies]
    ratios = [study.share.value / study.share.chance for study in studies]
    limit = max(colour_limit(ratio[at]) for ratio, at in zip(ratios, layers, strict=True))
    most = max(len(study.domains) for study in studies)

    def paint(figure: Figure) -> None:
        axes = panels(figure, 2 * count, 2)
        for place, panel in enumerate(axes):
            study, ratio = studies[place % 2], ratios[place % 2]
            layer = layers[place % 2][place // 2]
            heat_map(panel, ratio[layer, :, : study.trace.metadata.num_experts[layer]], limit, columns=2)
            name_rows(panel, list(study.domains) if _has_names(pair, place) else [""] * len(study.domains), 2)
            panel.set_title(
                f"{brief(pair.names[place % 2], 22)}\n{study.labels[layer]}" if place < 2 else study.labels[layer]
            )
        for panel in axes[-2:]:
            panel.set_xlabel("expert")
        ratio_key(figure, axes, limit, "uniform")

    return draw(
        "compare_domains",
        "Which expert takes which domain, in both",
        "Share of each domain's choices over uniform, 1/E. Numbers of experts mean nothing from one training to "
        "another: compare how strong the patterns are, not in which column they lie. "
        f"n = {least(pair.first.load, layers[0]):,} and {least(pair.second.load, layers[1]):,} choices or more in each "
        "layer.",
        0.7 + (0.36 + min(0.22, 4 / most) * most) * count,
        paint,
    )


def same_choices(pair: Comparison) -> Picture | None:
    """How many of a token's experts are the same in both, by layer; None where they cannot be compared."""
    same = pair.same
    if same is None:
        return None
    layers = [layer for layer in pair.first.shown if np.isfinite(same.value[layer])]
    names = [pair.first.labels[layer] for layer in layers]

    def paint(figure: Figure) -> None:
        (panel,) = panels(figure, 1)
        value = (100 * same.value[layers]).tolist()
        dots(panel, value, (100 * same.chance[layers]).tolist(), [f"{share:.0f} %" for share in value])
        label_rows(panel, names)

    return draw(
        "same_choices",
        "How many of a token's experts are the same in both",
        "Of the experts that a token had in the one, the share that it had in the other too, on the same text (router "
        "saturation, if they are checkpoints of one training). The grey tick is chance, from the loads of both. From "
        f"different trainings it should lie at chance: experts carry other numbers. n = {least(same, layers):,} "
        f"{same.counted} or more in each layer.",
        0.4 + 0.24 * len(layers),
        paint,
        numbers=Table(
            name="same_choices",
            title="Choices that are the same in both",
            columns=(Column(name="layer"), Column(name="share", form=".2%"), Column(name="chance", form=".2%")),
            rows=[
                (name, float(same.value[layer]), float(same.chance[layer]))
                for name, layer in zip(names, layers, strict=True)
            ],
        ),
    )


def _told(study: Study) -> np.ndarray:
    values = [study.about_domain[layer] for layer in study.shown]
    return np.array([100 * (it.bits - it.chance) / it.ceiling if it.ceiling > 0 else np.nan for it in values])


def _has_names(pair: Comparison, place: int) -> bool:
    """Domains are named once where both have the same."""
    return place % 2 == 0 or pair.first.domains != pair.second.domains


def _name_both(panel: Axes, pair: Comparison) -> None:
    handles = [
        panel.plot([], [], mark, color=colour, label=brief(name))[0]
        for name, colour, mark in zip(pair.names, _COLOURS, "os", strict=True)
    ]
    panel.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.12), ncols=2, handletextpad=0.2)


def _depth_table(pair: Comparison) -> Table:
    return Table(
        name="compare_depth",
        title="Both models by layer",
        columns=(
            Column(name="layer"),
            Column(name="model", picks=True),
            Column(name="busiest over mean", form=".2f"),
            Column(name="bits about the subject", form=".4f"),
            Column(name="chance", form=".4f"),
            Column(name="all there is", form=".3f"),
        ),
        rows=[
            (study.labels[layer], name, float(study.worst.value[layer]), told.bits, told.chance, told.ceiling)
            for study, name in zip((pair.first, pair.second), pair.names, strict=True)
            for layer in study.shown
            for told in [study.about_domain[layer]]
        ],
    )

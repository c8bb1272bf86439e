"""Pictures of what goes with what: experts with words and subjects, with neighbours, together, from layer to layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesaic.lens.drawing import Picture, draw, panels
from moesaic.lens.figures.dots import dots, label_rows
from moesaic.lens.figures.heat import colour_limit, expert_ticks, heat_map, ratio_key
from moesaic.lens.measures import Information, Measured
from moesaic.lens.study import Study, least
from moesaic.lens.tables import Cell, Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def information(study: Study) -> Picture | None:
    """What the expert's number tells about the domain, and the token about the expert; None if neither is known."""
    layers = study.shown
    shown = [
        ([values[layer] for layer in layers], title)
        for values, title, known in (
            (study.about_domain, "expert tells the domain", any(value.ceiling > 0 for value in study.about_domain)),
            (study.about_token, "token tells the expert", any(value.num_rows for value in study.about_token)),
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
            dots(panel, told, chance, [f"{value.bits:.2f} bits" for value in values])
            panel.set_title(title)
            panel.set_xlabel("of what there is to tell")
        label_rows(axes[0], [study.labels[layer] for layer in layers])

    rows = min(value.num_rows for values, _ in shown for value in values)
    return draw(
        "information",
        "What expert, word and subject tell about each other",
        "Mutual information as a share of its ceiling: 0 % is nothing, 100 % everything. The grey tick is chance: for "
        "domains, whole texts with their domain labels shuffled; for tokens, the text shifted against the choices. "
        f"{study.some_layers}n = {rows:,} choices or more in each layer.",
        0.75 + 0.24 * len(layers),
        paint,
        numbers=_information_table(study, shown),
    )


def words_or_subjects(study: Study) -> Picture | None:
    """How well the expert is guessed from the word, from the subject and from both; None where either is unknown."""
    layers = [layer for layer in study.shown if np.isfinite(study.guessed.value[:, layer]).all()]
    if not layers or len(study.domains) < 2:
        return None
    kinds = ["from the token", "from the domain", "from both"]
    value, chance = (100 * line[:, layers] for line in (study.guessed.value, study.guessed.chance))

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(kinds), len(kinds), sharey=True, sharex=True)
        for panel, told, base, title in zip(axes, value.tolist(), chance.tolist(), kinds, strict=True):
            dots(panel, told, base, [f"{share:.0f} %" for share in told])
            panel.set_title(title)
        axes[0].set_xlim(0, 1.45 * value.max())
        label_rows(axes[0], [study.labels[layer] for layer in layers])

    count = int(np.broadcast_to(study.guessed.count, study.guessed.value.shape)[:, layers].min())
    return draw(
        "words_or_subjects",
        "Do experts follow words or subjects?",
        "How often a token's first-choice expert is guessed right, from what is commonest for that token, for its "
        "domain, or for the token within the domain; scored on text that the guesses were not made from. The grey tick "
        "is chance: always guessing the commonest expert. "
        f"{study.some_layers}n = {count:,} tokens or more in each layer.",
        0.6 + 0.24 * len(layers),
        paint,
        numbers=_layer_table(
            "words_or_subjects",
            "First-choice experts guessed right",
            [
                (study.labels[layer], kind, float(value[row, at]) / 100, float(chance[row, at]) / 100, count)
                for row, kind in enumerate(kinds)
                for at, layer in enumerate(layers)
            ],
        ),
    )


def staying(study: Study) -> Picture | None:
    """How often neighbouring tokens share an expert; None if the trace has no neighbours."""
    layers = [layer for layer in study.shown if np.isfinite(study.stays.value[layer])]
    if not layers:
        return None
    kinds = [(study.stays, "first choice is the same"), (study.meets, "any choice in common")]
    if study.trace.metadata.top_k == 1:
        # With one choice the two are the same.
        kinds = kinds[:1]

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(kinds), len(kinds), sharey=True)
        for panel, (measured, title) in zip(axes, kinds, strict=True):
            value, chance = (100 * line[layers] for line in (measured.value, measured.chance))
            dots(panel, value.tolist(), chance.tolist(), [f"{share:.0f} %" for share in value])
            panel.set_title(title)
        label_rows(axes[0], [study.labels[layer] for layer in layers])

    return draw(
        "repetition",
        "How often a token keeps the expert of the token before it",
        "Share of neighbouring tokens with an expert in common. The grey tick is chance: what two tokens drawn at "
        f"random from the layer would share, given its loads. {study.some_layers}n = {least(study.stays, layers):,} "
        f"{study.stays.counted} or more in each layer.",
        0.6 + 0.24 * len(layers),
        paint,
        numbers=_layer_table(
            "repetition",
            "Neighbouring tokens that share an expert",
            [
                (study.labels[layer], title, *_numbers(measured.value, measured.chance, layer), _count(measured, layer))
                for measured, title in kinds
                for layer in layers
            ],
        ),
    )


def next_layer(study: Study) -> Picture | None:
    """How well a layer's choice gives away the next layer's; None for a single layer."""
    value, chance = study.next_layer.value, study.next_layer.chance
    pairs = [pair for pair in range(len(value)) if np.isfinite(value[pair]) and pair in study.shown]
    if not pairs:
        return None
    names = [f"{study.labels[pair]} → {study.labels[pair + 1].removeprefix('layer ')}" for pair in pairs]

    def paint(figure: Figure) -> None:
        (panel,) = panels(figure, 1)
        told = (100 * value[pairs]).tolist()
        dots(panel, told, (100 * chance[pairs]).tolist(), [f"{share:.0f} %" for share in told])
        label_rows(panel, names)

    return draw(
        "next_layer",
        "How well a layer's expert gives away the next layer's",
        "How often the next layer's first choice is guessed right from this layer's first choice, on text that the "
        "guesses were not made from. The grey tick is chance: always guessing the commonest expert. Where the two lie "
        f"far apart, experts can be fetched ahead. {study.some_layers}n = {least(study.next_layer, pairs):,} "
        f"{study.next_layer.counted} or more.",
        0.4 + 0.24 * len(pairs),
        paint,
        numbers=_layer_table(
            "next_layer",
            "Guessing the next layer's first choice",
            [
                (name, "guessed right", *_numbers(value, chance, pair), _count(study.next_layer, pair))
                for name, pair in zip(names, pairs, strict=True)
            ],
        ),
    )


def together(study: Study) -> Picture | None:
    """Which experts are chosen together, in the first, middle and last layer; None where tokens have one each."""
    value, chance = study.together.value, study.together.chance
    layers = [layer for layer in study.picked if np.nansum(value[layer]) > 0]
    if not layers:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(chance > 0, value / chance, np.nan)
    limit = colour_limit(ratio[layers])
    columns = min(3, len(layers))

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(layers), columns)
        for panel, layer in zip(axes, layers, strict=True):
            num_experts = study.trace.metadata.num_experts[layer]
            inside = np.s_[layer, :num_experts, :num_experts]
            heat_map(panel, ratio[inside], limit, columns=columns)
            ticks = expert_ticks(num_experts, columns)
            panel.set_yticks(np.asarray(ticks) + 0.5, list(map(str, ticks)))
            panel.set_aspect("equal")
            panel.set_title(study.labels[layer])
            panel.set_xlabel("expert j")
        axes[0].set_ylabel("expert i")
        ratio_key(figure, axes, limit, "chance")

    return draw(
        "together",
        "Which experts work together",
        "Of the tokens that chose expert i, the share that chose j too: N(i, j) / N(i), over what chance would give "
        "with the same loads. Orange: more often together than by chance; blue: they avoid each other. "
        f"n = {least(study.load, layers):,} choices or more in each layer.",
        0.9 + 4.4 / columns,
        paint,
        numbers=_together_table(study, layers),
    )


def _information_table(study: Study, shown: list[tuple[list[Information], str]]) -> Table:
    return Table(
        name="information",
        title="Mutual information in bits",
        columns=(
            Column(name="layer"),
            Column(name="of what", picks=True),
            Column(name="bits", form=".4f"),
            Column(name="chance", form=".4f"),
            Column(name="all there is", form=".3f"),
            Column(name="p", form=".4f"),
            Column(name="n choices", form=",d"),
        ),
        rows=[
            (study.labels[layer], title, value.bits, value.chance, value.ceiling, value.p_value, value.num_rows)
            for values, title in shown
            for layer, value in zip(study.shown, values, strict=True)
        ],
    )


def _layer_table(name: str, title: str, rows: list[tuple[Cell, ...]]) -> Table:
    columns = (
        Column(name="layer"),
        Column(name="what", picks=True),
        Column(name="share", form=".2%"),
        Column(name="chance", form=".2%"),
        Column(name="n", form=",d"),
    )
    return Table(name=name, title=title, columns=columns, rows=rows)


def _together_table(study: Study, layers: list[int]) -> Table:
    value, chance = study.together.value, study.together.chance
    return Table(
        name="together",
        title="Experts that are chosen together",
        columns=(
            Column(name="layer", picks=True),
            Column(name="expert i", form="d"),
            Column(name="expert j", form="d"),
            Column(name="N(i, j) / N(i)", form=".2%"),
            Column(name="chance", form=".2%"),
        ),
        rows=[
            (
                study.labels[layer],
                int(one),
                int(other),
                float(value[layer, one, other]),
                float(chance[layer, one, other]),
            )
            for layer in layers
            for one, other in np.argwhere(np.isfinite(value[layer]))
        ],
    )


def _numbers(value: np.ndarray, chance: np.ndarray, layer: int) -> tuple[float, float]:
    return float(value[layer]), float(chance[layer])


def _count(measured: Measured, layer: int) -> int:
    return int(np.broadcast_to(measured.count, measured.value.shape)[layer])

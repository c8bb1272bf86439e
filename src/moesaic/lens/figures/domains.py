"""Pictures of domains: which expert takes which, layer by layer and domain by domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesaic.lens.drawing import Picture, draw, panels
from moesaic.lens.figures.heat import colour_limit, heat_map, name_rows, ratio_key
from moesaic.lens.measures.measured import FloatArray, divide
from moesaic.lens.study import Study, least
from moesaic.lens.tables import Column, Table
from moesaic.lens.tokens import brief

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Panels of one picture: more would not be read.
_MOST_DOMAINS = 12


def domain_heat_map(study: Study) -> Picture:
    """Share of each expert in each domain, one panel for each layer, coloured by its ratio to uniform."""
    share_LQE, layers = study.share.value, study.shown
    ratio_LQE = share_LQE / study.share.chance
    limit = colour_limit(ratio_LQE[layers])
    columns = 1 if len(layers) <= 6 and share_LQE.shape[2] <= 64 else 2
    row = min(0.24, 5 / len(study.domains))
    height = 0.42 + (0.34 + row * len(study.domains)) * -(-len(layers) // columns)

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(layers), columns)
        for place, (panel, layer) in enumerate(zip(axes, layers, strict=True)):
            num_experts = study.trace.metadata.num_experts[layer]
            inside = np.s_[layer, :, :num_experts]
            heat_map(panel, ratio_LQE[inside], limit, columns=columns, texts=100 * share_LQE[inside])
            name_rows(panel, list(study.domains) if place % columns == 0 else [""] * len(study.domains), columns)
            panel.set_title(f"{study.labels[layer]}  ·  uniform {100 / num_experts:.3g} %")
            if place >= len(layers) - columns or num_experts != study.trace.metadata.num_experts[layers[-1]]:
                panel.set_xlabel("expert")
        ratio_key(figure, axes, limit, "uniform")

    return draw(
        "domains",
        "Which expert takes which domain",
        "Each row shows how the choices of one domain's tokens split over the experts (a row adds up to 100 %). "
        "Orange: more than a uniform router would give; blue: less; no colour: exactly uniform. "
        f"{study.some_layers}n = {least(study.load, layers):,} choices or more in each panel, all of a "
        "token's choices counted.",
        height,
        paint,
        numbers=share_table(study),
    )


def layers_by_domain(study: Study) -> Picture | None:
    """One panel for each domain, layers downwards: where in depth it has experts of its own. None for one domain."""
    domains = _leaning(study)
    if len(study.domains) < 2:
        return None
    layers = study.shown
    lift_LQE = _lift(study)[layers]
    limit = colour_limit(lift_LQE[:, domains])
    columns = 2 if len(domains) > 1 else 1

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(domains), columns)
        for place, (panel, domain) in enumerate(zip(axes, domains, strict=True)):
            heat_map(panel, lift_LQE[:, domain], limit, columns=columns)
            name_rows(
                panel, [study.labels[at] for at in layers] if place % columns == 0 else [""] * len(layers), columns
            )
            panel.set_title(brief(study.domains[domain]))
            if place >= len(domains) - columns:
                panel.set_xlabel("expert")
        ratio_key(figure, axes, limit, "average")

    some = f"The {len(domains)} of {len(study.domains)} domains that lean most are shown. "
    count_QN = np.bincount(study.trace.domain[study.trace.domain >= 0])
    return draw(
        "layers_by_domain",
        "Where in the model each domain has experts of its own",
        "Layers downwards, experts across; the colour is the expert's share of this domain's choices over its share of "
        "an average domain's: orange more, blue less, none where the domain is routed like the others. By chance "
        "alone cells stay pale. "
        f"{some if len(domains) < len(study.domains) else ''}{study.some_layers}"
        f"n = {int(count_QN[count_QN > 0].min(initial=study.trace.num_rows)):,} choices or more in each domain, over "
        "all layers.",
        0.42 + (0.34 + min(0.2, 3 / len(layers)) * len(layers)) * -(-len(domains) // columns),
        paint,
    )


def share_table(study: Study) -> Table:
    """How each domain's choices split over the experts, layer by layer."""
    share = study.share
    count = np.broadcast_to(share.count, share.value.shape)
    return Table(
        name="domains",
        title="Share of each domain's choices that an expert takes",
        columns=(
            Column(name="layer", picks=True),
            Column(name="domain", picks=True),
            Column(name="expert", form="d"),
            Column(name="share of the domain's choices", form=".2%"),
            Column(name="chance", form=".2%"),
            Column(name="choices", form=",d"),
        ),
        rows=[
            (
                study.labels[layer], study.domains[domain], int(expert),
                float(share.value[at]), float(share.chance[at]), int(count[at]),
            )
            for at in map(tuple, np.argwhere(np.isfinite(share.value)))
            for layer, domain, expert in [at]
        ],
    )  # fmt: skip


def domain_table(study: Study) -> Table:
    """For each domain and layer the expert that it leans to most, and how evenly it is spread."""
    share_LQE = study.share.value
    average_LE, lift_LQE = _average(study), _lift(study)
    count_LQE = np.broadcast_to(study.share.count, share_LQE.shape)
    rows = []
    for layer in study.shown:
        for domain, name in enumerate(study.domains):
            share_E, lift_E = share_LQE[layer, domain], lift_LQE[layer, domain]
            if not np.isfinite(share_E).any():
                continue
            average_E = average_LE[layer]
            expert = int(np.nanargmax(share_E - average_E))
            num_experts = study.trace.metadata.num_experts[layer]
            rows.append(
                (
                    name, study.labels[layer], int(count_LQE[layer, domain, 0]), expert,
                    float(share_E[expert]), float(average_E[expert]), float(lift_E[expert]), 1 / num_experts,
                    float(np.nanmax(share_E) / np.nanmin(share_E)) if np.nanmin(share_E) > 0 else None,
                )
            )  # fmt: skip
    return Table(
        name="domain_leans",
        title="What each domain leans to",
        columns=(
            Column(name="domain"),
            Column(name="layer", picks=True),
            Column(name="n choices", form=",d"),
            Column(name="leans to expert", form="d"),
            Column(name="its share here", form=".1%"),
            Column(name="of an average domain", form=".1%"),
            Column(name="ratio", form=".2f"),
            Column(name="uniform", form=".1%"),
            Column(name="busiest / idlest", form=".2f"),
        ),
        rows=rows,
    )


def _average(study: Study) -> FloatArray:
    """Each expert's mean share over the domains that have rows, (L, E)."""
    known = np.isfinite(study.share.value)
    count_LE = np.maximum(1, known.sum(axis=1))
    return np.asarray(np.where(known, study.share.value, 0).sum(axis=1) / count_LE, dtype=np.float64)


def _lift(study: Study) -> FloatArray:
    """A domain's share over the domains' average, (L, Q, E); NaN for an expert that no domain uses."""
    return divide(study.share.value, _average(study)[:, None])


def _leaning(study: Study) -> list[int]:
    """The domains whose routing differs most from the average, in their own order."""
    lift_LQE = _lift(study)
    share_LQE = np.where(np.isfinite(lift_LQE), study.share.value * np.abs(lift_LQE - 1), 0)
    most = np.argsort(-share_LQE.sum(axis=(0, 2)), kind="stable")[:_MOST_DOMAINS]
    return sorted(map(int, most))

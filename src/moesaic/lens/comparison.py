"""Two traces side by side: what can be said of both, and how often they chose the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesaic.core.errors import ConfigError, DataError
from moesaic.lens import measures
from moesaic.lens.measures import Information, Measured
from moesaic.lens.study import Study
from moesaic.lens.tables import Cell, Column, Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two studies, and what they have in common.

    Attributes:
        first: the trace that the page is of.
        second: the one beside it.
        same: how many of a token's experts are the same in both, by layer; None where it makes no sense.
        why_not: then, why.
    """

    first: Study
    second: Study
    same: Measured | None
    why_not: str = ""

    @property
    def names(self) -> tuple[str, str]:
        """What the page calls the two; told apart where they have one name."""
        one, other = self.first.name or "first", self.second.name or "second"
        return (one, other) if one != other else (f"{one} (first)", f"{other} (second)")


def compare(first: Study, second: Study) -> Comparison:
    """Put two studies side by side; choices are compared where both read the same text with as many experts."""
    try:
        return Comparison(first=first, second=second, same=measures.saturation(first.trace, second.trace))
    except (ConfigError, DataError) as error:
        return Comparison(first=first, second=second, same=None, why_not=str(error))


def comparison_table(pair: Comparison) -> Table:
    """One line for each measure, with chance where it has one."""
    lines: list[tuple[str, Callable[[Study], float], Callable[[Study], float] | None, str]] = [
        ("tokens traced", lambda study: study.num_tokens, None, ",.0f"),
        ("MoE layers", lambda study: study.trace.num_layers, None, ".0f"),
        ("experts of a layer, at most", lambda study: max(study.trace.metadata.num_experts), None, ".0f"),
        ("experts of a token", _choices, None, ".2f"),
        ("busiest over mean, worst layer", _worst, lambda study: float(study.worst.chance[_at(study)]), ".2f"),
        ("experts idle", lambda study: len(study.idle), None, ".0f"),
        ("choices dropped", lambda study: float((~study.trace.kept).mean()), None, ".2%"),
        ("subject told by expert, clearest layer", *_told(lambda study: study.about_domain), ".1%"),
        ("expert told by word, clearest layer", *_told(lambda study: study.about_token), ".1%"),
        ("neighbours share first choice, mean", *_mean(lambda study: study.stays), ".1%"),
        ("next layer guessed, mean", *_mean(lambda study: study.next_layer), ".1%"),
    ]
    rows: list[tuple[Cell, ...]] = []
    for name, value, chance, form in lines:
        cells = [
            format(what(study), form) if what else "–"
            for study in (pair.first, pair.second)
            for what in (value, chance)
        ]
        rows.append((name, *("–" if cell.startswith("nan") else cell for cell in cells)))
    one, other = pair.names
    columns = ("measure", one, f"chance, {one}", other, f"chance, {other}")
    return Table(name="comparison", title="Side by side", columns=[Column(name=name) for name in columns], rows=rows)


def comparison_sentences(pair: Comparison) -> list[str]:
    """Which of the two is the more even, which splits more by subject, and how alike their choices are."""
    one, other = pair.names
    sentences = []
    worst = _worst(pair.first), _worst(pair.second)
    if abs(worst[0] / worst[1] - 1) < 0.05:
        sentences.append(f"{one} and {other} spread their work about as evenly: {worst[0]:.2f} and {worst[1]:.2f}.")
    else:
        even, uneven = (one, other) if worst[0] < worst[1] else (other, one)
        sentences.append(
            f"{even} spreads its work more evenly than {uneven}: the busiest expert of the most uneven layer takes "
            f"{min(worst):.2f} times the average load, against {max(worst):.2f} (1 is perfect)."
        )
    told = [_clearest(study.about_domain) for study in (pair.first, pair.second)]
    if all(told):
        shares = [(best.bits - best.chance) / best.ceiling for best in told if best]
        more, less = (one, other) if shares[0] >= shares[1] else (other, one)
        sentences.append(
            f"Beyond chance, the expert of {more} tells {100 * max(shares):.1f} % of a token's subject where it is "
            f"clearest, that of {less} {100 * min(shares):.1f} %."
        )
    if pair.same is not None:
        layer = int(np.nanargmin(pair.same.value))
        least = 100 * float(pair.same.value[layer])
        sentences.append(
            f"On the same text they choose the same experts for {100 * float(np.nanmean(pair.same.value)):.0f} % of "
            f"the choices (chance {100 * float(np.nanmean(pair.same.chance)):.0f} %), least in "
            f"{pair.first.labels[layer]}: {least:.0f} %."
        )
    return sentences


def _at(study: Study) -> int:
    return int(np.nanargmax(study.worst.value))


def _worst(study: Study) -> float:
    return float(study.worst.value[_at(study)])


def _choices(study: Study) -> float:
    top_k = study.trace.metadata.top_k
    return float(top_k) if top_k is not None else float(np.nanmean(measures.experts_per_token(study.trace).value))


def _clearest(values: list[Information]) -> Information | None:
    known = [value for value in values if value.ceiling > 0 and value.num_rows]
    return max(known, key=lambda value: (value.bits - value.chance) / value.ceiling, default=None)


def _told(of: Callable[[Study], list[Information]]) -> tuple[Callable[[Study], float], Callable[[Study], float]]:
    def part(study: Study, *, chance: bool) -> float:
        best = _clearest(of(study))
        return float("nan") if best is None else (best.chance if chance else best.bits) / best.ceiling

    return (lambda study: part(study, chance=False)), (lambda study: part(study, chance=True))


def _mean(of: Callable[[Study], Measured]) -> tuple[Callable[[Study], float], Callable[[Study], float]]:
    def mean(values: np.ndarray) -> float:
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    return (lambda study: mean(of(study).value)), (lambda study: mean(of(study).chance))

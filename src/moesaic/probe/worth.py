"""What an expert is worth: the held-out loss with it and without it, by domain, with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.hf.interventions import Force, Intervention, Swap, SwitchOff
from moesaic.probe.interval import Mean, adjusted, mean_per_unit
from moesaic.probe.losses import Losses, Steps, Trial, losses
from moesaic.probe.text import HeldOut

How = Literal["off", "drop", "swap", "force"]
ALL = "all"
"""The name of all domains together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """How an intervention changes the loss on the text of one domain.

    Attributes:
        domain: its name; ``all`` for all together.
        nats_per_token: the change; above 0 the model predicts worse.
        low: end of the interval.
        high: the other end.
        p_value: of no change, from Student's t over texts.
        adjusted_p: the same, adjusted by Benjamini and Hochberg over every expert and domain that was tried.
        bits_per_byte: the change in bits per UTF-8 byte; NaN where bytes are not known.
        bits_low: end of its interval.
        bits_high: the other end.
        chance: the nats per token that the same done to the layer's other experts costs for as many rows; NaN where no
            other expert of the layer was tried, or none of them serves the domain.
        beyond: ``nats_per_token - chance``: above 0, the expert is worth more than others of its load.
        beyond_low: end of its interval, from the differences text by text.
        beyond_high: the other end.
        beyond_p: of no difference, adjusted as ``adjusted_p`` is, over all of these.
        rows: the expert's rows among those of the domain's predicted tokens.
        num_tokens: predicted.
        num_texts: that hold them; each counts as one observation.
    """

    domain: str
    nats_per_token: float
    low: float
    high: float
    p_value: float
    adjusted_p: float
    bits_per_byte: float
    bits_low: float
    bits_high: float
    chance: float
    beyond: float
    beyond_low: float
    beyond_high: float
    beyond_p: float
    rows: int
    num_tokens: int
    num_texts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What one intervention does to the loss.

    Attributes:
        layer: index in depth order.
        layer_name: module path.
        expert: its number.
        how: "off", "drop", "swap" or "force"; empty for a trial of the reader's own.
        partner: whom it was swapped with; None unless swapped.
        changes: by domain, and over all.
    """

    layer: int
    layer_name: str
    expert: int
    how: str
    partner: int | None
    changes: tuple[Change, ...]

    def on(self, domain: str = ALL) -> Change:
        """The change on one domain.

        Raises:
            ConfigError: if there is none of that name.
        """
        for change in self.changes:
            if change.domain == domain:
                return change
        raise ConfigError(f"domain must be one of {[one.domain for one in self.changes]}, got {domain!r}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Causal:
    """What experts are worth to a model.

    Attributes:
        effects: one for each expert that was tried.
        nats_per_token: of the model as it is, by domain and over all.
        bits_per_byte: the same; NaN where bytes are not known.
        confidence: of each interval, taken by itself.
        num_tests: over which p-values are adjusted.
    """

    effects: tuple[Effect, ...]
    nats_per_token: dict[str, float]
    bits_per_byte: dict[str, float]
    confidence: float
    num_tests: int

    def found(self, level: float = 0.05) -> list[tuple[Effect, Change]]:
        """The changes that hold at a false discovery rate, the largest first; those over all domains are left out."""
        held = [cell for cell in self._cells() if cell[1].adjusted_p <= level]
        return sorted(held, key=lambda cell: -abs(cell[1].nats_per_token))

    def special(self, level: float = 0.05) -> list[tuple[Effect, Change]]:
        """Where an expert is worth more than others of its load, at a false discovery rate, the largest first."""
        held = [cell for cell in self._cells() if cell[1].beyond_p <= level and cell[1].beyond > 0]
        return sorted(held, key=lambda cell: -cell[1].beyond)

    def _cells(self) -> list[tuple[Effect, Change]]:
        return [(effect, change) for effect in self.effects for change in effect.changes if change.domain != ALL]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; None for what does not exist."""
        made: dict[str, Any] = _plain(asdict(self))
        return made

    def rows(self) -> list[dict[str, Any]]:
        """A line for each effect and domain, for a table."""
        return [
            {
                "layer": effect.layer,
                "layer_name": effect.layer_name,
                "expert": effect.expert,
                "how": effect.how,
                "partner": effect.partner,
                **_plain(asdict(change)),
            }
            for effect in self.effects
            for change in effect.changes
        ]


def causal(
    model: nn.Module,
    text: HeldOut,
    *,
    experts: str | Iterable[tuple[int, int]] = "all",
    how: How = "off",
    confidence: float = 0.95,
    batch_size: int = 8,
    step: Steps = lambda _done, _all: None,
) -> Causal:
    """Take experts away one by one, and measure what the loss on held-out text becomes.

    Every text is its own pair, with the expert and without; intervals are Student's t over texts. ``chance`` says what
    as many rows of the layer's other experts are worth, so that a busy expert does not look special for being busy.

    Args:
        model: a causal language model with MoE layers, ours or transformers'; it is left as it was.
        text: to predict.
        experts: "all", or pairs of layer index and expert.
        how: "off": the expert cannot be chosen, the next best takes its place; "drop": its rows get nothing; "swap":
            it and the expert of its layer with the nearest load do each other's work; "force": every token visits it.
        confidence: of each interval.
        batch_size: blocks of one forward. With a capacity, other batches drop other rows.
        step: called after each forward.
    Raises:
        ConfigError: if there is no such expert, or ``how`` is none of these; and as :func:`moesaic.hf.intervene`.
    """
    if how not in ("off", "drop", "swap", "force"):
        raise ConfigError(f"how must be 'off', 'drop', 'swap' or 'force', got {how!r}. Use 'off'.")
    asked: list[tuple[int, int]] = []
    partners: list[int | None] = []

    def trials(rows: tuple[npt.NDArray[np.int64], ...]) -> list[Trial]:
        asked.extend(_asked(experts, [one.shape[1] for one in rows]))
        made: list[Trial] = []
        for layer, expert in asked:
            load_E = rows[layer].sum(axis=0)
            partner = nearest(load_E, expert) if how == "swap" else None
            partners.append(partner)
            made.append((_one(how, layer, expert, partner),))
        return made

    measured = losses(model, text, trials, batch_size=batch_size, step=step)
    changed = _changes(measured, text, [layer for layer, _ in asked], [(expert,) for _, expert in asked], confidence)
    effects = tuple(
        Effect(
            layer=layer,
            layer_name=measured.layer_names[layer],
            expert=expert,
            how=how,
            partner=partner,
            changes=one,
        )
        for (layer, expert), partner, one in zip(asked, partners, changed, strict=True)
    )
    return _result(measured, text, effects, confidence)


def changes(
    model: nn.Module,
    text: HeldOut,
    trials: Sequence[Intervention | Sequence[Intervention]],
    *,
    confidence: float = 0.95,
    batch_size: int = 8,
    step: Steps = lambda _done, _all: None,
) -> list[tuple[Change, ...]]:
    """How interventions of your own change the loss on held-out text, by domain and over all.

    Args:
        model: a causal language model with MoE layers.
        text: to predict.
        trials: each an intervention, or several that are made together.
        confidence: of each interval.
        batch_size: blocks of one forward.
        step: called after each forward.
    Raises:
        ConfigError: as :func:`moesaic.hf.intervene`.
    """
    together = [(one,) if isinstance(one, SwitchOff | Force | Swap) else tuple(one) for one in trials]
    measured = losses(model, text, lambda _rows: together, batch_size=batch_size, step=step)
    return _changes(measured, text, [None] * len(together), [()] * len(together), confidence)


def nearest(load_E: npt.NDArray[np.int64], expert: int) -> int:
    """The other expert whose load comes nearest; among equals the lowest index."""
    apart_E = np.abs(load_E - load_E[expert]).astype(np.float64)
    apart_E[expert] = math.inf
    return int(apart_E.argmin())


def _asked(experts: str | Iterable[tuple[int, int]], num_experts: Sequence[int]) -> list[tuple[int, int]]:
    if experts == "all":
        return [(layer, expert) for layer, count in enumerate(num_experts) for expert in range(count)]
    if isinstance(experts, str):
        raise ConfigError(f"experts must be 'all' or pairs of layer and expert, got {experts!r}. Use [(0, 3)].")
    pairs = list(experts)
    for layer, expert in pairs:
        if not 0 <= layer < len(num_experts) or not 0 <= expert < num_experts[layer]:
            raise ConfigError(
                f"experts must name layers in 0..{len(num_experts) - 1} and their experts, got layer {layer}, expert "
                f"{expert}. The layers have {', '.join(map(str, num_experts))} experts."
            )
    return pairs


def _one(how: How, layer: int, expert: int, partner: int | None) -> Intervention:
    if how == "swap":
        assert partner is not None
        return Swap(layer=layer, first=expert, second=partner)
    if how == "force":
        return Force(layer=layer, expert=expert)
    return SwitchOff(layer=layer, expert=expert, reroute=how == "off")


def _changes(
    measured: Losses,
    text: HeldOut,
    layers: Sequence[int | None],
    experts: Sequence[tuple[int, ...]],
    confidence: float,
) -> list[tuple[Change, ...]]:
    """The changes of each trial, p-values adjusted over all of them, chance from the others of the layer."""
    domain_of = np.array(text.domain_of_text)
    parts = {name: domain_of == index for index, name in enumerate(text.domains)}
    parts[ALL] = np.ones(len(domain_of), dtype=bool)
    table = []
    for which, (layer, those) in enumerate(zip(layers, experts, strict=True)):
        peers = [other for other, one in enumerate(layers) if layer is not None and one == layer and other != which]
        line = []
        for name, mine in parts.items():
            rows, others = 0, 0
            if layer is not None:
                rows = int(measured.rows[layer][mine][:, list(those)].sum())
                others = sum(int(measured.rows[layer][mine][:, list(experts[other])].sum()) for other in peers)
            share = rows / others if others else math.nan
            line.append(_change(name, measured, which, mine, text, rows, (peers, share), confidence))
        table.append(line)
    return _all_adjusted(table)


def _all_adjusted(table: list[list[Change]]) -> list[tuple[Change, ...]]:
    """P-values adjusted over all lines and domains; what is over all domains is no further test."""
    columns = {}
    for name in ("p_value", "beyond_p"):
        raw = [[math.nan if one.domain == ALL else getattr(one, name) for one in line] for line in table]
        columns[name] = adjusted(np.array(raw)) if raw else np.zeros((0, 0))
    return [
        tuple(
            replace(
                one, adjusted_p=float(columns["p_value"][at, place]), beyond_p=float(columns["beyond_p"][at, place])
            )
            for place, one in enumerate(line)
        )
        for at, line in enumerate(table)
    ]


def _change(
    name: str,
    measured: Losses,
    which: int,
    mine: npt.NDArray[np.bool_],
    text: HeldOut,
    rows: int,
    peers: tuple[list[int], float],
    confidence: float,
) -> Change:
    nats, tokens = measured.changes[which][mine], measured.tokens[mine]
    per_token = mean_per_unit(nats, tokens, confidence)
    num_bytes = np.array(text.num_bytes_of_text)[mine]
    per_byte = _NOTHING
    if not np.isnan(num_bytes).any():
        per_byte = mean_per_unit(nats, num_bytes, confidence).times(1 / math.log(2))
    # As many rows of the others: their whole cost, times this expert's rows over theirs.
    others, share = peers
    beyond = _NOTHING
    if not math.isnan(share):
        beyond = mean_per_unit(nats - share * measured.changes[others][:, mine].sum(axis=0), tokens, confidence)
    return Change(
        domain=name,
        nats_per_token=per_token.value,
        low=per_token.low,
        high=per_token.high,
        p_value=per_token.p_value,
        adjusted_p=math.nan,
        bits_per_byte=per_byte.value,
        bits_low=per_byte.low,
        bits_high=per_byte.high,
        chance=per_token.value - beyond.value,
        beyond=beyond.value,
        beyond_low=beyond.low,
        beyond_high=beyond.high,
        beyond_p=beyond.p_value,
        rows=rows,
        num_tokens=int(tokens.sum()),
        num_texts=per_token.num_texts,
    )


_NOTHING = Mean(value=math.nan, low=math.nan, high=math.nan, p_value=math.nan, num_texts=0)


def _result(measured: Losses, text: HeldOut, effects: tuple[Effect, ...], confidence: float) -> Causal:
    domain_of = np.array(text.domain_of_text)
    parts = {name: domain_of == index for index, name in enumerate(text.domains)} | {
        ALL: np.ones(len(domain_of), dtype=bool)
    }
    num_bytes = np.array(text.num_bytes_of_text)
    nats = {name: float(measured.nats[mine].sum()) for name, mine in parts.items()}
    return Causal(
        effects=effects,
        nats_per_token={name: nats[name] / float(measured.tokens[mine].sum()) for name, mine in parts.items()},
        bits_per_byte={name: nats[name] / math.log(2) / float(num_bytes[mine].sum()) for name, mine in parts.items()},
        confidence=confidence,
        num_tests=len(effects) * len(text.domains),
    )


def _plain(value: Any) -> Any:
    """Without NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

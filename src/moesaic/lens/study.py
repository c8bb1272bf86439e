"""Everything that a page says about one trace, measured once; pictures, tables and sentences read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesaic.lens import measures
from moesaic.lens.layers import labels_of, shown_layers
from moesaic.lens.measures import Information, Measured
from moesaic.lens.tokens import one_line
from moesaic.telemetry.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """The measures of one trace. What they are, and by what formula, is said in ``moesaic.lens.measures``.

    Attributes:
        trace: what was measured.
        name: what the page calls it.
        num_tokens: different tokens of text.
        domains: names as a reader sees them, in the order of ``share``.
        labels: what the page calls each layer.
        shown: the layers that pictures show: all, or some evenly spread over the depth.
        load: share of each expert, (L, E).
        worst: the busiest expert's load over the mean, (L,).
        dropped: share of choices dropped for lack of room, (L,).
        idle: (layer, expert) of those that got nothing.
        share: how a domain's choices split over the experts, (L, Q, E).
        about_domain: what the expert tells about the domain, by layer.
        about_token: what the token tells about the expert, by layer.
        stays: how often a token's first choice is its predecessor's, (L,).
        meets: how often any of its choices is among its predecessor's, (L,).
        together: ``N(i, j) / N(i)``, (L, E, E).
        guessed: how often a layer's first choice is guessed from token, domain, both, (3, L).
        next_layer: how often the next layer's first choice is guessed right, (L - 1,).
    """

    trace: RoutingTrace
    name: str
    num_tokens: int
    domains: tuple[str, ...]
    labels: list[str]
    shown: list[int]
    load: Measured
    worst: Measured
    dropped: Measured
    idle: list[tuple[int, int]]
    share: Measured
    about_domain: list[Information]
    about_token: list[Information]
    stays: Measured
    meets: Measured
    together: Measured
    guessed: Measured
    next_layer: Measured

    @property
    def picked(self) -> list[int]:
        """The first, the middle and the last of the layers with rows, as Mixtral's study has them."""
        return list(dict.fromkeys([self.shown[0], self.shown[len(self.shown) // 2], self.shown[-1]]))

    @property
    def some_layers(self) -> str:
        """A sentence for pictures that leave layers out; empty where none do."""
        if len(self.shown) == self.trace.num_layers:
            return ""
        return f"{len(self.shown)} of {self.trace.num_layers} layers are shown. "


def study(trace: RoutingTrace, name: str = "") -> Study:
    """Measure a trace.

    Args:
        trace: must have rows.
        name: what to call it where two are compared; by default the model's.
    """
    return Study(
        trace=trace,
        name=one_line(name or trace.metadata.model),
        num_tokens=trace.num_tokens,
        domains=tuple(map(one_line, measures.domains(trace))),
        labels=labels_of(trace),
        shown=shown_layers(trace),
        load=measures.load_share(trace),
        worst=measures.max_over_mean(trace),
        dropped=measures.drop_rate(trace),
        idle=measures.idle_experts(trace),
        share=measures.domain_share(trace),
        about_domain=measures.about_domain(trace),
        about_token=measures.about_token(trace),
        stays=measures.repetition(trace),
        meets=measures.repetition(trace, first_only=False),
        together=measures.coactivation(trace),
        guessed=measures.words_or_subjects(trace),
        next_layer=measures.next_layer(trace),
    )


def least(measured: Measured, layers: list[int]) -> int:
    """The smallest n of some layers."""
    count = np.broadcast_to(measured.count, measured.value.shape)[layers]
    return int(count.min(initial=np.iinfo(np.int64).max))

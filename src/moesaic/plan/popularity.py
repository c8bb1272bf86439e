"""Which experts tokens go to: all alike, some more than others by Zipf's law, or as a trace recorded it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from moesaic.core.errors import ConfigError
from moesaic.zoo import Experts

if TYPE_CHECKING:
    from moesaic.telemetry import RoutingTrace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SAMPLE = 20_000
"""Tokens that are drawn where no formula is known."""


class Popularity(Protocol):
    """What the planner asks of a distribution of choices; what was counted for one is kept, so it must have a hash."""

    def __hash__(self) -> int:
        """Tell distributions apart."""

    @property
    def name(self) -> str:
        """For the reader."""

    @property
    def alike(self) -> bool:
        """Whether all experts of all layers are equally popular."""

    def chances_E(self, layer: int, experts: Experts) -> Floats:
        """For each expert, the share of tokens that pass it; they sum to the choices of a token."""

    def choices_TK(self, layer: int, experts: Experts, tokens: int, seed: int = 0) -> Ints:
        """Draw the experts of so many tokens; -1 stands for no choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Zipf:
    """Tokens choose one expert after another, without putting back, in proportion to ``rank ** -exponent``.

    Tokens choose independently of each other. Which expert has which rank differs from layer to layer, so that popular
    ones are spread over devices. Where a token may use few groups, those whose two best experts score highest are kept
    (DeepSeek-V3), scores being Gumbel-distributed.

    Args:
        exponent: 0 for experts that are all alike.
        seed: of the ranks.
    """

    exponent: float
    seed: int = 0

    @property
    def name(self) -> str:
        """For the reader."""
        return f"zipf:{self.exponent:g}" if self.exponent else "uniform"

    @property
    def alike(self) -> bool:
        """Whether all experts of all layers are equally popular."""
        return self.exponent == 0

    def chances_E(self, layer: int, experts: Experts) -> Floats:
        """For each expert, the share of tokens that pass it, exactly unless groups and ranks meet."""
        if self.alike:
            return np.full(experts.num_experts, experts.top_k / experts.num_experts)
        if experts.groups > 1:
            return _counted(self, layer, experts)
        chances = _chances_by_rank(self.exponent, experts.num_experts, experts.top_k)
        return chances[self._rank_E(layer, experts.num_experts)]

    def choices_TK(self, layer: int, experts: Experts, tokens: int, seed: int = 0) -> Ints:
        """Draw the experts of so many tokens."""
        rng = np.random.default_rng((seed, layer))
        weight_E = (1.0 + self._rank_E(layer, experts.num_experts)) ** -self.exponent
        score_TE = np.log(weight_E) + rng.gumbel(size=(tokens, experts.num_experts))
        if experts.groups > 1:
            grouped = score_TE.reshape(tokens, experts.groups, -1)
            best = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
            lost = np.argsort(best, axis=1)[:, : experts.groups - experts.groups_kept]
            np.put_along_axis(grouped, lost[:, :, None], -np.inf, axis=1)
        return np.argpartition(-score_TE, experts.top_k - 1, axis=1)[:, : experts.top_k].astype(np.int64)

    def _rank_E(self, layer: int, num_experts: int) -> Ints:
        return np.random.default_rng((self.seed, layer, num_experts)).permutation(num_experts)


@lru_cache(maxsize=256)
def _counted(popularity: Zipf, layer: int, experts: Experts) -> Floats:
    choices_TK = popularity.choices_TK(layer, experts, SAMPLE)
    return np.bincount(choices_TK.ravel(), minlength=experts.num_experts) / SAMPLE


@lru_cache(maxsize=64)
def _chances_by_rank(exponent: float, num_experts: int, top_k: int) -> Floats:
    """The chance of being among the first ``top_k`` drawn without putting back, by rank.

    Give each expert an alarm that rings after an exponential time of its weight's rate: the first to ring are such a
    draw. So the chance is an integral over when this one rings, times the chance that fewer than ``top_k`` others rang
    before. Over the logarithm of time it is smooth and dies off at both ends, where the trapezoid rule is exact to
    rounding.
    """
    weight_E = np.arange(1, num_experts + 1) ** -exponent
    weight_E /= weight_E.sum()
    log_time = np.linspace(np.log(1e-14), np.log(60 / weight_E.min()), 1000)
    time = np.exp(log_time)
    rang_E = -np.expm1(-np.outer(weight_E, time))
    # Chances that 0, 1, ... of the experts before, and of those after, have rung; what is top_k or more is left out.
    before, after = _counts(rang_E, top_k), _counts(rang_E[::-1], top_k)[::-1]
    density = np.outer(weight_E, time) * np.exp(-np.outer(weight_E, time))
    chances = np.zeros(num_experts)
    step = log_time[1] - log_time[0]
    for expert in range(num_experts):
        left, right = before[expert], np.cumsum(after[expert], axis=0)
        fewer = sum(left[count] * right[top_k - 1 - count] for count in range(top_k))
        chances[expert] = float(np.sum(density[expert] * fewer) * step)
    return np.asarray(np.minimum(chances, 1.0))


def _counts(rang_E: Floats, top_k: int) -> list[Floats]:
    """For each expert, chances that 0 .. ``top_k`` - 1 of those earlier in the list have rung, at every time."""
    now = np.zeros((top_k, rang_E.shape[1]))
    now[0] = 1.0
    found = []
    for rang in rang_E:
        found.append(now)
        shifted = np.vstack([np.zeros_like(now[:1]), now[:-1]])
        now = now * (1 - rang) + shifted * rang
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recorded:
    """Choices as they were recorded on a model: which experts, together with which others, in which sequences.

    Attributes:
        name: for the reader.
        choices_LTK: the experts of every token, in reading order; -1 for no choice.
        sequence_T: which piece of text each is from, from 0.
        num_experts: of each layer.
    """

    name: str
    choices_LTK: Ints
    sequence_T: Ints
    num_experts: tuple[int, ...]

    @property
    def alike(self) -> bool:
        """Whether all experts of all layers are equally popular: a recording is not taken for that."""
        return False

    @classmethod
    def of(cls, trace: RoutingTrace, name: str) -> Recorded:
        """Take the choices out of a trace.

        Raises:
            ConfigError: if it has no rows.
        """
        if not trace.num_rows:
            raise ConfigError(f"A trace with choices was needed, got {name} without any. Record it on some text.")
        place = trace.sequence.astype(np.int64) << 32 | trace.position.astype(np.int64)
        places, token_N = np.unique(place, return_inverse=True)
        num_choices = int(trace.choice.max()) + 1
        choices_LTK = np.full((trace.num_layers, len(places), num_choices), -1, dtype=np.int64)
        choices_LTK[trace.layer, token_N, trace.choice] = trace.expert
        _, sequence_T = np.unique(places >> 32, return_inverse=True)
        experts = tuple(int(count) for count in trace.metadata.num_experts)
        return cls(name=name, choices_LTK=choices_LTK, sequence_T=sequence_T, num_experts=experts)

    def chances_E(self, layer: int, experts: Experts) -> Floats:
        """For each expert, the share of recorded tokens that passed it."""
        self.check(layer, experts)
        chosen = self.choices_LTK[layer]
        return np.bincount(chosen[chosen >= 0], minlength=experts.num_experts) / len(chosen)

    def choices_TK(self, layer: int, experts: Experts, tokens: int, seed: int = 0) -> Ints:
        """Draw recorded tokens."""
        self.check(layer, experts)
        rng = np.random.default_rng((seed, layer))
        return np.asarray(self.choices_LTK[layer][rng.integers(self.choices_LTK.shape[1], size=tokens)])

    def check(self, layer: int, experts: Experts) -> None:
        """See that the trace is of such a layer.

        Raises:
            ConfigError: if it has not as many layers or experts.
        """
        if layer >= len(self.num_experts) or self.num_experts[layer] != experts.num_experts:
            has = f"{self.num_experts[layer]} experts" if layer < len(self.num_experts) else "no such layer"
            raise ConfigError(
                f"The routing of layer {layer} with {experts.num_experts} experts was needed, and {self.name} has "
                f"{has} (its layers: {_listed(self.num_experts)}). Give a trace of the model that is planned for."
            )


def _listed(counts: tuple[int, ...]) -> str:
    return f"{len(counts)} of {counts[0]} experts" if len(set(counts)) == 1 else ", ".join(map(str, counts))


def read_routing(text: str) -> Zipf | Recorded:
    """Read what ``--routing`` was given: "uniform", "zipf:1.1" or the path of a trace.

    Raises:
        ConfigError: if it is none of these.
        CheckpointError: if the file is no trace.
    """
    if text == "uniform":
        return Zipf(exponent=0.0)
    found = re.fullmatch(r"zipf:(\d+(?:\.\d+)?)", text)
    if found is not None:
        return Zipf(exponent=float(found[1]))
    if not Path(text).exists():
        raise ConfigError(
            f"routing must be 'uniform', 'zipf:EXPONENT' or the path of a routing trace, got {text!r}, which is no "
            "file. Try zipf:1.1, or record a trace with moesaic inspect."
        )
    from moesaic.telemetry import RoutingTrace

    return Recorded.of(RoutingTrace.load(text), text)
